"""``torch.ops.mxdit``: the table of ops, with their schemas, argument checks and the reference on every device.

The schemas mirror the Ascend operators (docs/numerics.md sections 2.1, 3.1 and 4). Only plain tensors and registry
names cross them. Shapes are canonical: row-major, last axis K, scales neither padded nor paired, weights (N, K). Any
leading axes, zero rows included, are activations. A backend implements them for its device type (`implement`) and answers
with the same bits.

What an op cannot take is a FormatError before any work, from fake tensors too. Limits on shapes that only one device has
(such as K in multiples of 64) are that backend's to refuse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.library import Library, register_fake

from mxdit.ops import attention, products, quantize, rowwise

LIBRARY = Library("mxdit", "DEF")
"""The registrations live as long as this object."""


@dataclass(frozen=True)
class Op:
    """One op.

    schema     its arguments and results, in torch's words.
    reference  the op in plain torch, on any device.
    prepare    checks the arguments and makes room for the results: what every kernel does first, and the fake one only.
    """

    schema: str
    reference: Callable[..., Any]
    prepare: Callable[..., Any]

    @property
    def name(self) -> str:
        """Of the op, of its reference, and of every backend's function."""
        return self.reference.__name__


_NORM = "Tensor? weight, float eps, Tensor? cos, Tensor? sin, bool rounded"

OPS = {
    op.name: op
    for op in (
        Op(
            "(Tensor x, str fmt, str rule, str round_mode) -> (Tensor codes, Tensor scale)",
            quantize.quantize,
            quantize.prepare_quantize,
        ),
        Op(
            "(Tensor x, Tensor? mul_scale, str round_mode) -> (Tensor codes, Tensor l0, Tensor l1)",
            quantize.quantize_dual,
            quantize.prepare_quantize_dual,
        ),
        Op(
            "(Tensor codes, Tensor scale, Tensor? outer, str fmt, ScalarType dtype) -> Tensor",
            quantize.dequantize,
            quantize.prepare_dequantize,
        ),
        Op(
            "(Tensor a, Tensor a_scale, Tensor w, Tensor w_scale, Tensor? bias, str a_fmt, str w_fmt, ScalarType out)"
            " -> Tensor",
            products.matmul,
            products.prepare_matmul,
        ),
        Op(
            "(Tensor a, Tensor w, Tensor a_l0, Tensor w_l0, Tensor a_l1, Tensor w_l1, Tensor? bias, ScalarType out)"
            " -> Tensor",
            products.matmul_dual,
            products.prepare_matmul_dual,
        ),
        Op(
            "(Tensor x, Tensor w, Tensor w_scale, Tensor? w_dual, Tensor? mul_scale, Tensor? bias, str scheme, str rule,"
            " str layout) -> Tensor",
            products.linear,
            products.prepare_linear,
        ),
        Op(
            "(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool causal, str method) -> Tensor",
            attention.attention,
            attention.prepare_attention,
        ),
        Op(f"(Tensor x, {_NORM}) -> Tensor", rowwise.rms_norm, rowwise.prepare_rms_norm),
        Op(f"(Tensor(a!) x, {_NORM}) -> ()", rowwise.rms_norm_, rowwise.prepare_rms_norm_),
        Op("(Tensor(a!) x) -> ()", rowwise.gelu_, rowwise.prepare_gelu_),
    )
}
"""Every op, by name."""


def implement(dispatch_key: str, kernels: Any) -> None:
    """Let a backend answer on its device.

    Args:
        dispatch_key: torch's name of the device's dispatch key: ``CPU``, ``CUDA``, ``PrivateUse1``, ...
        kernels: a module. Each of its functions that bears an op's name is that op's kernel; ops without one stay the
            reference's.
    """
    for name in OPS:
        if hasattr(kernels, name):
            LIBRARY.impl(name, getattr(kernels, name), dispatch_key)


def has_kernel(op: str, device: str) -> bool:
    """Whether a backend has a kernel for that op on this type of device; where none has, the reference answers."""
    key = torch._C._dispatch_key_for_device(device)
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"mxdit::{op}", key)


def _define() -> None:
    for op in OPS.values():
        LIBRARY.define(op.name + op.schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(op.name, op.reference, "CompositeExplicitAutograd")
        register_fake(f"mxdit::{op.name}", op.prepare, lib=LIBRARY)


_define()
