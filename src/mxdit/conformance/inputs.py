"""Numbers to compare: every pattern of a dtype, thresholds, special blocks, and what activations and weights look like."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mxdit.conformance.compare import BITS
from mxdit.numerics.codec import element_values
from mxdit.numerics.formats import BlockFormat

_MANTISSAS = (1.0, 1.25, 1.5, 1.75, 1.8125, 1.96875)  # where the scale rules change their mind, and between


def every_pattern(dtype: torch.dtype) -> Tensor:
    """All numbers of a 16-bit dtype, (65536,), neighbours beside each other."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


def as_maximum(dtype: torch.dtype, width: int, g: Generator) -> Tensor:
    """Every pattern as the largest of ``width`` numbers, somewhere among them: (65536, width)."""
    every = every_pattern(dtype)
    fractions = 2 * torch.rand(len(every), width, generator=g) - 1
    fractions *= torch.exp2(-torch.randint(0, 5, fractions.shape, generator=g).float())
    x = (every.float().nan_to_num(1.0, 1.0, 1.0)[:, None] * fractions).to(dtype)
    places = (torch.arange(len(every)) % width)[:, None]
    x.view(torch.int16).scatter_(1, places, every.view(torch.int16)[:, None])  # as bits, which keeps every NaN
    return x


def beside_maxima(dtype: torch.dtype, g: Generator) -> Tensor:
    """Every pattern in blocks of 32 under 48 larger numbers, from as large as it to 2**8 times: (rows, 512), each row of one
    stretch of patterns."""
    every = every_pattern(dtype)
    stretches = F.pad(every, (0, -len(every) % 31)).view(-1, 1, 31)
    largest = stretches.float().abs().nan_to_num(1.0, 1.0).amax(-1, keepdim=True)
    tops = largest * (torch.exp2(torch.arange(8.0))[:, None] * torch.tensor(_MANTISSAS)).view(1, 48, 1)
    tops = tops.clamp(max=torch.finfo(dtype).max) * _signs(tops.shape, g)
    return torch.cat([tops.to(dtype), stretches.expand(-1, 48, -1)], -1).reshape(-1, 512)


def thresholds(dtype: torch.dtype, g: Generator) -> Tensor:
    """Pairs in blocks of 32 of which the larger is about where a rule takes the next scale, in every binade."""
    info = torch.finfo(dtype)
    least = round(torch.log2(torch.tensor(info.smallest_normal * info.eps)).item())
    powers = torch.exp2(torch.arange(least, 128).double())
    tops = _neighbours((torch.tensor(_MANTISSAS).double() * powers[:, None]).flatten(), dtype)
    tops = tops[tops.isfinite()]
    blocks = torch.zeros(len(tops), 32, dtype=dtype)
    blocks[:, 5] = tops
    blocks[:, 30] = (tops.double() * torch.rand(len(tops), generator=g).double()).to(dtype)
    return _rows(blocks, 512)


def ties(dtype: torch.dtype, row: BlockFormat) -> Tensor:
    """Blocks of 32 of every number that rounding to the element decides about, in some binades."""
    grid = torch.tensor(element_values(row.element)[: 1 << (row.bits - 1)]).double()
    grid = grid[grid.isfinite()]
    points = _neighbours(torch.cat([grid, (grid[1:] + grid[:-1]) / 2]), dtype)
    points = F.pad(points[points.abs() <= row.max], (0, -int((points.abs() <= row.max).sum()) % 31)).view(-1, 31)
    blocks = torch.cat([torch.full((len(points), 1), row.max), points.float()], -1)
    low, high = (-14, 7) if dtype is torch.float16 else (-125, 119)
    powers = torch.exp2(torch.tensor([0.0, 1, -3, 7, low, low + 1, low + 3, low + 6, low + 9, high]).double())
    return _rows((blocks.flatten() * powers[:, None]).to(dtype).view(-1, 32), 512)


def special(dtype: torch.dtype, g: Generator) -> Tensor:
    """Zeros, infinities, NaNs, saturation, subnormals, and groups whose level-0 scale is flushed: (16, 1088)."""
    info = torch.finfo(dtype)
    x = gaussian(16, 1088, g)
    x[0], x[1] = 0.0, -0.0
    x[2, ::3], x[3, ::2] = 0.0, -0.0
    x[4, 40], x[5, 1000], x[6, 7], x[7, 64:96] = torch.inf, -torch.inf, torch.nan, torch.nan
    x[8, :512], x[9, 600] = torch.inf, torch.inf
    x[10] = info.max * x[10].sign()
    x[11] *= info.smallest_normal
    x[12] *= info.smallest_normal * 2**-5
    x[13] *= info.smallest_normal * 2  # about where the level-0 scale becomes subnormal
    x[13, 512:] *= 4
    x[14] *= info.smallest_normal
    x[14, 3] = 1.0
    x[15] = x[15].sign() * info.smallest_normal * info.eps
    return x.clamp(-info.max, info.max).where(x.isfinite(), x).to(dtype)


def random_bits(g: Generator) -> Tensor:
    """fp32 numbers of all sizes, infinities and NaNs among them: (256, 1024)."""
    return torch.randint(-(1 << 31), 1 << 31, (256, 1024), generator=g).to(torch.int32).view(torch.float32)


def gaussian(rows: int, k: int, g: Generator) -> Tensor:
    """fp32 (rows, K)."""
    return torch.randn(rows, k, generator=g)


def student_t(rows: int, k: int, g: Generator) -> Tensor:
    """fp32 (rows, K) of Student's t with 3 degrees of freedom: every block has numbers far from the others."""
    return gaussian(rows, k, g) / torch.randn(3, rows, k, generator=g).square_().mean(0).sqrt_()


def outlier_channels(rows: int, k: int, g: Generator) -> Tensor:
    """fp32 (rows, K): channels of different sizes, one in 200 of them 30 times as large again."""
    sizes = torch.exp2(0.5 * torch.randn(k, generator=g))
    sizes[torch.rand(k, generator=g) < 1 / 200] *= 30
    return gaussian(rows, k, g) * sizes


def activations(rows: int, k: int, g: Generator) -> Tensor:
    """fp32 (rows, K), of the three kinds in turn."""
    kinds = [make(-(-rows // 3), k, g) for make in (gaussian, student_t, outlier_channels)]
    return torch.stack(kinds, 1).flatten(0, 1)[:rows]


def multipliers(k: int, g: Generator) -> Tensor:
    """A mul_scale: (K,) fp32 that hold bf16 numbers about 1."""
    return torch.exp2(torch.randn(k, generator=g)).to(torch.bfloat16).float()


def _neighbours(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers of the dtype and those just below and above, of either sign."""
    bits = x.to(dtype).view(BITS[dtype])
    near = torch.cat([bits, (bits - 1).clamp(min=0), bits + 1]).view(dtype)
    return torch.cat([near, -near])


def _signs(shape: torch.Size, g: Generator) -> Tensor:
    return 2.0 * torch.randint(0, 2, shape, generator=g) - 1


def _rows(blocks: Tensor, k: int) -> Tensor:
    """Blocks (..., 32) in rows of K, zeros behind the last."""
    flat = blocks.flatten()
    return F.pad(flat, (0, -len(flat) % k)).view(-1, k)
