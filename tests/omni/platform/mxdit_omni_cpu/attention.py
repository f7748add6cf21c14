"""torch's scaled dot product attention. vLLM-Omni has it, but its dispatch knows no out-of-tree platform."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm_omni.diffusion.attention.backends.sdpa import SDPABackend, SDPAImpl


class CpuSDPAImpl(SDPAImpl):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: Any = None) -> Tensor:
        return self.forward_cuda(query, key, value, attn_metadata)  # plain torch, in spite of its name


class CpuSDPABackend(SDPABackend):
    @staticmethod
    def get_impl_cls() -> type[SDPAImpl]:
        return CpuSDPAImpl
