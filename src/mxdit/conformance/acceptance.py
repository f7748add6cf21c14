"""How near a device has to come to the reference: the table of docs/numerics.md section 8, as data.

The reference is exact where its own result is the only right one, and so is the acceptance. Everything that is granted
beside that stands here, by what is computed and by the type of device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

FLOOR = 2.0**-20  # of the sum of magnitudes: what sums of another order may differ by, however much of them cancels


@dataclass(frozen=True)
class Acceptance:
    """What is taken for the reference's result. The defaults are: nothing else than that.

    Attributes:
        name: what tables call it.
        equal: the least share of codes, or of outputs, that are the reference's.
        ulps, relative: the others may be off by so many units in the last place of the reference's output, plus so much of
            its magnitude, plus `FLOOR` of the sum of the magnitudes of all that was added up; of attention, plus twice what
            docs/numerics.md section 9 grants its method ``exact`` beside rounding.
        mean: the largest sum of errors, relative to the sum of the reference's magnitudes.
        under_nan: whether codes under a scale of NaN count.
        inexact_quotients: whether the first quotient of the dual level may be one unit off, or zero where it is subnormal:
            then a level-1 scale may be one step off where that unit decides about it, and codes of subnormal quotients do
            not count.
    """

    name: str
    equal: float = 1.0
    ulps: float = 0.0
    relative: float = 0.0
    mean: float = math.inf
    under_nan: bool = True
    inexact_quotients: bool = False


EXACT = Acceptance("exact")
SUM = Acceptance("sum", equal=0.0, ulps=1)
SOFTMAX = Acceptance("softmax", equal=0.0, ulps=1, mean=2.0**-8)
LIVE = Acceptance("live codes", under_nan=False)
QUOTIENT = Acceptance("quotient", equal=0.9999, ulps=math.inf, under_nan=False, inexact_quotients=True)
ORDER = Acceptance("order", equal=0.999, ulps=1)
FP8_UNIT = Acceptance("fp8 unit", equal=0.0, relative=2.0**-7, mean=1e-4)
THROUGH_BF16 = Acceptance("through bf16", equal=0.0, relative=2.0**-7, mean=2.0**-8)
FEW_CODES = Acceptance("few codes", equal=0.0, ulps=math.inf, mean=2.0**-8)
BLOCK_4 = Acceptance("block 4", equal=0.0, ulps=math.inf, mean=2.0**-5)
BLOCK_8 = Acceptance("block 8", equal=0.0, ulps=math.inf, mean=2.0**-6)

_EVERYWHERE: Mapping[str, Acceptance] = {
    "codes": EXACT,
    "dual codes": EXACT,
    "values": EXACT,
    "product": EXACT,
    "product + bias": EXACT,
    "product + bias in fp32": EXACT,
    "dual product": EXACT,
    "dual linear": EXACT,
    "fp8 product": SUM,
    "w4a8 product in fp16": SUM,
    "float product": SUM,
    "attention": SOFTMAX,
    "int8 attention": EXACT,
    "norm": EXACT,
    "gelu": EXACT,
    "w4a4 block": BLOCK_4,
    "block": BLOCK_8,
}
_GRANTED: Mapping[str, Mapping[str, Acceptance]] = {
    # All that a block does beside its linears is torch's, and so the same on both sides.
    "cpu": {"w4a4 block": EXACT},
    "npu": {
        "codes": LIVE,  # choices 2 and 3
        "dual codes": QUOTIENT,  # choice 4
        "product + bias": ORDER,  # section 9: the bias is loaded into the accumulator first
        "product + bias in fp32": SUM,
        "dual product": ORDER,  # choices 6 and 7
        "dual linear": FEW_CODES,  # choice 4: a code that differs is a product that differs
        "fp8 product": FP8_UNIT,  # choice 7
        "w4a8 product in fp16": THROUGH_BF16,  # docs/ascend.md: bf16 is what the operator gives, and takes of the bias
    },
}


def acceptance(kind: str, device: str) -> Acceptance:
    """What is accepted of this kind of result on this type of device."""
    return _GRANTED.get(device, {}).get(kind) or _EVERYWHERE[kind]
