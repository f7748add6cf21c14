"""ggml's product of MXFP4 weights with float activations, on one thread, for cpu_linear.py.

`pip install ggml-python` builds ggml for the CPU that it is built on. For one with AVX2 only, as a build for older CPUs is:

    CMAKE_ARGS="-DGGML_NATIVE=OFF" pip install --no-deps --no-binary ggml-python ggml-python

ggml quantizes the activations to eight bits, a scale for each 32 (its Q8_0), in every call.
"""

from __future__ import annotations

import ctypes
import importlib.util

import torch
from torch import Tensor

ROOM = 1 << 20  # bytes, for a context's descriptions of a few tensors and one graph


def found() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec("ggml") is not None


def name() -> str:
    """What it is and which vector instructions it was built with."""
    import ggml

    widest = (
        "AVX-512" if ggml.ggml_cpu_has_avx512() else "AVX2" if ggml.ggml_cpu_has_avx2() else "neither AVX2 nor AVX-512"
    )
    return f"ggml MXFP4, built with {widest}"


class Product:
    """x (M, K) times weights (N, K), given as canonical codes (N, K/2) and scales (N, K/32); a call gives (M, N) in fp32."""

    def __init__(self, codes: Tensor, scale: Tensor, x: Tensor) -> None:
        import ggml

        self.ggml = ggml
        (n, half), m = codes.shape, len(x)
        blocks = block_layout(codes, scale)
        room = ggml.ggml_init_params(
            mem_size=blocks.nbytes + m * (2 * half + n) * 4 + ROOM, mem_buffer=None, no_alloc=False
        )
        context = ggml.ggml_init(room)
        weight = ggml.ggml_new_tensor_2d(context, ggml.GGML_TYPE_MXFP4, 2 * half, n)
        left = ggml.ggml_new_tensor_2d(context, ggml.GGML_TYPE_F32, 2 * half, m)
        product = ggml.ggml_mul_mat(context, weight, left)
        self.graph = ggml.ggml_new_graph(context)
        ggml.ggml_build_forward_expand(self.graph, product)
        for tensor, values in ((weight, blocks), (left, x.float().contiguous())):
            ctypes.memmove(ggml.ggml_get_data(tensor), values.data_ptr(), values.nbytes)
        self.plan = ggml.ggml_graph_plan(self.graph, 1, None)
        self.work = ctypes.create_string_buffer(max(self.plan.work_size, 1))
        self.plan.work_data = ctypes.cast(self.work, ctypes.POINTER(ctypes.c_uint8))
        # A view of the context's memory, which lives as long as the process.
        place = (ctypes.c_float * (m * n)).from_address(ggml.ggml_get_data(product))
        self.out = torch.frombuffer(place, dtype=torch.float32).view(m, n)

    def __call__(self) -> Tensor:
        if self.ggml.ggml_graph_compute(self.graph, ctypes.byref(self.plan)) != self.ggml.GGML_STATUS_SUCCESS:
            raise RuntimeError("ggml could not compute the product")
        return self.out


def block_layout(codes: Tensor, scale: Tensor) -> Tensor:
    """Bytes (N, K/32, 17): of each block its scale, then element i beside element i + 16, the former in the low nibble."""
    pairs = codes.unflatten(-1, (-1, 16))
    elements = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2)
    both = elements[..., :16] | elements[..., 16:] << 4
    return torch.cat((scale.unsqueeze(-1), both), dim=-1).contiguous()
