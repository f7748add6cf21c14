"""What docs/numerics.md says, written a second time and in other words: real numbers in float64 and exact integers.

Nothing here calls mxdit. bf16, fp16 and fp32 values, and their products with powers of two, are exact in float64; the
few quotients and products that are not are rounded by `to_float`, whose input is then known to be good enough (a
float64 quotient of two fp32 numbers rounds to fp32 as the exact one does: 53 >= 2 * 24 + 2). Sums and multiply-adds
are done on `fractions.Fraction`.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

BLOCK = 32
GROUP = 512

E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E4M3 = np.array(
    [m * 2.0**-9 for m in range(8)] + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)][:-1]
)
GRIDS = {"mxfp4": E2M1, "mxfp4_dualscale": E2M1, "mxfp8": E4M3}
EMAX = {"mxfp4": 2, "mxfp4_dualscale": 2, "mxfp8": 8}


@dataclass(frozen=True)
class Float:
    """A binary float: significand bits, the exponents of its smallest and largest normal numbers."""

    bits: int
    low: int
    high: int


BF16 = Float(8, -126, 127)
FP16 = Float(11, -14, 15)
FP32 = Float(24, -126, 127)


def exponent(x: np.ndarray) -> np.ndarray:
    """floor(log2 |x|), exactly; 0 for 0."""
    return np.frexp(np.where(x == 0, 1.0, x))[1] - 1


def to_float(x: np.ndarray, kind: Float) -> np.ndarray:
    """x (float64) to the nearest number of that kind, ties to even; past the range, inf."""
    with np.errstate(invalid="ignore", over="ignore"):
        finite = np.isfinite(x)
        safe = np.where(finite, x, 0.0)
        quantum = np.ldexp(1.0, np.maximum(exponent(safe), kind.low) - kind.bits + 1)
        rounded = np.rint(safe / quantum) * quantum
        rounded = np.where(np.abs(rounded) >= 2.0 ** (kind.high + 1), np.copysign(np.inf, rounded), rounded)
        return np.where(finite, rounded, x)


def cut_to_bf16(x: np.ndarray) -> np.ndarray:
    """Magnitudes cut toward zero to eight significant bits (normal numbers only)."""
    quantum = np.ldexp(1.0, exponent(x) - 7)
    return np.floor(np.abs(x) / quantum) * quantum


def fraction_to_float(x: Fraction, kind: Float) -> float:
    """x to the nearest number of that kind, ties to even, in exact integers. No overflow handling."""
    if x == 0:
        return 0.0
    magnitude = abs(x)
    e = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if magnitude < Fraction(2) ** e:
        e -= 1
    scale = Fraction(2) ** (max(e, kind.low) - kind.bits + 1)
    return float((round(magnitude / scale) * scale) * (1 if x > 0 else -1))  # round() of a Fraction: ties to even


def codes_of(v: np.ndarray, grid: np.ndarray, mode: str) -> np.ndarray:
    """Codes of real numbers by comparison with the grid's midpoints; NaN is +0, out of range saturates."""
    a = np.abs(np.where(np.isnan(v), 0.0, v))
    negative = np.signbit(v) & ~np.isnan(v)
    middle = (grid[1:] + grid[:-1]) / 2
    below, at_most = np.searchsorted(middle, a, "left"), np.searchsorted(middle, a, "right")
    if mode == "rint":
        code = np.where(below == at_most, below, (below + 1) // 2 * 2)  # on midpoint i: the even one of i, i + 1
    elif mode == "round":
        code = at_most
    else:
        down, up = np.searchsorted(grid, a, "right") - 1, np.searchsorted(grid, a, "left")
        code = np.where(negative, up, down)
    code = np.minimum(code, len(grid) - 1)
    sign = 8 if len(grid) == 8 else 128
    return (code + np.where(negative, sign, 0)).astype(np.uint8)


def scale_of(amax: np.ndarray, fmt: str, rule: str, kind: Float) -> tuple[np.ndarray, np.ndarray]:
    """Byte and multiplier (float64) of blocks whose finite maximum is ``amax``; docs/numerics.md sections 2.2 to 2.5."""
    e = exponent(amax)
    if rule in ("uos", "cublas"):
        largest = 7.25 if rule == "uos" else 448.0
        s = to_float(amax * to_float(np.array(1.0 / largest), FP32), FP32)
        byte = exponent(s) + 127 + (s != np.ldexp(1.0, exponent(s)))  # up to the next power of two
        tiny = s < 2.0**-126
        byte = np.where(tiny, (s > 2.0**-127) if rule == "cublas" else 0, byte)
        empty = amax == 0
    else:
        field = np.where(amax < 2.0**-126, 0, e + 127)
        if rule != "ocp":
            a = to_float(amax, BF16) if kind is FP16 else cut_to_bf16(amax)
            field_a = np.where(a < 2.0**-126, 0, exponent(a) + 127)
            above = a > {"even6": 1.5, "even7": 1.75}[rule] * np.ldexp(1.0, exponent(a))
            field = np.where(field_a < 2, 0, field_a + above)
        byte = np.maximum(field - EMAX[fmt], 0)
        empty = byte == 0
    return byte.astype(np.int64), np.where(empty, 0.0, np.ldexp(1.0, 127 - byte))


def encode(x: np.ndarray, fmt: str, rule: str, mode: str, kind: Float) -> tuple[np.ndarray, np.ndarray]:
    """Single codes (rows, K) and bytes (rows, ceil(K/32)) of float64 x that holds numbers of ``kind``."""
    rows, k = x.shape
    blocks = np.pad(x, ((0, 0), (0, -k % BLOCK))).reshape(rows, -1, BLOCK)
    finite = np.isfinite(blocks).all(-1)
    amax = np.where(finite, np.abs(np.where(finite[..., None], blocks, 0.0)).max(-1), 0.0)
    byte, multiplier = scale_of(amax, fmt, rule, kind)
    v = np.where(finite[..., None], blocks, 0.0) * multiplier[..., None]
    v = to_float(v, BF16 if kind is BF16 else FP32)
    v = np.where(finite[..., None], v, np.nan)
    codes = codes_of(v, GRIDS[fmt], mode).reshape(rows, -1)[:, :k]
    return codes, np.where(finite, byte, 255).astype(np.uint8)


def encode_dual(
    x: np.ndarray, mode: str, kind: Float, mul_scale: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Single codes, level-0 scales (float64 holding fp32) and level-1 bytes; docs/numerics.md section 3.2."""
    rows, k = x.shape
    if mul_scale is not None:
        x = to_float(x * mul_scale, kind)
    width = GROUP if k > GROUP else k + -k % BLOCK  # zeros behind a single short group change nothing
    groups = np.pad(x, ((0, 0), (0, -k % width))).reshape(rows, -1, width)
    m = np.abs(np.where(np.isfinite(groups), groups, 0.0)).max(-1)
    l0 = to_float(m * to_float(np.array(1 / 6), FP32), FP32)
    l0 = np.where(l0 < 2.0**-126, 0.0, l0)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(groups == 0, groups, to_float(to_float(groups / l0[..., None], FP32), kind))
    blocks = t.reshape(rows, -1, BLOCK)
    finite = np.isfinite(blocks).all(-1)
    top = np.where(finite, np.abs(np.where(finite[..., None], blocks, 0.0)).max(-1), 0.0)
    field = np.where(top < 2.0**-126, 0, exponent(top) + 127)
    byte = np.maximum(field - 2, 0)
    multiplier = np.where(field == 0, 0.0, np.ldexp(1.0, 127 - byte))
    with np.errstate(invalid="ignore"):
        v = np.where(
            finite[..., None], to_float(blocks * multiplier[..., None], BF16 if kind is BF16 else FP32), np.nan
        )
    codes = codes_of(v, E2M1, mode).reshape(rows, -1)[:, :k]
    return codes, l0, np.where(finite, byte, 255).astype(np.uint8)[:, : -(-k // BLOCK)]


def values(codes: np.ndarray, byte: np.ndarray, fmt: str) -> np.ndarray:
    """float64 values of single codes (rows, K) and finite bytes, without an outer scale."""
    grid = np.concatenate([GRIDS[fmt], np.full(256 // 2 - len(GRIDS[fmt]), np.nan)]) if fmt == "mxfp8" else E2M1
    signed = np.concatenate([grid, -grid])
    return signed[codes] * np.ldexp(1.0, byte.astype(int).repeat(BLOCK, -1)[:, : codes.shape[1]] - 127)


def fma(p: float, s: float, acc: float) -> float:
    """fp32 p * s + acc with one rounding."""
    return fraction_to_float(Fraction(p) * Fraction(s) + Fraction(acc), FP32)


def dot(a: np.ndarray, w: np.ndarray, bias: float) -> float:
    """fp32 bias + a . w with one rounding."""
    return fraction_to_float(_dot(a, w) + Fraction(bias), FP32)


def dot_groups(a: np.ndarray, w: np.ndarray, a_outer: np.ndarray, w_outer: np.ndarray, bias: float) -> float:
    """fp32 dual-level sum of one output; docs/numerics.md section 4.3. Partial sums must be exact in fp32."""
    acc = bias
    for g in range(len(w_outer)):
        span = slice(g * GROUP, (g + 1) * GROUP)
        exact = _dot(a[span], w[span])
        p = fraction_to_float(exact, FP32)
        assert exact == Fraction(p), "the inputs of this test spread too far"
        acc = fma(p, fraction_to_float(Fraction(a_outer[g]) * Fraction(w_outer[g]), FP32), acc)
    return acc


def _dot(a: np.ndarray, w: np.ndarray) -> Fraction:
    return sum((Fraction(x) * Fraction(y) for x, y in zip(a.tolist(), w.tolist(), strict=True)), Fraction(0))


def unpack(codes: np.ndarray) -> np.ndarray:
    """Bytes of E2M1 pairs (rows, K/2) to single codes (rows, K), low nibble first."""
    return np.stack([codes % 16, codes // 16], -1).reshape(codes.shape[0], -1)
