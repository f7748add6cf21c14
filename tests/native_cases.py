"""Cases for csrc/cpu/conformance: inputs, and what the reference in torch makes of them. Usage: native_cases.py FILE

The reference is called directly (`mxdit.numerics`), not through the ops, which may run
native kernels.

The file, little-endian: b"mxcases1"; u32 count of blobs, each u64 length and bytes; u32 count of records, each a name
(u32 length and bytes), u32 kind, its fields (u32 count, i64 each) and its blobs (u32 count, i32 indices, -1 for none).
A record's fields and blobs are those of its job (MxEncode, MxDecode, MxLinear, MxRmsNorm, MxGelu, MxAttention) in their
order, floats as their bits. All but products and attention have one right result. These have two, in the result's dtype,
and every number between them is right. Products: where their sum is exact in fp32 in any order, both are the reference's;
elsewhere they are the exact result minus and plus 2**-20 of the sum of magnitudes, rounded. Attention: in INT8 both are the
reference's; of method exact they are what docs/numerics.md section 9 leaves open.
"""

from __future__ import annotations

import itertools
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from mxdit.conformance.compare import inexact_attention
from mxdit.numerics import reference, rowwise
from mxdit.numerics.attention import METHODS
from mxdit.numerics.codec import Packed, decode, decode_blocks, element_values, encode
from mxdit.numerics.formats import E2M1, FLOATS, FORMATS, SCHEMES, Scheme
from mxdit.ops.attention import attention

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
FORMAT_IDS = {"mxfp4": 0, "mxfp4_dualscale": 0, "mxfp8": 1, None: 2}
RULES = {"ocp": 0, "uos": 1, "even6": 2, "even7": 3, "cublas": 4}
MODES = {"rint": 0, "round": 1, "floor": 2}
MASKS = {None: -1, torch.bool: 3, **DTYPES}
ENCODE, DECODE, LINEAR, RMS_NORM, GELU, ATTENTION = range(6)
TOLERANCE = 2.0**-20


class Cases:
    """The file being written. Equal blobs are stored once."""

    def __init__(self) -> None:
        self.blobs: dict[bytes, int] = {}
        self.records: list[bytes] = []
        self.outputs = self.exact = 0

    def add(self, name: str, kind: int, fields: Iterable[int], tensors: Iterable[Tensor | None]) -> None:
        indices = [-1 if t is None else self.blobs.setdefault(raw(t), len(self.blobs)) for t in tensors]
        numbers = [int(field) for field in fields]
        self.records.append(
            struct.pack("<I", len(name))
            + name.encode()
            + struct.pack(f"<II{len(numbers)}q", kind, len(numbers), *numbers)
            + struct.pack(f"<I{len(indices)}i", len(indices), *indices)
        )

    def write(self, path: Path) -> None:
        parts = [b"mxcases1", struct.pack("<I", len(self.blobs))]
        for blob in self.blobs:
            parts += struct.pack("<Q", len(blob)), blob
        parts += struct.pack("<I", len(self.records)), *self.records
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(parts))


def raw(t: Tensor) -> bytes:
    return t.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def strided(x: Tensor, stride: int) -> Tensor:
    """The memory of rows that lie ``stride`` apart, NaN between them and nothing behind the last."""
    rows, k = x.shape
    memory = torch.full((rows, stride), torch.nan, dtype=x.dtype)
    memory[:, :k] = x
    return memory.flatten()[: (rows - 1) * stride + k]


# -- numbers -----------------------------------------------------------------------------------------------------------


def every_pattern(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


def with_neighbours(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x >= 0, with the numbers of ``dtype`` just below and above, of either sign."""
    bits = x.to(dtype).view(BITS[dtype])
    near = torch.cat([bits, (bits - 1).clamp(min=0), bits + 1]).view(dtype)
    return torch.cat([near, -near])


def decision_points(element_max: float, values: list[float], dtype: torch.dtype) -> Tensor:
    """Blocks whose maximum is the element's, else filled with every number that rounding has to decide about."""
    grid = torch.tensor(sorted({v for v in values if v >= 0})).double()
    points = with_neighbours(torch.cat([grid, (grid[1:] + grid[:-1]) / 2]), dtype).float()
    points = points[points.abs() <= element_max]
    points = torch.cat([points, points.new_zeros(-len(points) % 31)]).view(-1, 31)
    block = torch.cat([points.new_full((len(points), 1), element_max), points], 1).flatten()
    low, high = {torch.float16: (-14, 7), torch.bfloat16: (-125, 119), torch.float32: (-125, 119)}[dtype]
    powers = torch.tensor([0, 1, -3, 7, low, low + 1, low + 3, low + 6, low + 9, high]).double()
    return (block * torch.exp2(powers)[:, None]).to(dtype)


def scale_thresholds(dtype: torch.dtype) -> Tensor:
    """Pairs whose larger number is about where a rule starts to choose the next scale, in every binade."""
    mantissas = torch.tensor([1, 1.25, 1.5, 1.75, 1.8125, 1.96875]).double()
    powers = torch.exp2(torch.arange(-149, 128).double())
    tops = with_neighbours((mantissas * powers[:, None]).flatten(), dtype).float()
    tops = tops[tops.isfinite()]
    return torch.stack([tops, tops * torch.rand(len(tops))], 1).to(dtype)


def ordinary(rows: int, k: int, dtype: torch.dtype, spread: float = 0.0) -> Tensor:
    """Gaussian, times a power of two per element whose exponent spreads so far."""
    return (torch.randn(rows, k) * torch.exp2((torch.randn(rows, k) * spread).round())).to(dtype)


def encoder_inputs(dtype: torch.dtype, fmt: str) -> Iterator[tuple[Tensor, list[tuple[str, str]]]]:
    """Matrices to encode, and with which rules and rounding modes: all, or all of either, or one."""
    row = FORMATS[fmt]
    one = [(row.default_rule, row.round_modes[0])]
    few = one + [(one[0][0], mode) for mode in row.round_modes[1:]]
    few += [(rule, one[0][1]) for rule in row.rules if rule != one[0][0]]
    every = list(itertools.product(row.rules, row.round_modes))
    torch.manual_seed(0)  # one matrix for all formats is one blob
    for k in (2, 30, 32, 34, 66, 510, 514, 1100):
        yield ordinary(3, k, dtype), every
    yield ordinary(7, 1056, dtype, 4), every
    yield ordinary(5, 544, dtype) * (1e-7 if dtype is torch.float16 else 2e-38), every  # subnormals
    special = ordinary(10, 1088, dtype)
    special[:8, ::97] *= torch.tensor([0.0, -0.0, torch.inf, torch.nan]).repeat(2)[:, None].to(dtype)
    special[4:8] = special[4:8].where(torch.rand(4, 1088) > 0.02, torch.tensor(-torch.inf, dtype=dtype))
    special[8:] *= 0
    yield special, every
    if dtype is torch.float32:
        yield torch.randint(-(1 << 31), 1 << 31, (24, 1024)).to(torch.int32).view(dtype), few
    else:
        yield every_pattern(dtype)[torch.randperm(1 << 16)].view(64, 1024), few
        yield every_pattern(dtype).view(64, 1024), few
    yield scale_thresholds(dtype), few
    yield ordinary(50 if dtype is torch.bfloat16 else 5, 2048, dtype, 1), one  # 50: enough for several threads
    element = row.element
    values = element_values(element) if element is E2M1 else element_values(element)[:127]
    yield decision_points(element.max, values, dtype), every
    if row.per_byte == 1:
        for k in (1, 31, 33, 65, 513, 1101):
            yield ordinary(3, k, dtype), every


def codec_cases(cases: Cases) -> None:
    for (fmt, row), dtype in itertools.product(FORMATS.items(), DTYPES):
        if dtype not in row.inputs:
            continue
        for i, (x, settings) in enumerate(encoder_inputs(dtype, fmt)):
            mul = (torch.rand(x.shape[1]) + 0.5).to(dtype) if i % 2 else None
            stride = x.shape[1] + (0, 1, 6)[i % 3]
            for rule, mode in settings:
                packed = encode(x if mul is None else x * mul, fmt, rule, mode)
                cases.add(
                    f"encode {fmt}",
                    ENCODE,
                    (*x.shape, stride, DTYPES[dtype], FORMAT_IDS[fmt], RULES[rule], MODES[mode]),
                    (
                        strided(x, stride),
                        None if mul is None else mul.float(),
                        packed.codes,
                        packed.scale,
                        packed.outer,
                    ),
                )
    bytes_ = torch.arange(256).to(torch.uint8)
    for fmt, row in FORMATS.items():
        every = torch.arange(256) if row.per_byte == 1 else torch.arange(16) * 16 + torch.arange(15, -1, -1)
        every = every.to(torch.uint8).repeat(256, 1)
        packed = [Packed(every, bytes_[:, None].repeat(1, row.blocks(every.shape[1] * row.per_byte)), None, fmt)]
        if row.outer:
            outer = torch.randint(0, 1 << 31, (256, 1)).to(torch.int32).view(torch.float32)
            outer[:4, 0] = torch.tensor([0.0, 1.0, torch.inf, 1e-40])
            packed = [Packed(every, torch.randint(100, 150, (256, 1)).to(torch.uint8), outer, fmt)]
        for k in (2, 66, 514, 1030) + (() if row.per_byte == 2 else (1, 33, 515)):
            packed.append(encode(ordinary(3, k, torch.bfloat16, 3), fmt))
        several_threads = encode(ordinary(50, 2048, torch.bfloat16), fmt)
        for p, dtype in [*itertools.product(packed, DTYPES), (several_threads, torch.bfloat16)]:
            rows, k = p.shape
            cases.add(
                f"decode {fmt}",
                DECODE,
                (rows, k, FORMAT_IDS[fmt], DTYPES[dtype]),
                (p.codes, p.scale, p.outer, decode(p, dtype)),
            )


# -- products ----------------------------------------------------------------------------------------------------------


def some_codes(rows: int, width: int, codes: tuple[int, ...] | None = None) -> Tensor:
    """Random bytes, or random pairs of these four-bit codes."""
    if codes is None:
        return torch.randint(0, 256, (rows, width)).to(torch.uint8)
    low, high = torch.tensor(codes)[torch.randint(0, len(codes), (2, rows, width))]
    return (low | high << 4).to(torch.uint8)


def lowest_bits(x: Tensor) -> Tensor:
    """By row: a power of two of which all its finite fp32 numbers are multiples."""
    mantissa, exponent = torch.frexp(x.nan_to_num(0, 0, 0).double())
    whole = (mantissa * 2.0**24).long()
    bits = torch.ldexp((whole & -whole).double(), exponent - 24)
    return bits.where(whole != 0, torch.inf).amin(-1).double()


def product_bounds(
    a: Tensor, w: Tensor, a_outer: Tensor | None, w_outer: Tensor | None, bias: Tensor | None, result: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The smallest and the largest right result, and where there is but one, from decoded fp32 operands."""
    m, n, k = a.shape[0], w.shape[0], a.shape[1]
    start = torch.zeros(m, n).double() if bias is None else bias.double().expand(m, n)
    total, magnitudes = start.clone(), start.abs()
    exact = torch.ones(m, n, dtype=torch.bool)
    width = k if w_outer is None else 512
    for g in range(-(-k // width)):
        left, right = a[:, g * width : (g + 1) * width].double(), w[:, g * width : (g + 1) * width].double()
        outer = torch.ones(m, n)
        if w_outer is not None:
            outer = w_outer[:, g].expand(m, n) * (1.0 if a_outer is None else a_outer[:, g, None])
        p, sizes = left @ right.T, left.abs() @ right.abs().T
        quantum = lowest_bits(left)[:, None] * lowest_bits(right)
        exact &= (sizes == 0) | ((sizes <= quantum * 2.0**24) & (quantum >= 2.0**-149) & (sizes < 2.0**127))
        total += p * outer.double()
        magnitudes += (sizes + k * 2.0**-149) * outer.double()
    slack = magnitudes * TOLERANCE + (k + 1) * 2.0**-149
    low, high = result.clone(), result.clone()
    open_ = ~exact & total.isfinite()
    limit = torch.finfo(result.dtype).max
    for bound, value in ((low, total - slack), (high, total + slack)):
        value = value.float()
        if w_outer is None and result.dtype is not torch.float32:
            value = value.clamp(-limit, limit)
        bound[open_] = value.to(result.dtype)[open_]
    inside = ((low <= result) & (result <= high)) | (result.isnan() & ~total.isfinite())
    assert inside.all(), "the reference is outside its own bounds: these inputs leave open what is right"
    return low, high, exact


def add_product(
    cases: Cases,
    name: str,
    scheme: Scheme,
    weight: Packed,
    out: torch.dtype,
    x: Tensor | None = None,
    packed: Packed | None = None,
    rule: str = "ocp",
    mul: Tensor | None = None,
    bias: Tensor | None = None,
    stride: int = 0,
) -> None:
    """A product of float activations x, encoded as the scheme says, or of packed ones."""
    activation = scheme.weights[weight.fmt]
    n, k = weight.shape
    a_outer = None
    if x is None:
        assert packed is not None
        a = decode_blocks(packed.codes, packed.scale, packed.format)
        rows = reference.packed_rows(packed.codes, packed.scale, packed.fmt)
        a_outer = packed.outer
    elif activation is None:
        a = (x if mul is None else x * mul.to(x.dtype)).float()
        rows = reference.float_rows(a)
    else:
        if weight.outer is not None and activation == weight.fmt:
            inner = encode(x, activation, None, "rint", mul)
        else:
            inner = encode(x if mul is None else x * mul.to(x.dtype), activation, rule, "rint")
        a = decode_blocks(inner.codes, inner.scale, inner.format)
        rows = reference.packed_rows(inner.codes, inner.scale, inner.fmt)
        a_outer = inner.outer
    w = decode_blocks(weight.codes, weight.scale, weight.format)
    columns = reference.packed_rows(weight.codes, weight.scale, weight.fmt)
    result = torch.empty(a.shape[0], n, dtype=out)
    if weight.outer is None:
        reference.matmul(rows, columns, k, bias, result)
    else:
        reference.matmul_groups(rows, columns, k, a_outer, weight.outer, bias, result)
    low, high, exact = product_bounds(a, w, a_outer, weight.outer, bias, result)
    cases.outputs += exact.numel()
    cases.exact += int(exact.sum())
    stride = stride or k
    cases.add(
        name,
        LINEAR,
        (
            *(a.shape[0], n, k, stride, 0 if x is None else DTYPES[x.dtype], FORMAT_IDS[activation], RULES[rule]),
            *(FORMAT_IDS[weight.fmt], DTYPES[out], a_outer is not None),
        ),
        (
            None if x is None else strided(x, stride),
            None if mul is None or x is None else mul.to(x.dtype).float(),
            *((None, None, None) if packed is None else (packed.codes, packed.scale, packed.outer)),
            weight.codes,
            weight.scale,
            weight.outer,
            bias,
            low,
            high,
        ),
    )


SHAPES = [(1, 1, 2), (3, 5, 66), (2, 16, 512), (7, 33, 1056), (13, 64, 512), (6, 32, 34), (21, 47, 1110)]
ODD_SHAPES = [(1, 1, 1), (3, 5, 65), (7, 33, 1055), (5, 17, 31), (4, 40, 513)]
BIG = (70, 100, 544)  # enough for several threads


def rules_of(activation: str | None) -> list[str]:
    return ["ocp"] if activation is None else list(FORMATS[activation].rules)


def ordinary_products(cases: Cases) -> None:
    for scheme in SCHEMES.values():
        for weight_format, activation in scheme.weights.items():
            name = f"{scheme.name} dual" if FORMATS[weight_format].outer else scheme.name
            shapes = SHAPES + [BIG] + (ODD_SHAPES if weight_format == "mxfp8" else [])
            rules = itertools.cycle(rules_of(activation))
            for i, (m, n, k) in enumerate(shapes):
                for dtype in scheme.output_dtypes(weight_format)[: 1 if (m, n, k) == BIG else 3]:
                    torch.manual_seed(i)  # one weight for all schemes, and one x
                    weight = encode(ordinary(n, k, torch.bfloat16) * 0.1, weight_format)
                    x = ordinary(m, k, dtype) * torch.exp2(torch.randint(-1, 2, (k,))).to(dtype)
                    mul = torch.rand(k) + 0.5 if weight.format.smooths and i % 2 else None
                    bias = torch.randn(n) if i % 3 else None
                    stride = k + (0, 1, 8)[i % 3]
                    add_product(cases, name, scheme, weight, dtype, x, None, next(rules), mul, bias, stride)
                    if activation is not None and (m, n, k) != BIG:
                        packed = encode(x, activation)
                        add_product(cases, name, scheme, weight, dtype, packed=packed, bias=bias)


def random_packed(
    rows: int,
    k: int,
    fmt: str,
    scales: tuple[int, ...],
    codes: tuple[int, ...] | None = None,
    rare: tuple[int, ...] = (),
) -> Packed:
    """Random codes and scale bytes; ``rare`` bytes in a few blocks."""
    row = FORMATS[fmt]
    values = some_codes(rows, k // row.per_byte, codes if row.per_byte == 2 else None)
    if row.per_byte == 1:
        values[(values & 127) == 127] = 0x38
        if codes is not None:  # magnitudes of 0.5 to 1.5, and zero
            values = torch.tensor([0, 0x80, 0x30, 0xB0, 0x38, 0xB8, 0x3C]).to(torch.uint8)[values.long() % 7]
    scale = torch.tensor(scales)[torch.randint(0, len(scales), (rows, row.blocks(k)))]
    if rare:
        chosen = torch.rand(scale.shape) < 0.15
        scale = scale.where(~chosen, torch.tensor(rare)[torch.randint(0, len(rare), scale.shape)])
    outer = torch.rand(rows, row.groups(k)) + 0.5 if row.outer else None
    return Packed(values, scale.to(torch.uint8), outer, fmt)


# Where the scales are near the ends of their range, results are not, so that no order of the sum makes it overflow.
SMALL_CODES = (0, 1, 2, 3, 8, 9, 10, 11)  # up to 1.5: finite under scale byte 254
SCALE_PAIRS = [  # scale bytes of activations and weights, the codes of either, rare scale bytes of either
    ((0, 1, 2), (150, 151, 152), None, None, (), ()),
    ((150, 151, 152), (0, 1, 2), None, None, (), ()),
    ((0, 1, 2), (112, 113), None, None, (), ()),
    ((112, 113), (0, 1, 2), None, None, (), ()),
    ((252, 253, 254), (20, 21), SMALL_CODES, None, (), ()),
    ((20, 21), (252, 253, 254), None, SMALL_CODES, (), ()),
    ((243, 244), (10, 11), None, None, (), ()),
    ((10, 11), (243, 244), None, None, (), ()),
    ((244, 245, 246), (10, 11), None, None, (), ()),
    ((10, 11), (244, 245, 246), None, None, (), ()),
    ((241, 243, 244), (10, 11), (7,), (7,), (), ()),
    ((10, 11), (241, 243, 244), (7,), (7,), (), ()),
    ((100, 101), (40, 41), None, None, (253, 254), ()),
    ((40, 41), (100, 101), None, None, (), (253, 254)),
    ((126, 127), (126, 127), None, None, (255,), ()),
    ((126, 127), (126, 127), None, None, (), (255,)),
    ((126, 127), (126, 127), (0, 8), None, (), ()),
    ((126, 127), (126, 127), None, (0, 8), (0, 255), (0, 1, 2)),
    ((126, 128), (126, 128), None, None, (0, 1, 2), ()),
    ((126, 128), (126, 128), None, None, (), (0, 1, 2)),
    ((120, 130, 140), (110, 127, 130), None, None, (), ()),
]


def special_products(cases: Cases) -> None:
    """Scales, codes and biases at the ends of their ranges."""
    for scheme in SCHEMES.values():
        for weight_format, activation in scheme.weights.items():
            if activation is None:
                continue
            name = f"{scheme.name} special"
            for i, (a_scales, w_scales, a_codes, w_codes, a_rare, w_rare) in enumerate(SCALE_PAIRS):
                for m, n, k in ((3, 19, 1056), (18, 35, 62)):
                    torch.manual_seed(i)
                    w = random_packed(n, k, weight_format, w_scales, w_codes, w_rare)
                    a = random_packed(m, k, activation, a_scales, a_codes, a_rare)
                    out = scheme.output_dtypes(weight_format)[i % len(scheme.output_dtypes(weight_format))]
                    add_product(cases, name, scheme, w, out, packed=a)
            for out in scheme.output_dtypes(weight_format):
                a, w = (random_packed(6, 576, f, (126, 127)) for f in (activation, weight_format))
                add_product(
                    cases, name, scheme, w, out, packed=a, bias=torch.tensor([1e5, -1e5, 3e38, -3e38, 65519, 0])
                )
                big = random_packed(6, 576, weight_format, (133, 137))
                add_product(cases, name, scheme, big, out, packed=a, bias=torch.tensor([-0.0, 1, 1e-40, 0, 2, 3]))
                if big.outer is not None:
                    big.outer[:, 0] = torch.tensor([0.0, torch.inf, torch.nan, 1e-40, 1e30, 1e-30])
                    add_product(cases, name, scheme, big, out, packed=a)
            if activation == "mxfp8":
                a = random_packed(4, 160, activation, (126, 127))
                a.codes[0, 3], a.codes[2, 159] = 0x7F, 0xFF
                w = random_packed(20, 160, weight_format, (126, 127))
                if weight_format == "mxfp8":
                    w.codes[5, 40] = 0xFF
                add_product(cases, name, scheme, w, torch.bfloat16, packed=a)
            for dtype in scheme.output_dtypes(weight_format):  # activations that are encoded on the way
                w = encode(ordinary(18, 1056, torch.bfloat16), weight_format)
                add_product(cases, name, scheme, w, dtype, special_floats(dtype), rule=rules_of(activation)[0])


def special_floats(dtype: torch.dtype) -> Tensor:
    x = ordinary(6, 1056, dtype)
    x[0, 40], x[1, 1000], x[2, 0] = torch.inf, torch.nan, -torch.inf
    x[3, :64], x[4] = 0, -0.0
    x[5] *= 2.0**-14 if dtype is torch.float16 else 2.0**-125
    return x


def float_products(cases: Cases) -> None:
    """W4A16 and W8A16: activations that stay floats."""
    schemes = [
        (scheme, w) for scheme in SCHEMES.values() for w, activation in scheme.weights.items() if activation is None
    ]
    for (scheme, weight_format), dtype in itertools.product(schemes, FLOATS):
        name = f"{scheme.name} special"
        for k in (1056, 90):
            w = random_packed(21, k, weight_format, (124, 127), None)
            add_product(cases, name, scheme, w, dtype, special_floats(dtype)[:, :k].contiguous())
            w = random_packed(21, k, weight_format, (124, 127), None, (255,))
            add_product(cases, name, scheme, w, dtype, ordinary(9, k, dtype))
        tiny = ordinary(7, 96, dtype) * (2.0**-16 if dtype is torch.float16 else 2.0**-127)
        for scales in ((100, 101), (127, 128), (150,)):
            add_product(cases, name, scheme, random_packed(5, 96, weight_format, scales), dtype, tiny)
        whole = torch.randint(-15, 16, (9, 1056)).to(dtype)
        add_product(cases, name, scheme, random_packed(35, 1056, weight_format, (126, 127)), dtype, whole)


# -- between linears and attention -------------------------------------------------------------------------------------


def rowwise_cases(cases: Cases) -> None:
    for dtype in DTYPES:
        every = ordinary(64, 1024, dtype, 4) if dtype is torch.float32 else every_pattern(dtype).view(64, 1024)
        for x in (every, special_floats(dtype), ordinary(1, 33, dtype), ordinary(1, 1, dtype)):
            cases.add("gelu", GELU, (x.numel(), DTYPES[dtype]), (x, rowwise.gelu(x)))
        for shape, rounded in itertools.product(((7, 1, 5), (70, 1, 1056), (1, 3, 31), (2, 40, 96)), (False, True)):
            weight, eps = torch.randn(shape[-1]), torch.rand(()) * 1e-3
            x = ordinary(shape[0] * shape[1], shape[2], dtype, 1)
            x[0, 0] = torch.nan if rounded else 3.0
            fields = (*x.shape, shape[-1], 1, 1, DTYPES[dtype], rounded, eps.view(torch.int32))
            out = rowwise.rms_norm(x, weight, eps.item(), rounded)
            cases.add("rms_norm", RMS_NORM, fields, (x, weight, None, None, out))
        for tokens, per_token, heads, width in ((9, 1, 5, 128), (3, 4, 1, 80), (5, 2, 3, 6)):
            x = ordinary(2 * tokens * per_token, heads * width, dtype)
            weight, (cos, sin) = torch.ones(heads * width), torch.randn(2, tokens, width).unbind(0)
            out = rowwise.rms_norm(x, weight, 0.0, False).view(2, tokens, per_token, -1)
            fields = (*x.shape, width, tokens, per_token, DTYPES[dtype], False, 0)
            cases.add("rotary", RMS_NORM, fields, (x, weight, cos, sin, rowwise.rotate(out, cos, sin)))


# -- attention ---------------------------------------------------------------------------------------------------------


def attention_bounds(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool, method: str
) -> tuple[Tensor, Tensor]:
    """The smallest and the largest right result: the reference's in INT8, what rounding leaves open where it is exact."""
    result = attention(q, k, v, mask, scale, causal, method)
    if method == "int8":
        return result, result
    keys, values = (x.double().repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    logits = torch.einsum("blhd,bshd->bhls", q.double(), keys) * scale
    if causal:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else logits + mask.double()
    unseen = (logits == -torch.inf).all(-1, keepdim=True)
    value = torch.einsum("bhls,bshe->blhe", logits.softmax(-1).masked_fill(unseen, 0.0), values)
    slack = inexact_attention(q, k, v, mask, scale, False, method)
    fixed = ~value.isfinite()
    low, high = (result.where(fixed, bound.float().to(q.dtype)) for bound in (value - slack, value + slack))
    assert (((low <= result) & (result <= high)) | (result.isnan() & value.isnan()) | fixed).all()
    return low, high


def attention_settings() -> Iterator[tuple[tuple[int, ...], Tensor | None, bool, float]]:
    """Batch, queries, keys, heads, heads of k, and both widths; a mask; whether it is causal; a number that is none."""
    shared = (2, 33, 131, 4, 2, 40, 24)
    for axes in (
        shared,
        (1, 70, 200, 1, 1, 128, 128),
        (1, 1, 1, 2, 1, 1, 1),
        (1, 97, 70, 1, 1, 30, 129),
        (2, 3, 0, 2, 2, 8, 8),
    ):
        yield axes, None, False, 0.0
    yield (1, 131, 90, 2, 2, 40, 24), None, True, 0.0
    yield shared, torch.arange(131) < torch.tensor([101, 5])[:, None, None, None], False, 0.0
    some = torch.rand(2, 4, 33, 131) < 0.3
    some[0, 1, 7] = False  # a query that sees no key
    yield shared, some, False, 0.0
    for dtype in DTYPES:
        added = torch.randn(1, 4, 33, 131).to(dtype)
        yield shared, added.masked_fill(~some[:1], -torch.inf), False, 0.0
        yield shared, added[0, 0, 0], False, 0.0
    for bad in (torch.inf, -torch.inf, torch.nan):
        yield (2, 9, 150, 2, 1, 36, 20), None, False, bad


def attention_cases(cases: Cases) -> None:
    for method, dtype in itertools.product(METHODS, DTYPES):
        for axes, mask, causal, bad in attention_settings():
            batch, queries, keys, heads, sources, width, v_width = axes
            q = (2 * torch.randn(batch, queries, heads, width)).to(dtype)
            k, v = (torch.randn(batch, keys, sources, d).to(dtype) for d in (width, v_width))
            k += torch.randn(sources, width).to(dtype)  # which INT8 takes away
            if bad:
                q[1, 1, 0, 1] = k[0, 5, 0, 1] = v[1, 9, 0, 1] = bad
            scale = torch.tensor(width**-0.5)
            low, high = attention_bounds(q, k, v, mask, scale.item(), causal, method)
            strides = (0, 0, 0, 0) if mask is None else mask.expand(batch, heads, queries, keys).stride()
            fields = (*axes, *strides, DTYPES[dtype], MASKS[None if mask is None else mask.dtype], causal)
            fields = (*fields, method == "int8", scale.view(torch.int32))
            cases.add(f"attention {method}", ATTENTION, fields, (q, k, v, mask, low, high))


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    cases = Cases()
    codec_cases(cases)
    ordinary_products(cases)
    special_products(cases)
    float_products(cases)
    rowwise_cases(cases)
    attention_cases(cases)
    cases.write(Path(sys.argv[1]))
    size = Path(sys.argv[1]).stat().st_size / 1e6
    print(
        f"{len(cases.records)} cases, {size:.1f} MB; of {cases.outputs} products {cases.exact} have one right result",
    )


if __name__ == "__main__":
    main()
