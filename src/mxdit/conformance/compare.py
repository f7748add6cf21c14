"""`Finding`: how a device's results differ from the reference's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mxdit.backends.environment import one_thread
from mxdit.conformance.acceptance import FLOOR, Acceptance
from mxdit.conformance.calls import Call
from mxdit.errors import BackendError, MXDiTError
from mxdit.numerics.formats import FORMATS

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@dataclass(frozen=True)
class Finding:
    """What one comparison found; the findings of several add up.

    Attributes:
        elements: codes or outputs compared.
        codes: codes that differ.
        scales: scales that differ, E8M0 bytes and fp32.
        outputs: outputs that differ.
        ulps: the largest difference of an output, in units in the last place of its dtype.
        wrong: codes, scales and outputs that are further off than the acceptance lets any be.
        error, size: sums of the outputs' errors, and of the reference's finite magnitudes.
        message: what the op raised, or what is wrong with the shape or dtype of a result; None where it could be compared.
    """

    elements: int = 0
    codes: int = 0
    scales: int = 0
    outputs: int = 0
    ulps: int = 0
    wrong: int = 0
    error: float = 0.0
    size: float = 0.0
    message: str | None = None

    def __add__(self, other: Finding) -> Finding:
        counts = ("elements", "codes", "scales", "outputs", "wrong", "error", "size")
        sums = {name: getattr(self, name) + getattr(other, name) for name in counts}
        return Finding(**sums, ulps=max(self.ulps, other.ulps), message=self.message or other.message)

    def accepted(self, acceptance: Acceptance) -> bool:
        """Whether all of it together is within the acceptance."""
        differing = self.codes + self.outputs
        return (
            self.message is None
            and not self.wrong
            and differing <= (1 - acceptance.equal) * self.elements
            and (acceptance.mean == math.inf or self.error <= acceptance.mean * self.size)
        )


def compare(call: Call, device: str, acceptance: Acceptance) -> Finding:
    """Run a call on the device and by the reference. A BackendError, which is the device's refusal, goes through."""
    expected = call.expected()
    try:
        got = call.on(device)
    except BackendError:
        raise
    except (RuntimeError, MXDiTError) as error:
        return Finding(message=f"{type(error).__name__}: {error}")
    for name, ours, theirs in zip(call.outputs, got, expected, strict=True):
        if ours.shape != theirs.shape or ours.dtype is not theirs.dtype:
            message = f"{name} is {tuple(ours.shape)} {ours.dtype} instead of {tuple(theirs.shape)} {theirs.dtype}"
            return Finding(message=message)
    with one_thread():
        if "codes" in call.outputs:
            return _compare_codes(call, got, expected, acceptance)
        return compare_values(got[0], expected[0], lambda: bound(call, expected[0], acceptance), call.signed_zeros)


def bound(call: Call, expected: Tensor, acceptance: Acceptance) -> Tensor:
    """How far off each output may be, in fp64; 0 where nothing else is accepted."""
    if acceptance.equal == 1:
        return torch.zeros(expected.shape, dtype=torch.float64)
    rounding = acceptance.ulps * _ulp(expected) + acceptance.relative * expected.double().abs()
    if call.op == "attention":
        return rounding + 2 * inexact_attention(**call.args)
    return rounding + FLOOR * call.unsigned().expected()[0].double()


def inexact_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool, method: str
) -> Tensor:
    """What docs/numerics.md section 9 grants method ``exact`` beside a rounding of the result: (B, L, H, E) in fp64."""
    half = q.dtype is torch.bfloat16
    q, k, v = q.double(), *(x.double().repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    logits = torch.einsum("blhd,bshd->bhls", q, k) * scale
    off = torch.einsum("blhd,bshd->bhls", q.abs(), k.abs()) * (abs(scale) * 2.0**-20)
    if causal:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    if mask is not None and mask.dtype is not torch.bool:
        off = off + mask.double().abs() * 2.0**-22
        logits = logits + mask.double()
    elif mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    weights = logits.softmax(-1).nan_to_num(0.0)
    off = off.masked_fill(~off.isfinite(), 0.0)  # of logits that are not: their weights are 0, or the row is NaN
    off = F.pad(off, (0, 1)).amax(-1, keepdim=True) + 2.0**-18 + (2.0**-8 if half else 0.0)
    return 2 * torch.einsum("bhls,bshe->blhe", off * weights, v.abs())


def compare_values(
    got: Tensor, expected: Tensor, allowed: Callable[[], Tensor | float], signed_zeros: bool = False
) -> Finding:
    """Compare outputs. All NaNs are the same, and so are both zeros unless their sign counts.

    ``allowed`` says how far off those may be that differ; it is asked where any does.
    """
    same = (got == expected) & ~(signed_zeros & (got.signbit() != expected.signbit()))
    same |= got.isnan() & expected.isnan()
    size = float(expected.double().abs().nan_to_num(0.0, 0.0, 0.0).sum())
    if bool(same.all()):
        return Finding(expected.numel(), size=size)
    error = (got.double() - expected.double()).abs().masked_fill(same, 0.0)
    return Finding(
        elements=expected.numel(),
        outputs=int((~same).sum()),
        ulps=int((_ordinal(got) - _ordinal(expected)).abs().max()),
        wrong=int((~same & ~(error <= allowed())).sum()),
        error=float(error.sum()),
        size=size,
    )


def _compare_codes(
    call: Call, got: tuple[Tensor, ...], expected: tuple[Tensor, ...], acceptance: Acceptance
) -> Finding:
    row = FORMATS[call.args.get("fmt", "mxfp4_dualscale")]
    differ = got[0] ^ expected[0]
    if row.per_byte == 2:
        differ = torch.stack((differ & 15, differ >> 4), -1).flatten(-2)
    differ = differ != 0
    scales = wrong = got[-1] != expected[-1]
    if not acceptance.under_nan:
        differ &= (expected[-1] != 0xFF).repeat_interleave(row.block, -1)[..., : differ.shape[-1]]
    if acceptance.inexact_quotients:
        quotients = _quotients(call, expected[1])
        differ &= (quotients == 0) | ~(quotients.abs() < torch.finfo(torch.float32).tiny)
        wrong = scales & ~_one_step(quotients.to(call.args["x"].dtype), got[-1], expected[-1])
    outer = 0 if row.outer is None else int((got[1].view(torch.int32) != expected[1].view(torch.int32)).sum())
    return Finding(differ.numel(), int(differ.sum()), int(scales.sum()) + outer, wrong=int(wrong.sum()) + outer)


def _quotients(call: Call, l0: Tensor) -> Tensor:
    """What level 0 leaves of x, in fp32, before it is rounded to x's dtype; docs/numerics.md section 3.2."""
    x, mul_scale = call.args["x"], call.args["mul_scale"]
    if mul_scale is not None:
        x = x * mul_scale.to(x.dtype)
    return x.float() / l0.repeat_interleave(512, -1)[..., : x.shape[-1]]


def _one_step(quotients: Tensor, got: Tensor, expected: Tensor) -> Tensor:
    """Where a level-1 scale is the one of a block whose largest quotient, rounded, is one unit larger or smaller."""
    largest = F.pad(quotients.abs(), (0, -quotients.shape[-1] % 32)).unflatten(-1, (-1, 32)).amax(-1).view(torch.int16)
    reached = torch.zeros_like(got, dtype=torch.bool)
    for step in (-1, 1):
        exponent = ((largest + step).view(quotients.dtype).float().view(torch.int32) >> 23) & 0xFF
        reached |= got == (exponent - 2).clamp_min(0)
    return reached & (expected != 0xFF)


def _ordinal(x: Tensor) -> Tensor:
    """Whole numbers that count the values of a float dtype upward, both zeros alike; NaNs lie beyond infinity."""
    x = x.masked_fill(x.isnan(), torch.nan)
    bits = x.view(BITS[x.dtype]).long()
    return torch.where(bits < 0, -(bits & torch.iinfo(BITS[x.dtype]).max), bits)


def _ulp(x: Tensor) -> Tensor:
    """The distance of a value of a float dtype from the next larger one of its binade, in fp64."""
    info = torch.finfo(x.dtype)
    binade = torch.exp2(torch.frexp(x.double()).exponent.double() - 1)
    return info.eps * binade.clamp_min(info.smallest_normal)
