"""Carrying a request out."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from mxdit.errors import ModelError
from mxdit.generation.calling import call_of, called_as
from mxdit.generation.request import Request


@dataclass(frozen=True)
class Result:
    """An image or a video and what it took.

    Attributes:
        frames: (frames, height, width, 3) uint8; an image is one frame.
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
    """Make one image or video with a loaded pipeline.

    Args:
        pipeline: from `mxdit.generation.directory.load`.
        request: from `make_request`.
        on_step: called with (steps done, steps in all) after each step.
        on_latents: called with (the step's index, its latents on the pipeline's device, as the pipeline has them: of a
            video (1, C, T, H, W)) before that.

    Raises:
        InputError: a flow shift for a scheduler that has none, or a pipeline of no family that mxdit knows.
        ModelError: pixels that are no numbers.
    """
    pipeline.set_progress_bar_config(disable=True)
    device = torch.device(pipeline.device)
    accelerator = torch.get_device_module(device) if device.type in ("cuda", "npu") else None
    if accelerator is not None:
        accelerator.reset_peak_memory_stats(device)
    marks: list[float] = []

    def step_done(latents: torch.Tensor) -> None:
        if accelerator is not None:
            accelerator.synchronize(device)
        marks.append(time.perf_counter())
        if on_latents:
            on_latents(len(marks) - 1, latents)
        if on_step:
            on_step(len(marks), request.steps)

    call = call_of(pipeline, request, step_done)
    own = {name: getattr(pipeline, name) for name in call.components}
    config = {key: pipeline.config[key] for key in call.config}
    generator = torch.Generator("cpu").manual_seed(request.seed)
    started = time.perf_counter()
    try:
        pipeline.register_modules(**call.components)
        pipeline.register_to_config(**call.config)
        made = pipeline(**call.arguments, generator=generator, output_type="np")
    finally:  # the next request starts from the pipeline as it was loaded
        pipeline.register_modules(**own)
        pipeline.register_to_config(**config)
    frames = getattr(made, called_as(pipeline).output)[0]
    frames = frames if frames.ndim == 4 else frames[None]
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
