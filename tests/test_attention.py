"""torch.ops.mxdit.attention on every path: against float64 and torch, masks, shapes, refusals, fakes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from mxdit.backends import native
from mxdit.conformance.calls import one_thread
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
@pytest.mark.parametrize("mask", masks())
def test_any_mask_any_dtype_shared_heads(mask):
    """To the rounding of the result and, on BF16 units, of the weights."""
    mask = masks()[mask]
    for dtype in DTYPES:
        q, k, v = inputs(dtype)
        got = OPS.attention(q, k, v, mask, 0.2, False, "exact")
        assert got.dtype is dtype and got.shape == (2, 70, 4, 24)
        near(got, exactly(q, k, v, mask, 0.2))


def near(got, want):
    """As near to float64 as numerics.md has it: half a unit in the last place of the result, and beside it what weights that
    were rounded to bf16 make of values of about 1 (fp32: roundings of logits of up to 40)."""
    half = torch.finfo(got.dtype).eps / 2
    torch.testing.assert_close(got.double(), want, rtol=half, atol=2e-5 if got.dtype is torch.float32 else 4 * half)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_farther_from_float64_than_torch(path, dtype):
    """Where torch has its fused kernel, which is one width and no shared heads. Both are given the mask in one dtype."""
    # Sums in another order: draws of this size gave up to 1.008 of torch's error, and 1.047 where each product is rounded.
    allowed = 1.05 if dtype is torch.float32 and path in ("scalar", native.REFERENCE) else 1.02
    for spread, middle, mask in ((1, 0, None), (3, 0, None), (1, 1, None), (2, 0, torch.randn(97, 700).to(dtype))):
        q, k, v = inputs(dtype, 1, 97, 700, 2, 2, 64, 64)
        q, v = q * spread / 2, v + middle
        want = exactly(q, k, v, mask, 0.125)
        got = OPS.attention(q, k, v, mask, 0.125, False, "exact")
        heads = [x.transpose(1, 2) for x in (q, k, v)]
        by_torch = scaled_dot_product_attention(*heads, attn_mask=mask, scale=0.125).transpose(1, 2)
        error, of_torch = ((x.double() - want).pow(2).mean().sqrt() for x in (got, by_torch))
        assert error <= allowed * of_torch, (spread, middle, error, of_torch)


@on_every_path
@pytest.mark.parametrize("width", [1, 7, 32, 80, 128, 300])
def test_any_width_and_any_length(width):
    """Whole tiles, parts of them, several chains and blocks of keys."""
    for queries, keys in (
        (1, 1),
        (5, 2),
        (13, 15),
        (1, 16),
        (33, 17),
        (2, 63),
        (98, 65),
        (5, 257),
        (11, 600),
        (3, 1100),
    ):
        q, k, v = inputs(torch.bfloat16, 1, queries, keys, 2, 1, width, width)
        near(OPS.attention(q, k, v, None, width**-0.5, False, "exact"), exactly(q, k, v, None, width**-0.5))


@on_every_path
@pytest.mark.parametrize("keys", [90, 131, 700])
def test_causal(keys):
    for dtype in DTYPES:
        q, k, v = inputs(dtype, queries=131, keys=keys)
        near(OPS.attention(q, k, v, None, 0.2, True, "exact"), exactly(q, k, v, None, 0.2, True))


@on_every_path
@pytest.mark.parametrize("scale", [-0.2, 0.0])
def test_scales_that_turn_the_order_of_logits(scale):
    q, k, v = inputs(torch.float32)
    for mask, causal in ((None, False), (None, True), (masks()["two axes"], False)):
        near(OPS.attention(q, k, v, mask, scale, causal, "exact"), exactly(q, k, v, mask, scale, causal))


@on_every_path
def test_keys_that_come_later_and_matter_more():
    """Logits that grow, or fall, by hundreds from block to block: what was summed before is scaled away, or stays."""
    for grown in (torch.linspace(0, 60, 1500), torch.linspace(60, 0, 1500)):
        q, k, v = inputs(torch.float32, 1, 30, 1500, 1, 1, 16, 16)
        k *= grown[None, :, None, None]
        near(OPS.attention(q, k, v, None, 1.0, False, "exact"), exactly(q, k, v, None, 1.0))


@on_every_path
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_that_are_none_and_logits_without_end(dtype):
    """NaN or inf in a query or a key makes the queries NaN that meet it; logits past 2^100 still choose their key."""
    q, k, v = inputs(dtype, 1, 40, 90, 2, 2, 16, 16)
    for bad in (math.nan, math.inf, -math.inf):
        broken = q.clone()
        broken[0, 7, 1, 3] = bad
        got = OPS.attention(broken, k, v, None, 0.2, False, "exact")
        # An infinite query has logits of both signs, and its largest is inf.
        assert got[0, 7, 1].isnan().all()
        assert got.isnan().sum() == 16
    broken = k.clone()
    broken[0, 80, 0, 2] = math.nan
    got = OPS.attention(q, broken, v, None, 0.2, False, "exact")
    assert got[:, :, 0].isnan().all() and not got[:, :, 1].isnan().any()
    broken = v.clone()
    broken[0, 80, 0, 2] = math.inf
    got = OPS.attention(q, k, broken, None, 0.2, False, "exact")
    assert (got[:, :, 0, 2] == math.inf).all() and got[:, :, 1].isfinite().all()
    if dtype is not torch.float16:
        got = OPS.attention(q * 2.0**50, k * 2.0**50, v, None, 1.0, False, "exact")
        chosen = torch.einsum("blhd,bshd->bhls", q.double(), k.double()).argmax(-1)
        want = v.transpose(1, 2).gather(2, chosen[..., None].expand(-1, -1, -1, 16)).transpose(1, 2)
        assert torch.equal(got, want)


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


@on_every_path
def test_threads_change_nothing():
    """Several heads laid out at once and tasks of several threads: the bits of one thread."""
    q, k, v = inputs(torch.bfloat16, 2, 300, 300)
    with one_thread():
        want = OPS.attention(q, k, v, None, 0.2, False, "exact")
    assert torch.equal(OPS.attention(q, k, v, None, 0.2, False, "exact"), want)


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
        (lambda q, k, v: (*torch.ones(3, 1, 1, 1, (1 << 17) + 1), None, 1.0, False, "int8"), "sums of 32 bits"),
    ],
)
def test_refusals(change, says):
    with pytest.raises(FormatError, match=says):
        OPS.attention(*change(*inputs(torch.float32)))
