"""The Triton kernels in Triton's interpreter, on CPU tensors, with `mxdit.backends.cuda` around them as on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from mxdit.backends import cuda
from mxdit.backends.environment import one_thread
from mxdit.ops import OPS


class ByTriton(TorchFunctionMode):
    """While it is on, the CUDA backend answers ``torch.ops.mxdit``, whatever device the tensors are on."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for name in OPS:
            packet = getattr(torch.ops.mxdit, name)
            if func in (packet, packet.default):
                return getattr(cuda, name)(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def interpreted() -> Iterator[None]:
    """Inside, the CUDA backend answers on every tensor, as if it were one of a GPU."""
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder

    from mxdit.backends import triton_codec

    before = InterpreterBuilder.create_dot, cuda._unfit, cuda.route, triton_codec.ROWS
    cast = InterpreterBuilder.cast_impl

    def nearest(self: Any, src: Any, dtype: Any) -> Any:
        to_bf16 = (str(src.dtype.scalar), str(dtype.scalar)) == ("fp32", "bf16")
        return _nearest(src, dtype) if to_bf16 else cast(self, src, dtype)

    InterpreterBuilder.cast_impl = nearest
    InterpreterBuilder.create_dot, cuda._unfit, cuda.route = (
        _dot,
        lambda index: None,
        lambda index: cuda._asked() or "int8",
    )
    triton_codec.ROWS = 64  # the interpreter's time goes by programs
    # It patches Triton's language again in every function that a kernel calls, which takes it as long as all the rest.
    # Here it is patched once, as kernels see it and as Triton's own functions do.
    patch = interpreter._patch_lang
    patched = [patch(function.fn) for function in (triton_codec._encode, tl.max)]
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()  # nothing
    try:
        with one_thread(), ByTriton():
            yield
    finally:
        interpreter._patch_lang = patch
        for scope in reversed(patched):
            scope.restore()
        InterpreterBuilder.create_dot, cuda._unfit, cuda.route, triton_codec.ROWS = before
        InterpreterBuilder.cast_impl = cast


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """What a device's dot is. The interpreter's own multiplies the bit patterns of bf16, and integers very slowly: products of
    int8 are added in fp32 here, which has room for 512 of them."""
    from triton.runtime.interpreter import TensorHandle

    def numbers(handle: Any) -> np.ndarray:
        if str(handle.dtype.scalar) == "bf16":
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        return handle.data.astype(np.float32)

    left, right = numbers(a), numbers(b)
    assert left.shape[-1] <= 512
    product = torch.matmul(torch.from_numpy(left), torch.from_numpy(right)).numpy()  # numpy's has threads of its own
    return TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)


def _nearest(src: Any, dtype: Any) -> Any:
    """fp32 rounded to bf16, as a device does; the interpreter cuts."""
    from triton.runtime.interpreter import TensorHandle

    rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.int16)
    return TensorHandle(rounded.numpy().view(np.uint16), dtype.scalar)
