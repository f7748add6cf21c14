"""`encode(..., scales=)`: codes under scales that somebody else chose, against exact comparison."""

from __future__ import annotations

import itertools
import math
from bisect import bisect
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mxdit
from mxdit.errors import FormatError
from mxdit.numerics.codec import Scales, element_values
from mxdit.numerics.formats import FORMATS


def nearest_code(value: float, element) -> int:
    """The code whose value is nearest to `value`, ties to the even code, the sign of zero kept; by exact comparison."""
    values = element_values(element)
    half = len(values) // 2
    magnitudes = [v for v in values[:half] if v == v]  # which ascend
    wanted = min(abs(Fraction(value)), Fraction(magnitudes[-1]))
    above = bisect(magnitudes, wanted)  # Python compares fractions with floats exactly
    neighbours = range(len(magnitudes))[above - 1 : above + 1]
    code = min(neighbours, key=lambda i: (abs(Fraction(magnitudes[i]) - wanted), i % 2))
    return code + (half if math.copysign(1, value) < 0 else 0)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", FORMATS)
@settings(max_examples=25)
@given(data=st.data())
def test_codes_under_given_scales_are_the_nearest_ones(fmt, data):
    row = FORMATS[fmt]
    k = data.draw(st.sampled_from((2, 32, 34, 96, 512, 576)))
    x = torch.randn(2, k, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))).bfloat16()
    byte = torch.tensor(
        data.draw(st.lists(st.integers(120, 130), min_size=2 * row.blocks(k), max_size=2 * row.blocks(k)))
    )
    byte = byte.view(2, -1).to(torch.uint8)
    outer = None
    if row.outer:
        outer = torch.tensor(
            data.draw(
                st.lists(st.sampled_from((0.0, 0.5, 1.3)), min_size=2 * row.groups(k), max_size=2 * row.groups(k))
            )
        )
        outer = outer.view(2, -1)
    packed = mxdit.encode(x, fmt, scales=Scales(byte, outer))
    assert torch.equal(packed.scale, byte) and (outer is None or torch.equal(packed.outer, outer))
    single = packed.codes if row.per_byte == 1 else torch.stack((packed.codes & 15, packed.codes >> 4), -1).flatten(-2)
    for i, j in itertools.product(range(2), range(k)):
        value = float(x[i, j])
        if outer is not None:
            l0 = float(outer[i, j // row.outer]) or 1.0
            value = float((x[i, j].float() / torch.tensor(l0)).bfloat16())
        want = nearest_code(math.ldexp(value, 127 - int(byte[i, j // 32])), row.element)
        assert int(single[i, j]) == want


@pytest.mark.parametrize(("fmt", "rule"), [(fmt, rule) for fmt, row in FORMATS.items() for rule in row.rules])
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_under_the_scales_that_a_rule_chose_the_codes_are_the_rule_s(fmt, rule, dtype):
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    x = patterns[torch.randperm(65536)].view(64, 1024)  # infs, NaNs, zeros and subnormals included
    chosen = mxdit.encode(x, fmt, rule)
    again = mxdit.encode(x, fmt, rule, scales=chosen.scales)
    assert torch.equal(chosen.scale, again.scale)
    same = (chosen.codes == again.codes).view(*chosen.scale.shape, -1).all(-1)
    assert bool((same | (chosen.scale == 0)).all())
    if rule in ("uos", "cublas") or FORMATS[fmt].outer:
        assert bool(same.all())


@pytest.mark.parametrize("fmt", [fmt for fmt, row in FORMATS.items() if not row.outer])
def test_the_smallest_and_the_largest_scale_round_like_the_others(fmt):
    element = FORMATS[fmt].element
    for byte, size in ((0, 2.0**-126), (1, 2.0**-125), (253, 2.0**126), (254, 2.0**127)):
        x = (
            torch.tensor([size * step for step in (0.0, 0.25, 0.75, 1.0, 1.5, -0.5, -1.25, -1.75)])
            .repeat(4)
            .view(1, 32)
        )
        packed = mxdit.encode(x, fmt, scales=Scales(torch.tensor([[byte]], dtype=torch.uint8)))
        codes = (
            packed.codes if element.bits == 8 else torch.stack((packed.codes & 15, packed.codes >> 4), -1).flatten(-2)
        )
        want = [nearest_code(math.ldexp(value, 127 - byte), element) for value in x[0].tolist()]
        assert codes[0].tolist() == want


def test_scales_that_do_not_fit_are_refused():
    x = torch.ones(2, 64, dtype=torch.bfloat16)
    good = torch.full((2, 2), 127, dtype=torch.uint8)
    for fmt, scales, what in (
        ("mxfp4", Scales(good[:, :1]), "scales do not fit"),
        ("mxfp4", Scales(good.float()), "are bytes"),
        ("mxfp4", Scales(good, torch.ones(2, 1)), "has no outer scale"),
        ("mxfp4_dualscale", Scales(good), "needs an outer scale"),
        ("mxfp4_dualscale", Scales(good, torch.ones(2, 1).bfloat16()), "outer scales do not fit"),
    ):
        with pytest.raises(FormatError, match=what):
            mxdit.encode(x, fmt, scales=scales)
    broken = x.clone()
    broken[0, 40] = torch.nan
    packed = mxdit.encode(broken, "mxfp4", scales=Scales(good))
    assert packed.scale.tolist() == [[127, 0xFF], [127, 127]] and not packed.codes[0, 16:].any()
