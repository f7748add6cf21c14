"""The ops rms_norm, rms_norm_ and gelu_ on every path: against exact results, torch and diffusers; in place; refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers.models.normalization import RMSNorm
from torch.nn import functional as F

from mxdit.errors import FormatError
from mxdit.ops import rowwise

OPS = torch.ops.mxdit
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
on_every_path = pytest.mark.usefixtures("path")
EVERY_16_BITS = torch.arange(1 << 16).to(torch.int16)


def defined_norm(x, weight, eps, rounded):
    """docs/numerics.md section 11 in numpy's scalars of fp32, a row at a time."""
    out = []
    for row in x.float().numpy():
        sums = [np.float32(0)] * 32
        for k, value in enumerate(row):
            sums[k % 32] += value * value
        while len(sums) > 1:
            half = len(sums) // 2
            sums = [a + b for a, b in zip(sums[:half], sums[half:], strict=True)]
        scaled = row * (np.float32(1) / np.sqrt(sums[0] / np.float32(len(row)) + np.float32(eps)))
        if rounded:
            scaled = torch.from_numpy(scaled).to(x.dtype).float().numpy()
        out.append(torch.from_numpy(scaled) * weight.float())
    return torch.stack(out).to(x.dtype)


def rotated(x, cos, sin):
    """x (B, L, heads, D) as an angle of each pair's complex number would have it, in float64."""
    turned = (
        torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * torch.complex(cos.double(), sin.double())[:, None]
    )
    return torch.view_as_real(turned).flatten(-2)


@on_every_path
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounded", [False, True])
def test_norm_is_as_defined(dtype, rounded):
    for width in (1, 31, 32, 80, 200):
        x, weight = (torch.randn(3, width) * 3).to(dtype), torch.randn(width).to(dtype)
        got = OPS.rms_norm(x, weight, 1e-6, None, None, rounded)
        assert torch.equal(got, defined_norm(x, weight, 1e-6, rounded))
        plain = OPS.rms_norm(x, None, 1e-6, None, None, rounded)
        assert torch.equal(plain, defined_norm(x, torch.ones(width), 1e-6, rounded))


@on_every_path
@pytest.mark.parametrize(("dtype", "differing"), [(torch.bfloat16, 1e-4), (torch.float16, 1e-3)], ids=str)
def test_norms_are_those_of_torch_and_diffusers_but_for_the_order_of_sums(dtype, differing):
    x, weight = torch.randn(40, 2, 640).to(dtype), torch.randn(640).to(dtype)
    theirs = RMSNorm(640, 1e-6).to(dtype)
    theirs.weight.data = weight
    for rounded, want in ((False, F.rms_norm(x, (640,), weight, 1e-6)), (True, theirs(x).detach())):
        got = OPS.rms_norm(x, weight, 1e-6, None, None, rounded)
        assert (got != want).double().mean() <= differing
        torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=0)


@on_every_path
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "width"), [(1, 2), (5, 12), (2, 80), (3, 128)])
def test_rotary_embedding(dtype, heads, width):
    """Of the norm's result in its dtype, rounded once, whether heads are an axis or lie in the last one."""
    x, weight = torch.randn(2, 7, heads, width).to(dtype), torch.randn(heads * width).to(dtype)
    angles = torch.randn(7, width // 2)
    cos, sin = (part.repeat_interleave(2, -1) for part in (angles.cos(), angles.sin()))
    normed = OPS.rms_norm(x.flatten(2), weight, 1e-6, None, None, False)
    got = OPS.rms_norm(x.flatten(2), weight, 1e-6, cos, sin, False)
    want = rotated(normed.view(x.shape), angles.cos(), angles.sin()).flatten(2)
    torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-6)
    a, b = normed.float().unflatten(-1, (heads, -1, 2)).unbind(-1)
    c, s = cos[:, None, 0::2], sin[:, None, 1::2]
    assert torch.equal(got, torch.stack((a * c - b * s, a * s + b * c), -1).view(got.shape).to(dtype))
    by_head = OPS.rms_norm(x, weight[:width], 1e-6, cos, sin, False)
    each = [OPS.rms_norm(x[:, :, h].contiguous(), weight[:width], 1e-6, cos, sin, False) for h in range(heads)]
    assert torch.equal(by_head, torch.stack(each, 2))


@on_every_path
def test_gelu_of_every_bf16_number_is_torchs():
    """But for four, where torch fuses operations."""
    x = EVERY_16_BITS.view(torch.bfloat16)
    got = x.clone()
    OPS.gelu_(got)
    want = F.gelu(x, approximate="tanh")
    assert torch.equal(got.isnan(), want.isnan())
    differing = x[(got != want) & ~want.isnan()]
    assert len(differing) <= 4 and ((differing > -5.2) & (differing < -5.0)).all()


@on_every_path
def test_gelu_of_fp16_and_fp32():
    for x in (EVERY_16_BITS.view(torch.float16), torch.linspace(-12, 12, 100_003)):
        got, wide = x.clone(), x.double()
        OPS.gelu_(got)
        finite = wide.isfinite()
        true = 0.5 * wide * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
        error = (got.double() - true)[finite].abs()
        assert (error <= 6e-7 + torch.finfo(x.dtype).eps / 2 * true[finite].abs()).all()


@on_every_path
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_path_gives_the_same_bits(dtype):
    x, weight = torch.randn(2, 9, 320).to(dtype) * 3, torch.randn(320).to(dtype)
    cos, sin = torch.randn(2, 9, 64).unbind(0)
    gelu, wanted = x.clone(), x.clone()
    OPS.gelu_(gelu)
    rowwise.gelu_(wanted)
    assert torch.equal(gelu, wanted)
    for args in ((x, weight, 1e-6, cos, sin, False), (x[0], None, 0.0, None, None, True)):
        assert torch.equal(OPS.rms_norm(*args), rowwise.rms_norm(*args))


@on_every_path
def test_in_place_whatever_the_strides():
    whole, weight = torch.randn(2, 6, 96), torch.randn(48)
    for x in (whole[..., :48], whole[..., ::2], whole[:, 1:4, :48], whole.transpose(0, 1)[..., 48:]):
        cos, sin = torch.randn(2, x.shape[1], 12).unbind(0)
        before, want = whole.clone(), OPS.rms_norm(x.contiguous(), weight, 1e-6, cos, sin, False)
        view = before.as_strided(x.shape, x.stride(), x.storage_offset())
        OPS.rms_norm_(view, weight, 1e-6, cos, sin, False)
        assert torch.equal(view, want) and (before != whole).sum() == (want != x).sum()
        view = (after := whole.clone()).as_strided(x.shape, x.stride(), x.storage_offset())
        dense = view.contiguous().clone()
        OPS.gelu_(view)
        OPS.gelu_(dense)
        assert torch.equal(view, dense) and (after != whole).sum() == (dense != x).sum()


@on_every_path
def test_rows_that_share_memory_are_not_normed_twice():
    shared = torch.randn(1, 40)
    before = shared.clone()
    with pytest.raises(RuntimeError, match="single memory location"):
        OPS.rms_norm_(shared.expand(3, 40), None, 1e-6, None, None, False)
    assert torch.equal(shared, before)


def test_a_nan_stays_in_its_row_and_nothing_is_nothing():
    x = torch.randn(3, 40)
    x[1, 5] = math.nan
    assert OPS.rms_norm(x, None, 1e-6, None, None, False).isnan().any(1).tolist() == [False, True, False]
    assert OPS.rms_norm(x[:0], None, 1e-6, None, None, False).shape == (0, 40)
    OPS.gelu_(x[:0])


def test_how_torch_sees_them():
    x, weight = torch.randn(1, 5, 24), torch.randn(24)
    turn = (torch.randn(5, 12), torch.randn(5, 12))
    torch.library.opcheck(OPS.rms_norm_.default, (x.clone(), weight, 1e-6, *turn, False))
    torch.library.opcheck(OPS.gelu_.default, (x.clone(),))

    def both(x):
        x = x * 2
        OPS.rms_norm_(x, weight, 1e-6, *turn, False)
        x = x + 1
        OPS.gelu_(x)
        return x

    torch.compiler.reset()
    assert torch.equal(torch.compile(both, fullgraph=True, backend="aot_eager")(x), both(x))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((torch.zeros(2, 4).double(), None, 1e-6, None, None, False), "torch.float64"),
        ((torch.zeros(2, 0), None, 1e-6, None, None, False), "no axis"),
        ((torch.zeros(2, 4), None, -1.0, None, None, False), "eps"),
        ((torch.zeros(2, 4), torch.zeros(3), 1e-6, None, None, False), r"\(3,\)"),
        ((torch.zeros(2, 4), None, 1e-6, torch.zeros(2, 4), None, False), "alone"),
        ((torch.zeros(1, 2, 4), None, 1e-6, torch.zeros(3, 4), torch.zeros(3, 4), False), "does not fit"),
        ((torch.zeros(1, 2, 4), None, 1e-6, torch.zeros(2, 3), torch.zeros(2, 3), False), "does not fit"),
        ((torch.zeros(1, 2, 4), None, 1e-6, *torch.zeros(2, 2, 4).half(), False), "torch.float16"),
    ],
)
def test_refused(args, words):
    for op in (OPS.rms_norm, OPS.rms_norm_):
        with pytest.raises(FormatError, match=words):
            op(*args)
