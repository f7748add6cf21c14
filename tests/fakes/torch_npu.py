"""A fake of torch_npu: the parts that MX inference on an Ascend 950 uses, strict and exact.

The device is `npu_device`, the operators are `npu_operators`; `npu_device.state` says what machine it is, which
operators are missing, and what was called.
"""

from __future__ import annotations

from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import npu_operators
from npu_device import FORMAT_ND, FORMAT_NZ, npu, state
from npu_operators import FLOAT4_E1M2 as float4_e1m2fn_x2
from npu_operators import FLOAT4_E2M1 as float4_e2m1fn_x2
from npu_operators import FLOAT8_E4M3FN as float8_e4m3fn
from npu_operators import FLOAT8_E5M2 as float8_e5m2
from npu_operators import FLOAT8_E8M0FNU as float8_e8m0fnu
from npu_operators import HIFLOAT8 as hifloat8
from npu_operators import INT4 as int4

__version__ = "2.14.0"
__all__ = [
    "Format",
    "float4_e1m2fn_x2",
    "float4_e2m1fn_x2",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e8m0fnu",
    "hifloat8",
    "int4",
    "npu",
    "state",
    "utils",
]


class Format(IntEnum):
    """The storage formats that an Ascend 950 converts between."""

    ND = FORMAT_ND
    FRACTAL_NZ = FORMAT_NZ


utils = SimpleNamespace(get_cann_version=lambda module="CANN": state.cann)


def __getattr__(name: str) -> Any:
    """The operators, as far as this torch_npu has them."""
    if name in npu_operators.OPERATORS and name not in state.missing:
        return npu_operators.OPERATORS[name]
    raise AttributeError(f"module 'torch_npu' has no attribute {name!r}")
