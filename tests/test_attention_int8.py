"""Attention in INT8 (docs/numerics.md section 10): against exact arithmetic, float64, itself on every path."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache

import pytest
import torch

from mxdit.backends import native
from mxdit.backends.environment import one_thread
from mxdit.numerics.attention import KEYS, exp2

OPS = torch.ops.mxdit
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PLACES = (  # batch, queries, keys, heads, heads of k, width, width of v
    (1, 5, 7, 1, 1, 8, 8),
    (2, 70, 131, 4, 2, 40, 24),
    (1, 33, 64, 2, 1, 128, 128),
    (1, 64, 300, 1, 1, 67, 33),
    (1, 1, 65, 2, 2, 256, 1),
    (1, 3, 640, 1, 1, 1, 130),
)


def inputs(place, dtype):
    """q, k, v as models have them: k's channels have means, one of v is nearly nothing."""
    batch, queries, keys, heads, sources, width, v_width = place
    q = torch.randn(batch, queries, heads, width) * 2
    k = torch.randn(batch, keys, sources, width) + 3 * torch.randn(sources, width)
    v = torch.randn(batch, keys, sources, v_width) * torch.logspace(-30, 0, v_width, 2)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def masks(place):
    batch, queries, keys, heads = place[:4]
    padding = torch.arange(keys) < torch.randint(1, keys + 1, (batch, 1, 1, 1))
    return {
        "none": None,
        "causal": None,
        "keys": padding,
        "blocks": (torch.arange(keys) // KEYS % 2 == 1).expand(queries, keys),  # or no key at all
        "half": torch.rand(batch, heads, queries, keys) > 0.5,
        "added": torch.zeros(batch, 1, 1, keys).masked_fill(~padding, -10000.0),
        "bias": (torch.randn(heads, queries, keys) * 4).bfloat16(),
        "-inf": torch.zeros(queries, keys).masked_fill(torch.rand(queries, keys) > 0.9, -math.inf),
    }


def by_reference(*args):
    with native.using(native.REFERENCE):
        return OPS.attention(*args)


# -- the definition ------------------------------------------------------------------------------------------------------


def rounded(x: Fraction) -> Fraction:
    """To fp32, ties to even; subnormal numbers do not occur."""
    if x == 0:
        return x
    exponent = abs(x).numerator.bit_length() - abs(x).denominator.bit_length()
    exponent -= abs(x) < Fraction(2) ** exponent
    unit = Fraction(2) ** (exponent - 23)
    return round(x / unit) * unit


def codes(numbers: list[Fraction]) -> tuple[list[int], Fraction]:
    highest = max(map(abs, numbers))
    inverse = rounded(127 / highest)
    return [round(rounded(x * inverse)) for x in numbers], rounded(highest * Fraction(float.fromhex("0x1.020408p-7")))


@cache
def power(x: Fraction) -> Fraction:
    if x < -32:
        return Fraction(0)
    n = round(x)
    p = Fraction(float.fromhex("0x1.3a0184p-7"))
    for c in ("0x1.c9fd38p-5", "0x1.ec037ep-3", "0x1.62e12ap-1", "0x1p+0"):
        p = rounded(p * (x - n) + Fraction(float.fromhex(c)))
    return p * Fraction(2) ** n


def by_definition(q, k, v, scale, hidden):
    """One head in exact arithmetic, rounded where section 10 says so. ``hidden``: keys that no query sees."""
    q, k, v = ([[Fraction(x) for x in row] for row in part.float().tolist()] for part in (q, k, v))
    log2_e = Fraction(float.fromhex("0x1.715476p+0"))
    mean = []
    for channel in zip(*k, strict=True):
        total = Fraction(0)
        for first in range(0, len(k), 64):
            block = Fraction(0)
            for x in channel[first : first + 64]:
                block = rounded(block + x)
            total = rounded(total + block)
        mean.append(rounded(total * rounded(Fraction(1, len(k)))))
    keys = [codes([rounded(x - m) for x, m in zip(row, mean, strict=True)]) for row in k]
    factor = rounded(rounded(Fraction(scale)) * log2_e)
    out = []
    for query, own in map(codes, q):
        own = rounded(own * factor)
        highest, total, sums = None, Fraction(0), [Fraction(0)] * len(v[0])
        for first in range(0, len(k), 64):
            places = [j for j in range(first, min(first + 64, len(k))) if j not in hidden]
            if not places:
                continue
            logits = {}
            for j in places:
                product = sum(a * b for a, b in zip(query, keys[j][0], strict=True))
                logits[j] = rounded(rounded(rounded(Fraction(product)) * keys[j][1]) * own)
            most = max(logits.values())
            both = most if highest is None else max(most, highest)
            weights = {j: round(255 * power(rounded(t - most))) for j, t in logits.items()}
            new = power(rounded(most - both))
            old = Fraction(0) if highest is None else power(rounded(highest - both))
            total = rounded(sum(weights.values()) * new + rounded(total * old))
            for e in range(len(sums)):
                values, unit = codes([row[e] for row in v[first : first + 64]])
                part = sum(weight * values[j - first] for j, weight in weights.items())
                sums[e] = rounded(rounded(Fraction(part) * unit) * new + rounded(sums[e] * old))
            highest = both
        inverse = rounded(1 / total)
        out.append([float(rounded(x * inverse)) for x in sums])
    return torch.tensor(out)


def test_the_reference_is_the_definition():
    q, k, v = torch.randn(3, 5) * 3, torch.randn(150, 5) + torch.randn(5), torch.randn(150, 3)
    k[70] *= 4  # one that rules a later block
    hidden = set(range(10, 30)) | {149}
    mask = torch.tensor([j not in hidden for j in range(150)])
    for own, hides in ((None, set()), (mask, hidden)):
        got = by_reference(*(x[None, :, None] for x in (q, k, v)), own, 0.7, False, "int8")
        assert torch.equal(got[0, :, 0], by_definition(q, k, v, 0.7, hides))


def test_exp2_is_within_its_bound():
    """Reduced arguments 2^-20 apart, 2^-24 near the ends, and the whole range."""
    ends = torch.arange(1 << 14) * 2.0**-24
    reduced = torch.cat([torch.arange(1 << 20) * -(2.0**-20), -0.5 + ends, -0.5 - ends, -ends, ends - 1])
    x = torch.cat([reduced, -32 * torch.rand(1 << 18)])
    error = (exp2(x).double() / torch.exp2(x.double()) - 1).abs().max()
    assert 2.7e-6 < error < 2.9e-6
    got = exp2(torch.tensor([0.0, -1.0, -32.0, -32.00001, -1e30, -math.inf])).tolist()
    assert got == [1.0, 0.5, 2.0**-32, 0.0, 0.0, 0.0]


# -- every path ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_every_path_gives_the_bits_of_the_reference(place, dtype):
    for name, mask in masks(place).items():
        args = (*inputs(place, dtype), mask, 0.2, name == "causal", "int8")
        want = by_reference(*args)
        assert want.isfinite().all()
        for path in native.paths():
            with native.using(path):
                assert torch.equal(OPS.attention(*args), want), (path, name)


def special():
    """By name: q, k, v and a mask of which something is not finite, or too small."""
    place = (1, 40, 200, 1, 1, 24, 24)
    plain = inputs(place, torch.float32)
    mask = torch.zeros(40, 200)
    mask[3], mask[5, 7], mask[6, 190] = -math.inf, math.nan, math.inf
    cases = {"mask": (*plain, mask)}
    for name, at, value in (
        ("q", (0, 9), math.nan),
        ("k", (1, 150), math.inf),
        ("v", (2, 199), math.nan),
        ("v", (2, 0), -math.inf),
    ):
        changed = [x.clone() for x in plain]
        changed[at[0]][0, at[1], 0, 2] = value
        cases[f"{name} {value}"] = (*changed, mask[:5].repeat(8, 1).clone())
    tiny = [x * 1e-33 for x in plain]
    cases["tiny"] = (*tiny, None)
    return cases


def test_special_numbers():
    """What is NaN is so where the definition says, and nowhere else; what is tiny counts as zero."""
    unseen = list(range(3, 40, 5))  # queries
    for name, args in special().items():
        want = by_reference(*args, 0.2, False, "int8")
        nan = want[0, :, 0].isnan()
        rows, channels = nan.all(1).nonzero().flatten().tolist(), nan.any(0).nonzero().flatten().tolist()
        if name == "mask":
            assert rows == [5, 6]
        elif name == "tiny":
            assert not want.any()
        else:
            assert not want[0, unseen].any()
            expected = {"q": [9], "k": [i for i in range(40) if i not in unseen], "v": []}[name[0]]
            assert rows == expected and (channels == [2] if name[0] == "v" else True), name
        for path in native.paths():
            with native.using(path):
                got = OPS.attention(*args, 0.2, False, "int8")
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, where a device says nothing
def test_triton_gives_the_bits_of_the_reference():
    pytest.importorskip("triton", minversion="3.9")  # whose interpreter has FMA
    from interpreted import interpreted  # after triton is known to be there

    cases = [(*args, 0.2, False, "int8") for args in special().values()]
    for i, (place, dtype) in enumerate(zip(PLACES, DTYPES * 2, strict=True)):
        two = list(masks(place).items())[i % 4 * 2 :][:2]  # the interpreter is slow
        cases += [(*inputs(place, dtype), mask, 0.2, name == "causal", "int8") for name, mask in two]
    q, k, v = inputs(PLACES[1], torch.bfloat16)
    cases.append((q, k[:, :0], v[:, :0], None, 0.2, False, "int8"))
    strided = q.transpose(1, 3).contiguous().transpose(1, 3)
    cases.append((strided, k[:, 1:], v[:, :-1], None, 0.2, False, "int8"))
    for args in cases:
        want = by_reference(*args)
        with interpreted():
            got = OPS.attention(*args)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_neither_threads_nor_neighbours_change_a_bit():
    q, k, v = inputs((2, 150, 700, 4, 2, 32, 32), torch.bfloat16)
    with one_thread():
        want = OPS.attention(q, k, v, None, 0.2, False, "int8")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(OPS.attention(q, k, v, None, 0.2, False, "int8"), want)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(
        OPS.attention(q[1:, 7:50, 2:], k[1:, :, 1:], v[1:, :, 1:], None, 0.2, False, "int8"), want[1:, 7:50, 2:]
    )


def test_no_keys():
    q, k, v = inputs((1, 3, 4, 1, 1, 8, 8), torch.bfloat16)
    for path in (*native.paths(), native.REFERENCE):
        with native.using(path):
            assert not OPS.attention(q, k[:, :0], v[:, :0], None, 1.0, False, "int8").any()


def test_the_widest_sums_fit():
    """Codes of 127 throughout, in rows as wide as the op takes."""
    q = torch.ones(1, 1, 1, 1 << 17)
    k, v = torch.cat([q, -q], 1), torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
    for path in (*native.paths(), native.REFERENCE):
        with native.using(path):
            assert OPS.attention(q, k, v, None, 1e-4, False, "int8") == 1.0


def test_opcheck():
    q, k, v = inputs((1, 3, 5, 2, 1, 8, 8), torch.float32)
    torch.library.opcheck(OPS.attention.default, (q, k, v, None, 0.3, False, "int8"))


# -- what it is good for -------------------------------------------------------------------------------------------------


def error(q, k, v, method="int8"):
    """Root mean square against float64, relative to that of the result."""
    q, k, v = (x.bfloat16() for x in (q, k, v))
    scale = q.shape[1] ** -0.5
    want = (q.double() @ k.double().T * scale).softmax(1) @ v.double()
    got = OPS.attention(*(x[None, :, None] for x in (q, k, v)), None, scale, False, method)[0, :, 0]
    return float((got - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt())


def test_error_against_float64():
    """A hundredth or so; keys with strong channel means cost nothing, as they are taken away."""
    q, k, v = torch.randn(200, 64), torch.randn(500, 64), torch.randn(500, 64)
    plain = error(q, k, v)
    assert plain < 0.016
    assert error(q, k + 10 * torch.randn(64), v) < 1.3 * plain
