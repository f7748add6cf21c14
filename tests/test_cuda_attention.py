"""The Triton kernel that attends, in the interpreter: against float64 and torch, with masks, shapes and strides of every kind."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

pytest.importorskip("triton", minversion="3.9")

from interpreted import interpreted  # after triton is known to be there
from mxdit.backends import cuda
from mxdit.errors import BackendError
from test_attention import exactly, inputs, masks

pytestmark = pytest.mark.slow
OPS = torch.ops.mxdit
EACH = [("bfloat16", mask) for mask in masks()] + [
    (dtype, mask) for dtype in ("float16", "float32") for mask in ("none", "bias")
]


@pytest.fixture(autouse=True)
def gpu():
    """`torch.ops.mxdit` by the CUDA backend, on CPU tensors."""
    with interpreted():
        yield


@pytest.mark.parametrize(("dtype", "mask"), EACH)
def test_it_is_no_farther_from_float64_than_torch(dtype, mask):
    """Of several tiles of keys, the last one short."""
    dtype, mask = getattr(torch, dtype), masks()[mask]
    q, k, v = inputs(dtype, v_width=40)  # of one width, so that torch rounds weights, too
    want = exactly(q, k, v, mask, 0.2)
    got = OPS.attention(q, k, v, mask, 0.2, False, "exact")
    assert got.dtype is dtype and got.shape == (2, 70, 4, 40)
    added = mask if mask is None or mask.dtype is torch.bool else mask.to(dtype)
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    by_torch = scaled_dot_product_attention(*heads, attn_mask=added, scale=0.2, enable_gqa=True).transpose(1, 2)
    error, of_torch = ((x.double() - want).pow(2).mean().sqrt() for x in (got, by_torch))
    assert error <= 1.05 * of_torch + 1e-8, (error, of_torch)


@pytest.mark.parametrize(("width", "v_width"), [(1, 7), (40, 16), (80, 96), (128, 160), (256, 256)])
def test_any_width_and_any_length(width, v_width):
    for queries, keys in ((1, 1), (5, 63), (129, 64), (2, 65), (1, 200)):
        q, k, v = inputs(torch.bfloat16, 1, queries, keys, 2, 1, width, v_width)
        got = OPS.attention(q, k, v, None, -(width**-0.5), False, "exact")
        torch.testing.assert_close(got.double(), exactly(q, k, v, None, -(width**-0.5)), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("keys", [70, 131, 300])
def test_causal(keys):
    q, k, v = inputs(torch.float32, 1, 131, keys, 2, 2)
    got = OPS.attention(q, k, v, None, 0.2, True, "exact")
    torch.testing.assert_close(got.double(), exactly(q, k, v, None, 0.2, True), rtol=1e-5, atol=1e-6)


def test_queries_that_see_nothing_and_masks_of_the_lowest_floats():
    q, k, v = inputs(torch.bfloat16, 1, 20, 70, 2, 1)
    mask = torch.ones(20, 70, dtype=torch.bool)
    mask[3] = False
    got = OPS.attention(q, k, v, mask, 0.2, False, "exact")
    assert not got[:, 3].any() and got[:, 4].all()
    assert not OPS.attention(q, k[:, :0], v[:, :0], None, 0.2, False, "exact").any()
    lowest = torch.full((1, 1, 1, 70), torch.finfo(torch.float32).min)  # of every key: all weigh the same
    want = v.double().mean(1, keepdim=True).expand(1, 20, 2, 24)
    for form in (lowest, lowest.expand(1, 1, 20, 70).contiguous()):
        got = OPS.attention(q, k, v, form, 0.2, False, "exact")
        torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=2e-3)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # numpy, where a device says nothing
def test_a_query_of_nan_is_the_only_one():
    q, k, v = inputs(torch.bfloat16, 1, 20, 70, 2, 1)
    q[0, 7, 1, 3] = torch.nan
    got = OPS.attention(q, k, v, None, 0.2, False, "exact").isnan()
    assert got[0, 7, 1].all() and got.sum() == 24


def test_strides():
    """Heads of one projection, a layout whose heads come first, channels that do not lie side by side."""
    packed = torch.randn(2, 140, 3, 2, 40)
    q, k, v = packed[:, 3:73, 0], packed[:, :131, 1], packed[:, :131, 2]
    want = OPS.attention(q.contiguous(), k.contiguous(), v.contiguous(), None, 0.2, False, "exact")
    assert torch.equal(OPS.attention(q, k, v, None, 0.2, False, "exact"), want)
    for axes in ((1, 2), (1, 3)):
        moved = (x.transpose(*axes).contiguous().transpose(*axes) for x in (q, k, v))
        assert torch.equal(OPS.attention(*moved, None, 0.2, False, "exact"), want)


def test_heads_too_wide_are_the_reference_s_and_that_is_said(caplog):
    cuda._warn.cache_clear()
    q, k, v = inputs(torch.bfloat16, 1, 3, 5, 2, 1, cuda.WIDEST + 1)
    with caplog.at_level(logging.WARNING):
        got = OPS.attention(q, k, v, None, 0.1, False, "exact")
    torch.testing.assert_close(got.double(), exactly(q, k, v, None, 0.1), rtol=2e-2, atol=2e-2)
    assert "257 channels" in caplog.text


def test_operands_on_several_devices_are_refused():
    q, k, v = inputs(torch.bfloat16, 1, 3, 5, 2, 1)
    with pytest.raises(BackendError, match="several devices"):
        OPS.attention(q, k, v.to("meta"), None, 0.1, False, "exact")
