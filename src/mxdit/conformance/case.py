"""`Case`: one row of the table. `Tally` is its calls' findings, `Result` what is made of them."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mxdit.backends.environment import one_thread
from mxdit.conformance.acceptance import acceptance
from mxdit.conformance.calls import Call
from mxdit.conformance.compare import Finding, compare
from mxdit.conformance.reproduce import reproduce
from mxdit.errors import BackendError
from mxdit.ops import OPS, has_kernel

PASS, FAIL, REFUSED, SKIPPED = "pass", "fail", "refused", "skipped"


@dataclass(frozen=True)
class Result:
    """What a case found on a device.

    Attributes:
        name: the case's.
        verdict: ``pass``, ``fail``, ``refused`` (the device takes none or not all of it, by its own limits, and what it took
            was right) or ``skipped`` (what it takes is not installed, or the device's backend leaves the op to the reference).
        reason: why, in words, where it is not a pass.
        accepted: what it was held to, names of `mxdit.conformance.acceptance`.
        elements: codes and outputs compared.
        codes, scales, outputs: how many of them differ from the reference's, whether that is accepted or not.
        ulps: the largest difference of an output, in units in the last place of its dtype.
        seconds: how long it took, reference included.
        reproducer: a program that shows one failure, or None.
    """

    name: str
    verdict: str
    reason: str = ""
    accepted: tuple[str, ...] = ()
    elements: int = 0
    codes: int = 0
    scales: int = 0
    outputs: int = 0
    ulps: int = 0
    seconds: float = 0.0
    reproducer: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-serializable."""
        return {**asdict(self), "accepted": list(self.accepted)}


class Tally:
    """The findings of a case on one device, by the kind of what was computed, for each kind has its own acceptance."""

    def __init__(self, device: str) -> None:
        self.device, self.type = device, torch.device(device).type
        self.findings: dict[str, Finding] = {}
        self.culprits: dict[str, Call] = {}
        self.refusals: list[str] = []
        self.left: list[str] = []  # ops that the device's backend leaves to the reference
        self.calls = 0
        self.started = time.perf_counter()

    def check(self, call: Call) -> None:
        """Run a call and note how it went."""
        self.calls += 1
        if not has_kernel(call.op, self.type) and any(has_kernel(op, self.type) for op in OPS):
            self.left.append(call.op)
            return
        accepted = acceptance(call.kind, self.type)
        try:
            finding = compare(call, self.device, accepted)
        except BackendError as error:
            self.refusals.append(str(error))
            return
        self.add(call.kind, finding)
        if not finding.accepted(accepted):
            self.culprits[call.kind] = min(self.culprits.get(call.kind, call), call, key=lambda call: call.numbers)

    def add(self, kind: str, finding: Finding) -> None:
        """Note what was compared elsewhere."""
        self.findings[kind] = self.findings.get(kind, Finding()) + finding

    def result(self, name: str) -> Result:
        """What all of it comes to."""
        failed = [k for k, finding in self.findings.items() if not finding.accepted(acceptance(k, self.type))]
        total = sum(self.findings.values(), Finding())
        verdict, reason, reproducer = PASS, "", None
        if failed:
            verdict, reason = FAIL, total.message or f"not {acceptance(failed[0], self.type).name}: {failed[0]}"
            culprit = next((self.culprits[kind] for kind in failed if kind in self.culprits), None)
            reproducer = reproduce(name, culprit, self.device) if culprit else None
        elif self.refusals:
            verdict, reason = REFUSED, f"{len(self.refusals)} of {self.calls} calls: {self.refusals[0]}"
        elif self.left:
            verdict, reason = SKIPPED, f"the device's backend has no {self.left[0]}: the reference answers"
        return Result(
            name,
            verdict,
            reason,
            tuple(dict.fromkeys(acceptance(kind, self.type).name for kind in self.findings)),
            total.elements,
            total.codes,
            total.scales,
            total.outputs,
            total.ulps,
            time.perf_counter() - self.started,
            reproducer,
        )


@dataclass(frozen=True)
class Case:
    """Calls that are judged together.

    Attributes:
        name: what tables call it; unique.
        calls: makes them, of random numbers from the generator alone.
    """

    name: str
    calls: Callable[[torch.Generator], Iterator[Call]]

    def run(self, device: str = "cpu") -> Result:
        """Run it there, and by the reference. Two runs of a case compare the same numbers."""
        tally = Tally(device)
        with one_thread():
            calls = list(self.calls(generator(self.name)))
        for call in calls:
            tally.check(call)
        return tally.result(self.name)


def generator(name: str) -> torch.Generator:
    """Random numbers that depend on the name and nothing else."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))
