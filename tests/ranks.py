"""What ranks of tensor parallelism compute, by docs/numerics.md 5.5: by the oracle, and without `mxdit.shard`.

A rank's channels are cut at the whole weight's multiples of 512, and each piece is quantized by itself. Inputs are such that
no order of a sum matters, which is asserted: every path and every backend must give each rank's result bit for bit.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

import mxdit
import oracle
from mxdit.bench.shapes import A14B, MINI, TI2V_5B
from mxdit.numerics.formats import FORMATS, SCHEMES

WIDTHS = sorted({layer.k for model in (A14B, TI2V_5B, MINI) for layer in model.layers})
DEGREES = (1, 2, 4, 8)
SPLITS = [(k, degree) for k in WIDTHS for degree in DEGREES if k % (32 * degree) == 0]
LINEARS = [
    (method, scheme.activation, smooth)
    for method, row in FORMATS.items()
    for scheme in SCHEMES.values()
    if method in scheme.weights
    for smooth in ((False, True) if row.smooths else (False,))
]
ROWS, OUTPUTS = 17, 6


# -- the definition ------------------------------------------------------------------------------------------------------


def quantum(x: np.ndarray) -> float:
    """The largest power of two that every number of x is a multiple of."""
    significand, exponent = np.frexp(x[x != 0])
    whole = np.ldexp(significand, 53).astype(np.int64)
    return float(np.ldexp((whole & -whole).astype(float), exponent - 53).min())


def exact_product(a: np.ndarray, w: np.ndarray) -> np.ndarray:
    """a @ w.T of numbers whose sums fit 24 bits in any order."""
    assert (abs(a) @ abs(w).T).max() <= 2.0**24 * quantum(a) * quantum(w), "the inputs of this test spread too far"
    return a @ w.T


def activation_of(
    x: np.ndarray, factors: np.ndarray | None, method: str, activation: str
) -> tuple[np.ndarray, np.ndarray]:
    """Values without an outer scale, and the outer scale (rows, 1), of channels that lie in one group."""
    one = np.ones((len(x), 1))
    if activation == "mxfp4" and method == "mxfp4_dualscale":
        codes, outer, byte = oracle.encode_dual(x, "rint", oracle.BF16, factors)
        return oracle.values(codes, byte, "mxfp4"), outer
    if factors is not None:
        x = oracle.to_float(x * factors, oracle.BF16)
    if activation == "bf16":
        return x, one
    codes, byte = oracle.encode(x, activation, "uos" if activation == "mxfp4" else "ocp", "rint", oracle.BF16)
    return oracle.values(codes, byte, activation), one


def defined(
    x: torch.Tensor,
    parts: dict[str, torch.Tensor],
    bias: torch.Tensor,
    method: str,
    activation: str,
    start: int,
    stop: int,
) -> torch.Tensor:
    """(M, N) bf16 of the rank that holds channels [start, stop) of x and the whole weight's ``parts``; 0 has the bias."""
    values, codes = x.double().numpy(), parts["weight"].numpy()
    codes = codes if method == "mxfp8" else oracle.unpack(codes)
    weight = oracle.values(codes, parts["weight_scale"].numpy(), method)
    factors = parts["mul_scale"].double().numpy() if "mul_scale" in parts else None
    first = bias.double().numpy() if start == 0 else np.zeros(len(weight))
    if method != "mxfp4_dualscale":
        held, _ = activation_of(
            values[:, start:stop], None if factors is None else factors[start:stop], method, activation
        )
        total = oracle.to_float(exact_product(held, weight[:, start:stop]) + first, oracle.FP32)
        return torch.from_numpy(oracle.to_float(total, oracle.BF16)).bfloat16()
    outer = parts["weight_dual_scale"].squeeze(-1).double().numpy()
    acc = np.broadcast_to(first, (len(values), len(weight)))
    for group in range(start // 512, -(-stop // 512)):
        piece = slice(max(start, group * 512), min(stop, (group + 1) * 512))
        held, level_0 = activation_of(values[:, piece], None if factors is None else factors[piece], method, activation)
        p = exact_product(held, weight[:, piece])
        acc = np.vectorize(oracle.fma)(p, oracle.to_float(level_0 * outer[:, group], oracle.FP32), acc)
    return torch.from_numpy(oracle.to_float(acc, oracle.BF16)).bfloat16()


# -- inputs --------------------------------------------------------------------------------------------------------------


def whole(method: str, k: int, smooth: bool, activation: str, n: int = OUTPUTS) -> dict[str, torch.Tensor]:
    """The tensors of a linear, quantized whole."""
    weight = torch.randn(n, k) * 0.1
    factors = torch.exp2(torch.randint(-1, 2, (k,))) if activation != "mxfp4" else torch.rand(k) + 0.5
    if method == "mxfp8":
        weight = torch.randint(-4, 5, (n, k)).float()
    return mxdit.quantize_weight(weight.bfloat16(), method, mul_scale=factors if smooth else None)


def inputs(k: int, activation: str, rows: int = ROWS) -> torch.Tensor:
    """Gaussian numbers whose groups differ; small whole ones where more than four bits of them are multiplied."""
    if activation != "mxfp4":
        return torch.randint(-7, 8, (rows, k)).bfloat16()
    return (torch.randn(rows, k) * torch.exp2(torch.arange(k) // 96 % 5)).bfloat16()


@cache
def case(method: str, activation: str, smooth: bool, k: int, n: int = OUTPUTS, rows: int = ROWS):
    torch.manual_seed(k)
    return inputs(k, activation, rows), whole(method, k, smooth, activation, n), torch.arange(n) - n / 2


@cache
def expected(method: str, activation: str, smooth: bool, k: int, degree: int) -> list[torch.Tensor]:
    """What each rank's result is, by the definition."""
    x, parts, bias = case(method, activation, smooth, k)
    width = k // degree
    return [defined(x, parts, bias, method, activation, r * width, (r + 1) * width) for r in range(degree)]
