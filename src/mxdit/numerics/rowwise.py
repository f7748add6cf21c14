"""What lies between linears and attention, in plain torch: docs/numerics.md section 11.

Every operation is one of fp32, rounded by itself, so that torch gives the same bits on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 32  # sums that a row's squares are spread over

LOG2_E, LN2_HIGH, LN2_LOW = map(float.fromhex, ("0x1.715476p+0", "0x1.62e8p-1", "-0x1.e8082ep-16"))
EXP = tuple(
    map(
        float.fromhex,
        ("0x1.6a2434p-10", "0x1.1239e2p-7", "0x1.5558f2p-5", "0x1.555492p-3", "0x1.fffffcp-2", "0x1p+0", "0x1p+0"),
    )
)
SQRT_2_OVER_PI, CUBE = float.fromhex("0x1.988454p-1"), float.fromhex("0x1.6e4e26p-5")
SATURATED = 20.0  # where tanh(x/2) is 1 in fp32


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, rounded: bool) -> Tensor:
    """x (..., K) over the root mean square of its last axis, times weight (K), in x's dtype. `rounded`: to that dtype before
    the weight, too."""
    wide = x.float()
    sums = wide.new_zeros(*x.shape[:-1], LANES)
    for piece in torch.nn.functional.pad(wide, (0, -x.shape[-1] % LANES)).split(LANES, -1):
        sums = sums + piece * piece
    while sums.shape[-1] > 1:
        left, right = sums.chunk(2, -1)
        sums = left + right
    mean = sums / torch.full_like(sums, x.shape[-1])  # by a number, CUDA would multiply with its inverse
    root = (mean + eps).double().sqrt().float()  # torch's fp32 root may be off by a bit
    out = wide * (torch.ones_like(root) / root)
    if rounded:
        out = out.to(x.dtype).float()
    return (out if weight is None else out * weight.float()).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, L, ..., K) with each pair (2i, 2i + 1) of each D numbers turned by cos[:, 2i] and sin[:, 2i + 1] (L, D)."""
    a, b = x.float().unflatten(-1, (-1, cos.shape[-1] // 2, 2)).unbind(-1)
    cos, sin = (part.view(len(part), *(1,) * (x.dim() - 2), -1) for part in (cos[:, 0::2], sin[:, 1::2]))
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-3).to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    """x times (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2, in x's dtype."""
    wide = x.float()
    inner = SQRT_2_OVER_PI * (wide + CUBE * ((wide * wide) * wide))
    e = _exp((inner + inner).nan_to_num(0.0).clamp(-SATURATED, SATURATED))
    tanh = (e + e) / (e + 1.0) - 1.0
    return ((0.5 * wide) * (1.0 + tanh)).to(x.dtype)


def _exp(x: Tensor) -> Tensor:
    """e^x within 2e-7 of it, for x of magnitude 20 at most."""
    n = (x * LOG2_E).round()
    s = (x - n * LN2_HIGH) - n * LN2_LOW
    p = torch.full_like(s, EXP[0])
    for coefficient in EXP[1:]:
        p = p * s + coefficient
    return p * (n.int() + 127).bitwise_left_shift(23).view(torch.float32)
