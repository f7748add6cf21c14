"""Carrying a request out."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mxdit.errors import InputError, ModelError
from mxdit.generation.request import Request

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Result:
    """A video and what it took.

    Attributes:
        frames: (frames, height, width, 3) uint8.
        step_seconds: of each denoising step.
        seconds: the whole call, text encoder and VAE included.
        peak_bytes: most memory held: of the accelerator, or the process's resident memory on a CPU.
    """

    frames: np.ndarray
    step_seconds: tuple[float, ...]
    seconds: float
    peak_bytes: int


def generate(
    pipeline: Any,
    request: Request,
    on_step: Callable[[int, int], None] | None = None,
    on_latents: Callable[[int, torch.Tensor], None] | None = None,
) -> Result:
    """Make one video with a loaded pipeline.

    Args:
        pipeline: from `mxdit.generation.directory.load`.
        request: from `make_request`.
        on_step: called with (steps done, steps in all) after each step.
        on_latents: called with (the step's index, its latents (1, C, T, H, W) fp32 on the pipeline's device) before that.

    Raises:
        InputError: a flow shift for a scheduler that has none.
        ModelError: pixels that are no numbers.
    """
    scheduler, boundary_ratio = pipeline.scheduler, pipeline.config.boundary_ratio
    if request.flow_shift is not None:
        key = next((key for key in ("flow_shift", "shift") if key in scheduler.config), None)
        if key is None:
            raise InputError(
                "this model's scheduler has no flow shift",
                where="--flow-shift",
                got=type(scheduler).__name__,
                expected="UniPCMultistepScheduler, as Wan2.2 has it, or FlowMatchEulerDiscreteScheduler",
            )
        pipeline.scheduler = type(scheduler).from_config(scheduler.config, **{key: request.flow_shift})
    if request.boundary_ratio is not None:
        pipeline.register_to_config(boundary_ratio=request.boundary_ratio)
    pipeline.set_progress_bar_config(disable=True)
    device = torch.device(pipeline.device)
    accelerator = torch.get_device_module(device) if device.type in ("cuda", "npu") else None
    if accelerator is not None:
        accelerator.reset_peak_memory_stats(device)
    marks: list[float] = []

    def step_done(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if accelerator is not None:
            accelerator.synchronize(device)
        marks.append(time.perf_counter())
        if on_latents:
            on_latents(step, tensors["latents"])
        if on_step:
            on_step(step + 1, request.steps)
        return tensors

    options: dict[str, Any] = {} if request.image is None else {"image": request.image}
    started = time.perf_counter()
    try:
        frames = pipeline(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            height=request.height,
            width=request.width,
            num_frames=request.frames,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            guidance_scale_2=request.guidance_2,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            callback_on_step_end=step_done,
            callback_on_step_end_tensor_inputs=["latents"],
            output_type="np",
            **options,
        ).frames[0]
    finally:  # the next request starts from the pipeline as it was loaded
        pipeline.scheduler = scheduler
        pipeline.register_to_config(boundary_ratio=boundary_ratio)
    finished = time.perf_counter()
    if accelerator is not None:
        peak = accelerator.max_memory_allocated(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
    # The first step's time includes the text encoder, so steps are timed between their ends.
    gaps = tuple(after - before for before, after in pairwise(marks)) or (finished - started,)
    if not np.isfinite(frames).all():
        raise ModelError(
            "the model produced NaN or inf", where=request.prompt, hint="Try --dtype bf16, or less guidance."
        )
    # A frame at a time: a long clip's floats are gigabytes.
    pixels = np.stack([(frame * 255).round().astype(np.uint8) for frame in frames])
    return Result(pixels, gaps, finished - started, peak)
