"""Making one video: a request with every choice made, its checks, and the run.

Defaults come from the model's preset, so the command line, a server and a script ask in the same words.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mxdit.errors import InputError, ModelError
from mxdit.pipelines import ModelDirectory
from mxdit.video import cover, fit_size

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Request:
    """One video: every choice made.

    Attributes:
        prompt, negative_prompt: text; the negative one only counts where guidance is above 1.
        image: the first frame, for I2V.
        height, width, frames: size of the video in pixels and frames.
        steps: denoising steps.
        guidance, guidance_2: guidance of the high-noise and the low-noise expert (None: the same).
        seed: of the starting noise.
        flow_shift, boundary_ratio: override the scheduler's and the pipeline's own where not None.
    """

    prompt: str
    negative_prompt: str
    image: Image | None
    height: int
    width: int
    frames: int
    steps: int
    guidance: float
    guidance_2: float | None
    seed: int
    flow_shift: float | None = None
    boundary_ratio: float | None = None


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


def make_request(
    model: ModelDirectory,
    task: str,
    *,
    prompt: str | None = None,
    negative_prompt: str | None = None,
    image: Image | None = None,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    guidance_2: float | None = None,
    seed: int = 0,
    flow_shift: float | None = None,
    boundary_ratio: float | None = None,
) -> Request:
    """Fill in what is not given from the model's preset, and check the whole.

    Args:
        size: (height, width) in pixels. By default the preset's, for I2V in the image's aspect.
        image: of any size; it is scaled to cover the frame, and what stands over is cut off.
        the others: as in `Request`.

    Raises:
        InputError: a choice that this model cannot fulfil.
    """
    preset = model.preset(task)
    if task not in model.tasks:
        raise InputError(
            "an image was given to a text-to-video model"
            if task == "i2v"
            else "an image-to-video model needs a first frame",
            where="--image",
            expected=f"a request for {' or '.join(model.tasks)}, which is what {model.path} makes",
            hint="Leave --image out, or name an I2V model." if task == "i2v" else "Add --image FILE.",
        )
    text = preset.prompt if prompt is None else prompt
    if text is None:
        raise InputError("no prompt", where="--prompt", hint=f"{preset.name} has none of its own: say what to show.")
    if size is None:
        size = preset.size if image is None else fit_size(image, preset.size[0] * preset.size[1], model.size_multiple)
    if guidance_2 is None and model.boundary_ratio is not None:
        guidance_2 = preset.guidance_2 if guidance is None else guidance
    request = Request(
        prompt=text,
        negative_prompt=preset.negative_prompt if negative_prompt is None else negative_prompt,
        image=image,
        height=size[0],
        width=size[1],
        frames=preset.frames if frames is None else frames,
        steps=preset.steps if steps is None else steps,
        guidance=preset.guidance if guidance is None else guidance,
        guidance_2=guidance_2,
        seed=seed,
        flow_shift=preset.flow_shift if flow_shift is None else flow_shift,
        boundary_ratio=boundary_ratio,
    )
    _check(model, task, request)
    return request if image is None else replace(request, image=cover(image, *size))


def _check(model: ModelDirectory, task: str, request: Request) -> None:
    if not request.prompt.strip():
        raise InputError("the prompt is empty", where="--prompt", hint="Say what the video should show.")
    if task == "i2v" and request.image is None:
        raise InputError("image-to-video needs a first frame", where="--image", hint="Add --image FILE.")
    multiple, temporal = model.size_multiple, model.vae_stride[0]
    for name, value in (("height", request.height), ("width", request.width)):
        if value < multiple or value % multiple:
            raise InputError(
                f"the {name} does not fit the model's patches",
                where="--size",
                got=value,
                expected=f"a positive multiple of {multiple}",
                hint=f"Nearest: {max(multiple, round(value / multiple) * multiple)}.",
            )
    if request.frames < 1 or request.frames % temporal != 1:
        nearest = max(0, round((request.frames - 1) / temporal)) * temporal + 1
        raise InputError(
            "the number of frames does not fit the video VAE",
            where="--frames",
            got=request.frames,
            expected=f"1 more than a multiple of {temporal}",
            hint=f"Nearest: {nearest}.",
        )
    longest = max((request.frames - 1) // temporal + 1, request.height // multiple, request.width // multiple)
    if longest > model.max_positions:
        raise InputError(
            "the video is larger than the model's position table",
            where="--size, --frames",
            got=f"{request.width}x{request.height}, {request.frames} frames",
            expected=f"at most {model.max_positions * multiple} pixels a side "
            f"and {(model.max_positions - 1) * temporal + 1} frames",
        )
    if request.steps < 1:
        raise InputError("there must be at least one step", where="--steps", got=request.steps)
    if request.guidance_2 is not None and model.boundary_ratio is None:
        raise InputError(
            "this model has one expert, so there is no second guidance scale",
            where="--guidance-scale-2",
            got=request.guidance_2,
            hint="Use --guidance-scale.",
        )
    if request.boundary_ratio is not None:
        if model.boundary_ratio is None:
            raise InputError("this model has one expert, so there is no boundary", where="--boundary-ratio")
        if not 0 < request.boundary_ratio < 1:
            raise InputError(
                "the boundary is a share of the schedule",
                where="--boundary-ratio",
                got=request.boundary_ratio,
                expected="0 to 1",
            )
    if request.flow_shift is not None and not 0 < request.flow_shift < math.inf:
        raise InputError("the flow shift must be positive", where="--flow-shift", got=request.flow_shift)
    for option, value in (("--guidance-scale", request.guidance), ("--guidance-scale-2", request.guidance_2)):
        if value is not None and not math.isfinite(value):
            raise InputError("the guidance must be a finite number", where=option, got=value)
    if not 0 <= request.seed < 2**63:
        raise InputError("the seed is out of range", where="--seed", got=request.seed, expected="0 to 2**63 - 1")


def generate(
    pipeline: Any,
    request: Request,
    on_step: Callable[[int, int], None] | None = None,
    on_latents: Callable[[int, torch.Tensor], None] | None = None,
) -> Result:
    """Make one video with a loaded pipeline.

    Args:
        pipeline: from `mxdit.pipelines.load`.
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
