"""vLLM-Omni on a CPU, to test against: a platform, and what vLLM-Omni 0.30.0 itself does not do where there is no
accelerator. Not for use: it is slow, and no more of the engine is tried than mxdit's tests need.
"""

from __future__ import annotations

RELEASE = "0.30.0"  # of vLLM-Omni, whose private parts `loop` replaces


def platform() -> str | None:
    """The platform's class, where vLLM itself runs on a CPU. Entry point `vllm_omni.platform_plugins`."""
    from vllm.platforms import current_platform

    return "mxdit_omni_cpu.platform.CpuOmniPlatform" if current_platform.is_cpu() else None


def mend() -> None:
    """Change the two things that do not serve on a CPU. Entry point `vllm_omni.general_plugins`, which every process loads,
    perhaps more than once.

    vLLM 0.30.0 packs BF16 weights for the CPU's matrix instructions and drops the parameters: nothing is left to compare,
    or to shard, and another CPU computes other numbers. Its own mark for layers that stay as they are is put on all.
    """
    from vllm_omni.platforms import current_omni_platform

    if current_omni_platform.is_out_of_tree():
        from vllm.model_executor.layers.linear import LinearBase
        from vllm_omni.diffusion.worker.diffusion_worker import WorkerProc

        from mxdit_omni_cpu.loop import async_output_loop

        WorkerProc._async_output_loop = async_output_loop
        LinearBase.skip_weight_relayout = True  # pyright: ignore[reportAttributeAccessIssue]
