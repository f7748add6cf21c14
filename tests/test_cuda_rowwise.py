"""The Triton kernels between linears and attention, in the interpreter: tests of the CPU's paths, rotary embeddings and wide rows
as the reference has them, and a fused transformer."""

from __future__ import annotations

import pytest
import torch

import mxdit
import tiny

pytest.importorskip("triton", minversion="3.9")

from triton.runtime.errors import OutOfResources

from interpreted import interpreted  # after triton is known to be there
from mxdit.backends import triton_rowwise
from mxdit.conformance.calls import ByReference
from mxdit.errors import BackendError
from mxdit.ops import rowwise
from test_rowwise import (  # noqa: F401  # with `path` as it is here
    DTYPES,
    test_a_nan_stays_in_its_row_and_nothing_is_nothing,
    test_every_path_gives_the_same_bits,
    test_gelu_of_every_bf16_number_is_torchs,
    test_gelu_of_fp16_and_fp32,
    test_in_place_whatever_the_strides,
    test_norm_is_as_defined,
    test_refused,
    test_rows_that_share_memory_are_not_normed_twice,
)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]  # numpy's
OPS = torch.ops.mxdit


@pytest.fixture(autouse=True)
def path():
    """`torch.ops.mxdit` by the CUDA backend, on CPU tensors."""
    with interpreted():
        yield "triton"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_longer_than_a_program_s_step_and_several_rows_a_program(dtype):
    """Wan's width and others that are no power of two; text and image tokens, whose cos and sin begin anew in each batch."""
    for shape, head in (((1, 2, 5120), 128), ((1, 1, 1536), 96), ((2, 9, 2, 40), 20), ((1, 1, 1, 256), 256)):
        x, weight = torch.randn(shape).to(dtype) * 3, torch.randn(shape[-1])
        cos, sin = torch.randn(2, shape[1], head).unbind(0)
        for args in ((x, weight, 1e-6, cos, sin, True), (x, weight.to(dtype), 0.0, None, None, False)):
            assert torch.equal(OPS.rms_norm(*args), rowwise.rms_norm(*args)), shape


def test_every_scale_of_fp32_and_what_is_not_finite():
    """Subnormal numbers and sums, roots of nothing, overflows."""
    x = torch.randn(9, 40) * torch.tensor([1e-44, 1e-38, 1e-22, 1e-19, 1.0, 1e15, 1e19, 3e38, 0.0])[:, None]
    x[4, 3] = torch.inf
    for eps in (0.0, 1e-6):
        got, want = OPS.rms_norm(x, None, eps, None, None, False), rowwise.rms_norm(x, None, eps, None, None, False)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    got, want = x.clone(), x.clone()
    OPS.gelu_(got)
    rowwise.gelu_(want)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_a_fused_transformer():
    model = tiny.transformer().bfloat16()
    model.rope = tiny.transformer().rope  # in fp32, as from_pretrained leaves it
    mxdit.fuse_(model)
    called = dict.fromkeys(("rms_norm", "gelu_"), 0)
    with pytest.MonkeyPatch.context() as patch:
        for name in called:
            kernel = getattr(triton_rowwise, name)

            def counted(*args, name=name, kernel=kernel, **options):
                called[name] += 1
                kernel(*args, **options)

            patch.setattr(triton_rowwise, name, counted)
        got = tiny.forward(model)
    assert called == {"rms_norm": 4 * tiny.BLOCKS, "gelu_": tiny.BLOCKS}
    with ByReference():
        assert torch.equal(got, tiny.forward(model))


def test_what_triton_refuses_is_an_error_as_torchs(monkeypatch):
    """So that one kernel's is not the end of a conformance run."""

    def too_large(x):
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(triton_rowwise, "gelu_", too_large)
    with pytest.raises(RuntimeError, match=r"OutOfResources: .*300000"):
        OPS.gelu_(torch.ones(3))


def test_operands_on_several_devices_are_refused():
    x = torch.randn(1, 3, 8)
    with pytest.raises(BackendError, match="several devices"):
        OPS.rms_norm_(x, torch.ones(8, device="meta"), 1e-6, None, None, False)
