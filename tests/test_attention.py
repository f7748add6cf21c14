"""torch.ops.mxdit.attention on every path: against float64 and torch, masks, shapes, refusals, fakes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from mxdit.errors import FormatError

OPS = torch.ops.mxdit
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
on_every_path = pytest.mark.usefixtures("path")


def inputs(dtype, batch=2, queries=70, keys=131, heads=4, sources=2, width=40, v_width=24):
    """q, k, v whose logits spread over several units, drawn anew for each call."""
    q, k, v = (
        torch.randn(batch, queries, heads, width),
        torch.randn(batch, keys, sources, width),
        torch.randn(batch, keys, sources, v_width),
    )
    return (q * 2).to(dtype), k.to(dtype), v.to(dtype)


def exactly(q, k, v, mask, scale, causal=False):
    """In float64, a query without a key as zeros."""
    k, v = (x.double().repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    logits = torch.einsum("blhd,bshd->bhls", q.double(), k) * scale
    if causal:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else logits + mask.double()
    return torch.einsum("bhls,bshe->blhe", logits.softmax(-1).nan_to_num(0.0), v)


def masks(batch=2, queries=70, keys=131, heads=4):
    """As diffusers' models pass them: none, padding of keys as bools or floats, one for every head and query."""
    padding = torch.arange(keys) < torch.tensor([keys - 30, 5])[:, None]
    added = torch.zeros(batch, 1, 1, keys).masked_fill(~padding[:, None, None], -10000.0)
    return {
        "none": None,
        "keys": padding[:, None, None],
        "added": added,
        "all -inf": torch.zeros(batch, 1, 1, keys).masked_fill(~padding[:, None, None], -math.inf),
        "full": torch.rand(batch, heads, queries, keys) > 0.5,
        "bias": torch.randn(1, heads, queries, keys),
        "two axes": torch.rand(queries, keys) > 0.2,
    }


@on_every_path
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", masks())
def test_exact_attention_is_no_farther_from_float64_than_torch(dtype, mask):
    mask = masks()[mask]
    q, k, v = inputs(dtype)
    want = exactly(q, k, v, mask, 0.2)
    got = OPS.attention(q, k, v, mask, 0.2, False, "exact")
    assert got.dtype is dtype and got.shape == (2, 70, 4, 24)
    added = mask if mask is None or mask.dtype is torch.bool else mask.to(dtype)
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    by_torch = scaled_dot_product_attention(*heads, attn_mask=added, scale=0.2, enable_gqa=True).transpose(1, 2)
    error, of_torch = ((x.double() - want).pow(2).mean().sqrt() for x in (got, by_torch))
    assert error <= 1.05 * of_torch + 1e-8, (error, of_torch)


@on_every_path
@pytest.mark.parametrize("width", [1, 7, 32, 64, 80, 96, 128, 160, 256])
def test_any_width_and_any_length(width):
    lengths = (1, 2, 15, 16, 17, 63, 64, 65, 127, 200)
    for queries, keys in itertools.product((1, 5, 33), lengths):
        q, k, v = inputs(torch.bfloat16, 1, queries, keys, 2, 1, width, width)
        got = OPS.attention(q, k, v, None, width**-0.5, False, "exact")
        torch.testing.assert_close(got.double(), exactly(q, k, v, None, width**-0.5), rtol=2e-2, atol=2e-2)


@on_every_path
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_causal(dtype):
    q, k, v = inputs(dtype, queries=131)
    got = OPS.attention(q, k, v, None, 0.2, True, "exact")
    torch.testing.assert_close(got.double(), exactly(q, k, v, None, 0.2, True), rtol=2e-2, atol=2e-2)


@on_every_path
def test_a_query_without_keys_gets_zeros():
    q, k, v = inputs(torch.float32)
    mask = torch.ones(70, 131, dtype=torch.bool)
    mask[3] = False
    got = OPS.attention(q, k, v, mask, 0.2, False, "exact")
    assert not got[:, 3].any() and got[:, 4].all()
    assert not OPS.attention(q, k[:, :0], v[:, :0], None, 0.2, False, "exact").any()


@on_every_path
def test_strides():
    """Heads of one projection, lengths cut from longer tensors, a transposed layout."""
    packed = torch.randn(2, 140, 3, 4, 40)
    q, k, v = packed[:, 3:73, 0], packed[:, :131, 1], packed[:, :131, 2]
    want = OPS.attention(q.contiguous(), k.contiguous(), v.contiguous(), None, 0.2, False, "exact")
    assert torch.equal(OPS.attention(q, k, v, None, 0.2, False, "exact"), want)
    heads_first = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    assert torch.equal(OPS.attention(*heads_first, None, 0.2, False, "exact"), want)


def test_opcheck():
    q, k, v = inputs(torch.float32, 1, 3, 5, 2, 1, 8, 8)
    for mask in (None, torch.ones(3, 5, dtype=torch.bool)):
        torch.library.opcheck(OPS.attention.default, (q, k, v, mask, 0.3, False, "exact"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda q, k, v: (q[0], k, v, None, 1.0, False, "exact"), "four axes"),
        (lambda q, k, v: (q, k.half(), v, None, 1.0, False, "exact"), "one float dtype"),
        (lambda q, k, v: (q, k[:, :4], v, None, 1.0, False, "exact"), "do not go with"),
        (lambda q, k, v: (q[:, :, :3], k, v, None, 1.0, False, "exact"), "share evenly"),
        (lambda q, k, v: (q, k, v, torch.ones(7, 7).bool(), 1.0, False, "exact"), "does not broadcast"),
        (lambda q, k, v: (q, k, v, torch.ones(70, 131).int(), 1.0, False, "exact"), "this dtype"),
        (lambda q, k, v: (q, k, v, torch.ones(70, 131), 1.0, True, "exact"), "at once"),
        (lambda q, k, v: (q, k, v, None, 1.0, False, "flash"), "no such method"),
    ],
)
def test_refusals(change, says):
    with pytest.raises(FormatError, match=says):
        OPS.attention(*change(*inputs(torch.float32)))
