"""The platform that vLLM-Omni 0.30.0 lacks: diffusion on a CPU, one process for each rank, joined by gloo."""

from __future__ import annotations

import psutil
import torch
from vllm.platforms.cpu import CpuPlatform
from vllm_omni.diffusion.attention.backends.registry import DiffusionAttentionBackendEnum
from vllm_omni.platforms.interface import OmniPlatform, OmniPlatformEnum

RANKS = 8  # that a test may start, whatever the number of cores


class CpuOmniPlatform(OmniPlatform, CpuPlatform):
    """vLLM's CPU platform, and what vLLM-Omni asks of its own."""

    _omni_enum = OmniPlatformEnum.OOT

    @classmethod
    def get_diffusion_attn_backend_cls(
        cls, selected_backend: str | None, head_size: int, allow_trtllm_default: bool = False
    ) -> str:
        if selected_backend in (None, "TORCH_SDPA"):
            return "mxdit_omni_cpu.attention.CpuSDPABackend"
        cls.validate_diffusion_attn_backend(selected_backend)  # as the engine's own platforms do
        return DiffusionAttentionBackendEnum[selected_backend.upper()].get_path()

    @classmethod
    def get_diffusion_worker_cls(cls) -> str:
        return "mxdit_omni_cpu.worker.RecordingWorker"

    @classmethod
    def get_default_stage_config_path(cls) -> str:
        return "vllm_omni/deploy"

    @classmethod
    def supports_torch_inductor(cls) -> bool:
        """The engine compiles blocks where this is so, and `enforce_eager` is not given."""
        return True

    @classmethod
    def supports_cpu_offload(cls) -> bool:
        return False

    @classmethod
    def get_torch_device(cls, local_rank: int | None = None) -> torch.device:
        return torch.device("cpu")

    @classmethod
    def get_device_count(cls) -> int:
        return RANKS

    @classmethod
    def get_device_version(cls) -> str | None:
        return None

    @classmethod
    def synchronize(cls) -> None:
        """Everything is done when its call returns."""

    @classmethod
    def get_free_memory(cls, device: torch.device | None = None) -> int:
        return psutil.virtual_memory().available

    @classmethod
    def get_device_memory(cls, device: torch.device | None = None) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    # `Platform.__getattr__` looks up the rest in torch.cpu, which has none of these, and answers None: the engine calls it.

    @classmethod
    def empty_cache(cls) -> None: ...

    @classmethod
    def reset_peak_memory_stats(cls, device: torch.device | None = None) -> None: ...

    @classmethod
    def max_memory_reserved(cls, device: torch.device | None = None) -> int:
        return 0

    @classmethod
    def max_memory_allocated(cls, device: torch.device | None = None) -> int:
        return 0
