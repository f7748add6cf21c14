"""Attention of ours as backends of the engine, which a user chooses by name: MXDIT and MXDIT_INT8.

They compute `torch.ops.mxdit.attention`, as mxdit's backends of diffusers do (`mxdit.integrations.diffusers_attention`). The
engine splits heads over ranks before it calls a backend, and exchanges what sequence parallelism needs around it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm_omni.diffusion.attention.backends.abstract import AttentionBackend, AttentionImpl, AttentionMetadata
from vllm_omni.diffusion.attention.backends.registry import DiffusionAttentionBackendEnum, register_diffusion_backend
from vllm_omni.diffusion.config import get_current_diffusion_config_or_none
from vllm_omni.platforms import current_omni_platform

from mxdit.backends import REFERENCE, backend_for
from mxdit.errors import BackendError, ConfigError
from mxdit.ops import has_kernel

INSTEAD = "Choose another --diffusion-attention-backend."


class ExactAttention(AttentionImpl[AttentionMetadata]):
    """Attention of one layer, by the method ``exact``: sums in fp32.

    Raises:
        BackendError: no kernel of ours attends on the platform's device.
        ConfigError: keys and values go around a ring of ranks, where the engine calls kernels of its own.
    """

    method = "exact"

    def __init__(
        self, num_heads: int, head_size: int, softmax_scale: float, causal: bool = False, **of_other_backends: Any
    ) -> None:
        device = current_omni_platform.get_torch_device()
        if backend_for(device) is REFERENCE or not has_kernel("attention", device.type):
            raise BackendError(
                "no kernel of mxdit attends on this device",
                where=f"diffusion attention backend {BACKENDS[self.method]}",
                got=device.type,
                hint=INSTEAD,
            )
        config = get_current_diffusion_config_or_none()
        if config is not None and config.parallel_config.ring_degree > 1:
            raise ConfigError(
                "ring attention calls no backend of mxdit",
                where=f"diffusion attention backend {BACKENDS[self.method]}",
                got=f"ring_degree={config.parallel_config.ring_degree}",
                hint=f"Take --ulysses-degree for it. {INSTEAD}",
            )
        self.scale, self.causal = softmax_scale, causal

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata | None = None
    ) -> Tensor:
        """softmax(q k^T) v on every platform; tensors are (batch, tokens, heads, width).

        A mask of (batch, keys) says which keys take part, whatever its dtype, as the engine's own backends read it; any other
        is as `mxdit.ops.attention.attention` takes it, or a FormatError.
        """
        mask = None if attn_metadata is None else attn_metadata.attn_mask
        if mask is not None and mask.shape == (query.shape[0], key.shape[1]):
            mask = mask.bool()[:, None, None]
        return torch.ops.mxdit.attention(query, key, value, mask, self.scale, self.causal, self.method)


class Int8Attention(ExactAttention):
    """The same by the method ``int8``: both products of bytes (docs/numerics.md section 10)."""

    method = "int8"


class ExactBackend(AttentionBackend):
    """MXDIT."""

    @staticmethod
    def get_name() -> str:
        return BACKENDS["exact"]

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        return ExactAttention

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        return []  # which is to say any

    @classmethod
    def supports_attention_mask(cls, attention_spec: object | None = None) -> bool:
        return True


class Int8Backend(ExactBackend):
    """MXDIT_INT8."""

    @staticmethod
    def get_name() -> str:
        return BACKENDS["int8"]

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        return Int8Attention


BACKENDS = {"exact": "MXDIT", "int8": "MXDIT_INT8"}
"""Method -> what the engine calls it."""
_CLASSES = {"exact": ExactBackend, "int8": Int8Backend}


def register() -> None:
    """Let the engine know our backends. Harmless when it is done twice."""
    for method, name in BACKENDS.items():
        if name not in DiffusionAttentionBackendEnum.__members__:
            register_diffusion_backend(_new_member(name, _CLASSES[method]))(_CLASSES[method])


def _new_member(name: str, backend: type) -> DiffusionAttentionBackendEnum:
    """The engine's registry takes backends of others, by members of an enumeration, which has none for them in 0.30. Python
    lets nobody add one, so it is made as the enumeration's own are."""
    member = object.__new__(DiffusionAttentionBackendEnum)
    member._name_, member._value_ = name, f"{backend.__module__}.{backend.__qualname__}"
    DiffusionAttentionBackendEnum._member_map_[name] = member
    DiffusionAttentionBackendEnum._value2member_map_[member._value_] = member
    DiffusionAttentionBackendEnum._member_names_.append(name)
    return member
