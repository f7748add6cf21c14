"""Whether a device computes what the reference computes: the cases of ``mxdit conformance``, and what they are held to.

A case is run on a device, through ``torch.ops.mxdit``, and beside it by the reference on the CPU:

    for case in conformance.cases():
        result = case.run("npu")
        print(result.name, result.verdict, result.reproducer or "")

Numbers are the same in every run and on every device, whichever cases run. What differs is held against
`mxdit.conformance.acceptance`, which is docs/numerics.md section 8 as data; a failure comes with a short program that
shows it. docs/adding-a-backend.md says how to read the results.
"""

from mxdit.backends.environment import environment
from mxdit.conformance.case import FAIL, PASS, REFUSED, SKIPPED, Case, Result
from mxdit.conformance.items import cases
from mxdit.conformance.records import report, totals

__all__ = ["FAIL", "PASS", "REFUSED", "SKIPPED", "Case", "Result", "cases", "environment", "report", "totals"]
