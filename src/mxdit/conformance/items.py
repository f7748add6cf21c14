"""The cases, lowest first: quantizers, dequantizing, products, whole linears, what lies between them, attention, a block."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache, partial
from itertools import product

import torch
from torch import Generator, Tensor

from mxdit.conformance import inputs
from mxdit.conformance.block import BlockCase
from mxdit.conformance.calls import Call, quantizing
from mxdit.conformance.case import Case
from mxdit.numerics.attention import METHODS
from mxdit.numerics.codec import Packed, encode
from mxdit.numerics.formats import FORMATS, SCHEMES, BlockFormat, Scheme

HALF = (torch.bfloat16, torch.float16)
DTYPES = (*HALF, torch.float32)
WAN_K = (5120, 13824)  # input features of Wan2.2-A14B's linears
SHAPES = (("Wan's K and 576", (*WAN_K, 576)), ("K = 96", (96,)))  # a group of 512 and a part of one; three scales
ROWS = ((48, 80), (1, 33))  # M and N
_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


# -- quantizers --------------------------------------------------------------------------------------------------------


def every_pattern(
    row: BlockFormat, rule: str, mode: str, smooth: bool, dtype: torch.dtype, g: Generator
) -> Iterator[Call]:
    """Each pattern as its block's maximum (dual level: as its group's), then each under larger ones, then in any order."""
    shape = (256, 256, 64) if row.outer else (2048, 1024)
    shuffled = inputs.every_pattern(dtype)[torch.randperm(1 << 16, generator=g)].view(32, 2048)
    first = inputs.as_maximum(dtype, 64 if row.outer else 32, g).view(shape)
    for x in (first, inputs.beside_maxima(dtype, g), shuffled):
        yield quantizing(x, row, rule, mode, inputs.multipliers(x.shape[-1], g) if smooth else None)


def fp32_patterns(row: BlockFormat, g: Generator) -> Iterator[Call]:
    tensors = [
        inputs.random_bits(g),
        inputs.thresholds(torch.float32, g),
        inputs.ties(torch.float32, row),
        inputs.special(torch.float32, g),
        inputs.activations(33, 1120, g),
    ]
    for rule, mode, x in product(row.rules, row.round_modes, tensors):
        yield quantizing(x, row, rule, mode)


def special_blocks(row: BlockFormat, g: Generator) -> Iterator[Call]:
    for dtype in HALF:
        tensors = [inputs.special(dtype, g), inputs.thresholds(dtype, g), inputs.ties(dtype, row)]
        for rule, mode, x in product(row.rules, row.round_modes, tensors):
            yield quantizing(x, row, rule, mode)
            if row.outer:
                yield quantizing(x, row, rule, mode, inputs.multipliers(x.shape[-1], g))


def wan_activations(row: BlockFormat, k: int, g: Generator) -> Iterator[Call]:
    for dtype, make in product(HALF, (inputs.gaussian, inputs.student_t, inputs.outlier_channels)):
        x = make(32, k, g).to(dtype)
        for rule in row.rules:
            yield quantizing(x, row, rule, "rint", inputs.multipliers(k, g) if row.outer else None)


def quantizers() -> Iterator[Case]:
    for row in FORMATS.values():
        for rule, mode, smooth in product(row.rules, row.round_modes, (False, True) if row.outer else (False,)):
            settings = f"{row.name} {'' if row.outer else f'{rule} '}{mode}{' with mul_scale' if smooth else ''}"
            default = (rule, mode) == (row.default_rule, row.round_modes[0])
            for dtype in HALF if default else HALF[:1]:
                name = f"quantize {settings}: every {_SHORT[dtype]}"
                yield Case(name, partial(every_pattern, row, rule, mode, smooth, dtype))
        if torch.float32 in row.inputs:
            yield Case(f"quantize {row.name}: fp32", partial(fp32_patterns, row))
        yield Case(f"quantize {row.name}: special blocks", partial(special_blocks, row))
        for k in WAN_K:
            yield Case(f"quantize {row.name}: K = {k}", partial(wan_activations, row, k))


# -- dequantizing ------------------------------------------------------------------------------------------------------


def every_code(row: BlockFormat, g: Generator) -> Iterator[Call]:
    codes = torch.arange(256).to(torch.uint8).repeat(256, 1)
    k = 256 * row.per_byte
    scale = torch.arange(256).to(torch.uint8)[:, None].repeat(1, row.blocks(k))
    outer = torch.exp2(torch.randn(256, row.groups(k), generator=g) * 20) if row.outer else None
    for dtype in DTYPES:
        yield Call("dequantize", {"codes": codes, "scale": scale, "outer": outer, "fmt": row.name, "dtype": dtype})


# -- products ----------------------------------------------------------------------------------------------------------


def multiply(a: Packed, w: Packed, bias: Tensor | None, out: torch.dtype) -> Call:
    """The call that multiplies packed activations with a packed weight."""
    if a.outer is not None:
        parts = {"a": a.codes, "w": w.codes, "a_l0": a.outer, "w_l0": w.outer, "a_l1": a.scale, "w_l1": w.scale}
        return Call("matmul_dual", {**parts, "bias": bias, "out": out})
    parts = {"a": a.codes, "a_scale": a.scale, "w": w.codes, "w_scale": w.scale, "bias": bias}
    return Call("matmul", {**parts, "a_fmt": a.fmt, "w_fmt": w.fmt, "out": out})


def weight(fmt: str, n: int, k: int, g: Generator) -> Packed:
    return encode((inputs.gaussian(n, k, g) * 0.02).to(torch.bfloat16), fmt)


def bias_like(n: int, dtype: torch.dtype, g: Generator) -> Tensor:
    """(N,) in this dtype; 16-bit ones hold what a checkpoint in bf16 would."""
    bias = torch.randn(n, generator=g)
    return bias if dtype is torch.float32 else bias.to(torch.bfloat16).to(dtype)


def products(scheme: Scheme, w_fmt: str, a_fmt: str, ks: tuple[int, ...], g: Generator) -> Iterator[Call]:
    for (m, n), k, out, biased in product(ROWS, ks, scheme.output_dtypes(w_fmt), (False, True)):
        a = encode(inputs.activations(m, k, g).to(torch.bfloat16), a_fmt)
        yield multiply(a, weight(w_fmt, n, k, g), bias_like(n, out, g) if biased else None, out)


def linears(scheme: Scheme, w_fmt: str, ks: tuple[int, ...], g: Generator) -> Iterator[Call]:
    rules = FORMATS["mxfp4"].rules if scheme.weights[w_fmt] == "mxfp4" else ("ocp",)
    smooth = (False, True) if FORMATS[w_fmt].smooths else (False,)
    settings = product(ROWS, ks, scheme.output_dtypes(w_fmt), rules, smooth, (False, True))
    for (m, n), k, dtype, rule, smoothed, biased in settings:
        if smoothed and rule != rules[0]:
            continue  # factors come before any rule
        w = weight(w_fmt, n, k, g)
        args = {
            "x": inputs.activations(m, k, g).to(dtype),
            **{"w": w.codes, "w_scale": w.scale, "w_dual": w.outer},
            "mul_scale": inputs.multipliers(k, g) if smoothed else None,
            "bias": bias_like(n, dtype, g) if biased else None,
            **{"scheme": scheme.name, "rule": rule, "layout": "packed"},
        }
        yield Call("linear", args)


# -- between linears ---------------------------------------------------------------------------------------------------


def gelus(dtype: torch.dtype, g: Generator) -> Iterator[Call]:
    if dtype is torch.float32:
        numbers = (inputs.random_bits(g), inputs.special(dtype, g), 4 * inputs.gaussian(33, 1120, g))
    else:
        numbers = (inputs.every_pattern(dtype),)
    for x in numbers:
        yield Call("gelu_", {"x": x})


def norms(op: str, dtype: torch.dtype, g: Generator) -> Iterator[Call]:
    """Rows of any length, with any weight or none, rounded before it or not; then heads that are turned."""
    rows = [
        inputs.special(dtype, g),
        *(inputs.activations(m, k, g).to(dtype) for m, k in ((48, 5120), (33, 45), (7, 1))),
    ]
    for x, rounded in product(rows, (False, True)):
        weight = 1 + inputs.gaussian(1, x.shape[-1], g)[0] / 4
        for given in (None, weight, weight.to(dtype)):
            args = {"x": x, "weight": given, "eps": 1e-6, "cos": None, "sin": None, "rounded": rounded}
            yield Call(op, args)
    for (*shape, heads, width), rounded in product(((2, 9, 3, 128), (2, 5, 4, 1, 80), (1, 33, 5, 6)), (False, True)):
        x = inputs.activations(math.prod(shape), heads * width, g).to(dtype)
        angles = 9 * inputs.gaussian(shape[1], width, g)
        args = {"x": x.view(*shape, -1), "weight": None if rounded else 1 + inputs.gaussian(1, x.shape[-1], g)[0] / 4}
        yield Call(op, {**args, "eps": 1e-5, "cos": angles.cos(), "sin": angles.sin(), "rounded": rounded})


# -- attention ---------------------------------------------------------------------------------------------------------


def attentions(method: str, dtype: torch.dtype, g: Generator) -> Iterator[Call]:
    """Parts of tiles and of blocks of keys, heads that share keys, every kind of mask; logits of several units, so that some
    keys matter more."""

    def call(
        queries: int, keys: int, heads: int, sources: int, width: int, v_width: int, mask: Tensor | None, causal: bool
    ) -> Call:
        q, k, v = (
            torch.randn(2, tokens, *axes, generator=g)
            for tokens, *axes in ((queries, heads, width), (keys, sources, width), (keys, sources, v_width))
        )
        k += torch.randn(sources, width, generator=g)  # which the mean takes away
        args = {"q": (2 * q).to(dtype), "k": k.to(dtype), "v": v.to(dtype), "mask": mask}
        return Call("attention", {**args, "scale": width**-0.5, "causal": causal, "method": method})

    yield call(37, 200, 2, 2, 128, 128, None, False)
    yield call(70, 90, 2, 2, 128, 128, None, True)
    yield call(1, 1, 2, 2, 128, 128, None, False)
    padding = torch.arange(131) < torch.tensor([101, 5])[:, None, None, None]
    yield call(70, 131, 4, 2, 40, 24, padding, False)
    some = torch.rand(2, 4, 33, 131, generator=g) < 0.3
    some[0, 1, 7] = False  # a query that sees no key
    yield call(33, 131, 4, 2, 40, 24, some, False)
    yield call(33, 131, 4, 2, 40, 24, torch.randn(1, 4, 33, 131, generator=g).where(some[:1], -math.inf), False)
    for name, value in product("qkv", (math.nan, math.inf, -math.inf)):
        bad = call(5, 70, 2, 1, 40, 24, None, False)
        bad.args[name][1, 3, 0, 2] = value
        yield bad


# -- all ---------------------------------------------------------------------------------------------------------------


@cache
def cases() -> tuple[Case | BlockCase, ...]:
    """Every case, in the order of the table."""
    values = (Case(f"dequantize {row.name}: every code", partial(every_code, row)) for row in FORMATS.values())
    pairs = [(scheme, w_fmt, a_fmt) for scheme in SCHEMES.values() for w_fmt, a_fmt in scheme.weights.items()]
    matmuls = (
        Case(f"matmul {scheme.name} {w_fmt}: {label}", partial(products, scheme, w_fmt, a_fmt, ks))
        for (scheme, w_fmt, a_fmt), (label, ks) in product(pairs, SHAPES)
        if a_fmt and FORMATS[a_fmt].outer == FORMATS[w_fmt].outer
    )
    whole = (
        Case(f"linear {scheme.name} {w_fmt}: {label}", partial(linears, scheme, w_fmt, ks))
        for (scheme, w_fmt, _), (label, ks) in product(pairs, SHAPES)
    )
    others = (
        *(Case(f"gelu_: {_SHORT[dtype]}", partial(gelus, dtype)) for dtype in DTYPES),
        *(
            Case(f"{op}: {_SHORT[dtype]}", partial(norms, op, dtype))
            for op, dtype in product(("rms_norm", "rms_norm_"), DTYPES)
        ),
        *(
            Case(f"attention {method}: {_SHORT[dtype]}", partial(attentions, method, dtype))
            for method, dtype in product(METHODS, DTYPES)
        ),
    )
    blocks = (BlockCase(w_fmt, scheme.activation) for scheme, w_fmt, _ in pairs)
    return (*quantizers(), *values, *matmuls, *whole, *others, *blocks)
