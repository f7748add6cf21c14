"""`fuse_`: norms, rotary embeddings and GELU of diffusers' models (0.40 to 0.42) by ops of mxdit, one pass over memory each.

Modules and attention processors get a subclass of their own class: paths, parameters, hooks and what others hold of them stay.
Each stands in for one function of diffusers, whose source is told by its digest: where it is another, that class is left alone.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn

from mxdit.backends import cuda
from mxdit.models import uncompiled

logger = logging.getLogger("mxdit")

_OPS = torch.ops.mxdit
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class FusedTorchRMSNorm(nn.RMSNorm):
    """torch's own RMS norm over one axis."""

    def forward(self, x: Tensor) -> Tensor:
        if not _answers(x, self.weight):
            return super().forward(x)
        return _OPS.rms_norm(x, self.weight, self.eps, None, None, False)


class FusedRMSNorm(RMSNorm):
    """diffusers' RMS norm without a bias, which rounds before the weight, too."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not _answers(hidden_states, self.weight):
            return super().forward(hidden_states)
        return _OPS.rms_norm(hidden_states, self.weight, self.eps, None, None, True)


class FusedGELU(GELU):
    """The activation of a FeedForward, in the approximation by tanh: in place of what its linear gave."""

    def gelu(self, gate: Tensor) -> Tensor:
        if not _answers(gate) or _watched(self.proj):
            return super().gelu(gate)
        _OPS.gelu_(gate)
        return gate


class FusedWanAttnProcessor(WanAttnProcessor):
    """Wan's attention of one source of keys, its norms and rotary embedding in place of what the linears gave."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        norms = (attn.norm_q, attn.norm_k)
        if (
            attn.add_k_proj is not None
            or attn.fused_projections
            or any(type(norm) is not FusedTorchRMSNorm or _hooked(norm) for norm in norms)
            or not _answers(hidden_states, attn.norm_q.weight, attn.norm_k.weight)
            or not _turns(rotary_emb, hidden_states)
        ):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        turn = (None, None) if rotary_emb is None else tuple(part[0, :, 0] for part in rotary_emb)
        query = _normed(attn.to_q, attn.norm_q, hidden_states, turn)
        key = _normed(attn.to_k, attn.norm_k, source, turn)
        out = dispatch_attention_fn(
            *(x.unflatten(2, (attn.heads, -1)) for x in (query, key, attn.to_v(source))),
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config if encoder_hidden_states is None else None,
        )
        out = attn.to_out[0](out.flatten(2, 3).type_as(query))
        return attn.to_out[1](out)


def _normed(linear: nn.Module, norm: Any, x: Tensor, turn: tuple[Any, ...]) -> Tensor:
    out = linear(x)
    if _watched(linear):
        return _OPS.rms_norm(out, norm.weight, norm.eps, *turn, False)
    _OPS.rms_norm_(out, norm.weight, norm.eps, *turn, False)
    return out


def _answers(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether the ops are for these: where kernels of ours answer, of one dtype, and nobody needs a gradient."""
    kind = x.device.type
    if x.dtype not in _DTYPES or not _has_kernels(kind, x.device.index or 0) or torch.is_autocast_enabled(kind):
        return False
    tensors = (x, *(weight for weight in weights if weight is not None))
    if any(each.device != x.device or each.dtype is not x.dtype for each in tensors):
        return False
    return not (torch.is_grad_enabled() and any(each.requires_grad for each in tensors))


@torch.compiler.assume_constant_result
def _has_kernels(kind: str, index: int) -> bool:
    """Elsewhere the reference would answer, in more passes than torch's own."""
    return kind == "cpu" or (kind == "cuda" and cuda.why_not(index) is None)


def _turns(rotary: tuple[Tensor, Tensor] | None, x: Tensor) -> bool:
    """Whether the op takes this rotary embedding: the same for every head and the whole batch, in fp32."""
    return rotary is None or all(
        part.dtype is torch.float32 and part.shape[:-1] == (1, x.shape[1], 1) and part.device == x.device
        for part in rotary
    )


def _watched(linear: nn.Module) -> bool:
    """Whether somebody may hold what a linear gave: a hook of it, or of a layer inside of an adapter's."""
    return any(module._forward_hooks for module in linear.modules())


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


# -- where they take their places ----------------------------------------------------------------------------------------


def _one_axis(norm: Any) -> bool:
    return len(getattr(norm, "normalized_shape", getattr(norm, "dim", ()))) == 1 and norm.eps is not None


_PLACES: dict[type, tuple[type, Callable[[Any], bool]]] = {
    nn.RMSNorm: (FusedTorchRMSNorm, _one_axis),
    RMSNorm: (FusedRMSNorm, lambda norm: _one_axis(norm) and norm.bias is None),
    GELU: (FusedGELU, lambda module: module.approximate == "tanh"),
    WanAttnProcessor: (FusedWanAttnProcessor, lambda _: True),
}
"""What something's class is -> the class it gets, and whether it gets it."""

KNOWN: dict[type, tuple[str, frozenset[str]]] = {
    RMSNorm: ("forward", frozenset({"fa91ca74b4badaaf", "ab9075d036873ac9"})),  # 0.40; 0.41 and 0.42
    GELU: ("gelu", frozenset({"d203f2720ee05f35"})),
    WanAttnProcessor: ("__call__", frozenset({"13c09feedcfe814a"})),
}
"""Class of diffusers -> its function that ours stands in for, and the digests of that which do what ours does."""


def digest(function: Any) -> str:
    """Of a function's source."""
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]


@cache
def _known(cls: type) -> bool:
    if cls not in KNOWN:
        return True
    name, digests = KNOWN[cls]
    found = digest(getattr(cls, name))
    if found not in digests:
        logger.warning("%s.%s of this diffusers is not known (%s): left as it is", cls.__name__, name, found)
    return found in digests


class Fused:
    """What `fuse_` changed in a model. `remove` changes it back, and so does the end of a `with` block.

    Attributes:
        paths: of the modules that are fused now, an attention for its processor.
    """

    def __init__(self, changed: dict[str, Any]) -> None:
        self.paths = tuple(changed)
        self._before = [(each, type(each).__bases__[0]) for each in changed.values()]

    def remove(self) -> None:
        """Let diffusers' own classes compute again. Harmless when it is called twice."""
        for each, cls in self._before:
            each.__class__ = cls

    def __enter__(self) -> Fused:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def fuse_(model: nn.Module) -> Fused:
    """Let a transformer of diffusers compute its RMS norms, Wan's rotary embedding, and GELU (tanh) by ops of mxdit.

    Numbers differ from those before by last bits, as docs/numerics.md section 11 says. In training, under autocast, where
    something else is in between, and on what is neither a CPU nor a GPU that mxdit has kernels for, it computes as before.
    Quantize before, and compile after it.

        >>> fused = mxdit.fuse_(pipe.transformer)
        >>> fused.remove()

    Args:
        model: a transformer; what is already fused stays so.

    Returns:
        What was changed; nothing in a model that has none of these.
    """
    changed: dict[str, Any] = {}
    for path, module in uncompiled(model).named_modules():
        for each in (module, getattr(module, "processor", None)):
            place = _PLACES.get(type(each))
            if place and place[1](each) and "forward" not in vars(each) and _known(type(each)):
                each.__class__ = place[0]
                changed[path] = each
    return Fused(changed)
