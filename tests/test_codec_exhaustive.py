"""Everything there is: every code, every scale byte, every 16-bit pattern, against two independent oracles."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
import torch

import mxdit
import oracle
from agreement import assert_as_dual_oracle, assert_as_oracle, every_pattern, single_codes
from mxdit.numerics.formats import E2M1, E4M3, FORMATS

pytestmark = pytest.mark.slow

SETTINGS = [
    (fmt, rule, mode)
    for fmt in ("mxfp4", "mxfp8")
    for rule, mode in itertools.product(FORMATS[fmt].rules, FORMATS[fmt].round_modes)
]
setting = pytest.mark.parametrize(("fmt", "rule", "mode"), SETTINGS, ids=["-".join(case) for case in SETTINGS])


# -- every code and every scale byte -----------------------------------------------------------------------------------


def every_code(fmt: str) -> mxdit.Packed:
    """Row b holds every code of the format, once or more, in blocks of scale byte b."""
    if fmt == "mxfp4":
        pairs = torch.tensor([low | high << 4 for low, high in zip(range(0, 32, 2), range(1, 32, 2), strict=True)])
        codes = (pairs & 0xFF).to(torch.uint8).expand(256, 16)
    else:
        codes = torch.arange(256, dtype=torch.uint8).expand(256, 256)
    blocks = codes.shape[1] * FORMATS[fmt].per_byte // 32
    return mxdit.Packed(codes.contiguous(), torch.arange(256).to(torch.uint8)[:, None].repeat(1, blocks), None, fmt)


@pytest.mark.parametrize(("fmt", "twin"), [("mxfp4", ml_dtypes.float4_e2m1fn), ("mxfp8", ml_dtypes.float8_e4m3fn)])
def test_every_code_under_every_scale_byte_decodes(fmt, twin):
    packed = every_code(fmt)
    codes = single_codes(packed)
    decoded = mxdit.decode(packed, torch.float64).numpy()
    expected = oracle.values(codes, packed.scale.numpy(), fmt)
    expected = oracle.to_float(expected, oracle.FP32)  # the two top scales exceed fp32 and become inf
    expected[255] = np.nan
    np.testing.assert_array_equal(decoded, expected)
    np.testing.assert_array_equal(np.signbit(decoded[:255]), np.signbit(expected[:255]))

    elements = codes.view(twin).astype(np.float64)
    factors = packed.scale.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64).repeat(32, -1)[:, : codes.shape[1]]
    np.testing.assert_array_equal(decoded, oracle.to_float(elements * factors, oracle.FP32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_decoding_to_a_dtype_rounds_once(dtype):
    packed = every_code("mxfp4")
    decoded = mxdit.decode(packed, dtype)
    assert decoded.dtype is dtype
    torch.testing.assert_close(decoded, mxdit.decode(packed).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("fmt", "rule", "first"),
    [
        ("mxfp4", "ocp", 1),
        ("mxfp4", "even6", 1),
        ("mxfp4", "even7", 1),
        ("mxfp4", "uos", 2),
        ("mxfp8", "ocp", 1),
        ("mxfp8", "cublas", 0),
    ],
)
def test_every_code_survives_a_second_encoding(fmt, rule, first):
    """A block that holds the format's largest element decodes and encodes to itself, from the lowest scale a rule keeps.

    ``ocp`` and ``even`` flush blocks under byte 0; ``uos`` does not round its scale up below the normal numbers (byte 1).
    """
    packed = every_code(fmt)
    if fmt == "mxfp8":  # its two NaN codes encode nothing; every 32-block needs the maximum
        packed.codes[:, [127, 255]] = 0
        packed.codes[:, ::32] = 0x7E
    decoded = mxdit.decode(packed)
    finite = torch.isfinite(decoded).all(-1)
    assert int(finite.sum()) >= 245
    rows = finite.nonzero().squeeze(-1)[first:]
    again = mxdit.encode(decoded[rows], fmt, rule)
    assert torch.equal(again.scale, packed.scale[rows]) and torch.equal(again.codes, packed.codes[rows])


# -- every 16-bit pattern ----------------------------------------------------------------------------------------------

MAXIMA = [
    2.0**e * m
    for e in (-133, -130, -127, -126, -125, -124, -118, -60, -24, -14, -3, 0, 7, 15, 60, 126)
    for m in (1, 1.5)
]
MAXIMA += [1.75, 1.8125, 1.9921875, 2.0**127, 2.0**127 * 1.9921875, 448.0, 450.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@setting
def test_every_pattern_as_block_maximum(dtype, fmt, rule, mode):
    x = every_pattern(dtype)
    assert_as_oracle(torch.stack([x, torch.zeros_like(x)], -1), fmt, rule, mode)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@setting
def test_every_pattern_under_block_maxima(dtype, fmt, rule, mode):
    """Each block holds one maximum and 31 of all the patterns that do not exceed it."""
    x = every_pattern(dtype)
    for maximum in torch.tensor(MAXIMA, dtype=torch.float64).to(dtype).unique().tolist():
        if np.isfinite(maximum) and maximum > 0:
            fitting = x[x.abs() <= maximum]
            fitting = torch.nn.functional.pad(fitting, (0, -len(fitting) % 31)).view(-1, 31)
            top = torch.full((len(fitting), 1), maximum, dtype=dtype)
            assert_as_oracle(torch.cat([top, fitting], -1), fmt, rule, mode)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", FORMATS["mxfp4"].round_modes)
def test_every_pattern_in_the_dual_format(dtype, mode):
    """Each pattern as the maximum of its group, with half, a third and a thousandth of it in other blocks."""
    x = every_pattern(dtype)
    rows = torch.zeros(len(x), 68, dtype=dtype)
    rows[:, 0], rows[:, 33], rows[:, 34], rows[:, 66] = x, -x / 2, x / 3, x / 1000
    assert_as_dual_oracle(rows, mode)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", FORMATS["mxfp4"].round_modes)
def test_every_pattern_under_dual_group_maxima(dtype, mode):
    x = every_pattern(dtype)
    for maximum in (2.0**-131, 6 * 2.0**-126, 2.0**-14, 1.0, 1.1171875, 7.0, 65000.0, 2.0**126):
        top = torch.tensor(maximum, dtype=torch.float64).to(dtype)
        if 0 < float(top) < torch.inf:
            fitting = x[(x.abs() <= top) | ~torch.isfinite(x)]
            fitting = torch.nn.functional.pad(fitting, (0, -len(fitting) % 511)).view(-1, 511)
            assert_as_dual_oracle(torch.cat([fitting, top.expand(len(fitting), 1)], -1), mode)


@setting
def test_fp32_hard_cases(fmt, rule, mode):
    """Ties and their neighbors under many maxima; maxima around every rule's threshold; noise in the low half; subnormals."""
    grid = np.concatenate([oracle.GRIDS[fmt], (oracle.GRIDS[fmt][1:] + oracle.GRIDS[fmt][:-1]) / 2]).astype(np.float32)
    near = np.concatenate([np.nextafter(grid, np.float32(-1)), grid, np.nextafter(grid, np.float32(1e9))])
    thresholds = [m * s for m in (1.0, 1.5, 1.75, 1.8125) for s in (1, 1 + 2**-23, 1 - 2**-24, 1 + 2**-7, 1 + 2**-8)]
    rows = []
    for top in np.float32(thresholds) * np.float32(oracle.GRIDS[fmt][-1] / 1.75 if fmt == "mxfp8" else 4):
        body = np.pad(near, (0, -len(near) % 15)).reshape(-1, 15)
        pairs = np.concatenate([np.full((len(body), 1), top), body, -body, np.zeros((len(body), 1))], -1)
        rows += [(pairs * 2.0**e).astype(np.float32) for e in (-140, -130, -127, -126, -120, 0, 100)]
    generator = np.random.default_rng(7)
    noise = generator.integers(0, 2**32, (4000, 32), dtype=np.uint32)
    noise &= np.where(generator.random((4000, 1)) < 0.5, 0xFFFFFFFF, 0xBFFFFFFF).astype(np.uint32)
    rows.append(noise.view(np.float32))
    rows.append(
        (generator.standard_normal((4000, 32)) * np.exp2(generator.integers(-150, 120, (4000, 1)))).astype(np.float32)
    )
    assert_as_oracle(torch.from_numpy(np.concatenate(rows)), fmt, rule, mode)


def test_uos_is_the_least_power_of_two_that_fits():
    """For bf16 maxima the fp32 product says exactly ceil(log2(amax / 7.25)); in integers: 2**e * 29 >= 4 * amax."""
    x = every_pattern(torch.bfloat16)
    x = x[(x >= 2.0**-120) & torch.isfinite(x)]
    byte = mxdit.encode(x[:, None].expand(-1, 2), "mxfp4", "uos").scale.squeeze(-1).numpy().astype(int)
    scaled = x.double().numpy() * 4.0
    least = np.ldexp(29.0, byte - 127)
    assert (least >= scaled).all() and (least / 2 < scaled).all()


# -- ml_dtypes as a second oracle --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("fmt", "twin"), [("mxfp4", ml_dtypes.float4_e2m1fn), ("mxfp8", ml_dtypes.float8_e4m3fn)])
def test_ml_dtypes_agrees(dtype, fmt, twin):
    x = (torch.randn(4096, 32) * torch.exp2(torch.randint(-8, 9, (4096, 1)))).to(dtype)
    packed = mxdit.encode(x, fmt, "ocp")
    scale = packed.scale.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    scaled = np.clip(x.float().numpy() / scale, -FORMATS[fmt].max, FORMATS[fmt].max)
    np.testing.assert_array_equal(single_codes(packed), scaled.astype(twin).view(np.uint8))


@pytest.mark.parametrize(("element", "twin"), [(E2M1, ml_dtypes.float4_e2m1fn), (E4M3, ml_dtypes.float8_e4m3fn)])
def test_element_rows_say_what_ml_dtypes_says(element, twin):
    info = ml_dtypes.finfo(twin)
    assert (element.bits, element.mantissa, element.max) == (info.bits, info.nmant, float(info.max))
    assert element.emax == int(np.floor(np.log2(float(info.max)))) == info.maxexp - 1
    assert 2.0 ** (1 - element.bias) == float(info.smallest_normal)
