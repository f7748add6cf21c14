"""One run of a loaded pipeline: a request carried out, watched from step to step, and what comes of it."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from mxdit.config.attention import AttentionPolicy
from mxdit.config.steps import StepPolicy
from mxdit.errors import Cancelled, ModelError
from mxdit.generation import media
from mxdit.generation.calling import call_of
from mxdit.generation.measures import Held
from mxdit.generation.memory import Sampler
from mxdit.generation.plan import Policy
from mxdit.generation.request import Request
from mxdit.integrations.diffusers_steps import step_policy
from mxdit.models.spec import PipelineSpec

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

LOOK = 0.02  # seconds between two looks at the process's memory: a thousandth of the time, and a step is longer


@dataclass(frozen=True)
class Result:
    """An image or a video and what it took.

    Attributes:
        frames: (frames, height, width, 3) uint8; an image is one frame.
        step_seconds: of each denoising step.
        seconds: the whole run, text encoder and VAE included.
        peak_bytes: the most memory held during the run: on an accelerator what its allocator gave out, on a CPU what the
            process held beside mapped files (weights that are stored quantized are mapped). None where nobody counts.
        request: what was asked for.
        compile_seconds: of each graph that was compiled during the run, which steps waited for; empty where all were there, and
            None where nothing is compiled.
    """

    frames: np.ndarray
    step_seconds: tuple[float, ...]
    seconds: float
    peak_bytes: int | None
    request: Request
    compile_seconds: tuple[float, ...] | None = None

    def save(self, path: str | Path, fps: int | None = None) -> None:
        """Write an MP4, or a PNG of one frame, by the name's ending; the file appears whole or not at all.

        Args:
            fps: frames a second of an MP4; by default the request's.

        Raises InputError for another ending, more than one frame for a PNG, and what cannot be written.
        """
        media.write(Path(path), self.frames, self.request.fps if fps is None else fps)


class Watch(NamedTuple):
    """Who is told what a run does, and who may end it: the arguments of `Session.run`."""

    on_step: Callable[[int, int], None] | None
    on_latents: Callable[[int, torch.Tensor], None] | None
    stop: threading.Event | None


def run(
    pipeline: DiffusionPipeline,
    called: PipelineSpec,
    request: Request,
    device: str,
    watch: Watch,
    policies: Mapping[str, StepPolicy] | None,
    attention: Mapping[str, AttentionPolicy],
    held: tuple[Held, Policy] | None,
) -> Result:
    """Carry out a request with a pipeline, which stays as it is.

    Args:
        called: how the pipeline's class is called.
        device: that it computes on.
        policies: of the transformers' activations by step; None puts nothing on them.
        attention: transformer -> how it computes it, where a policy says so.
        held: by whom the pipeline is held in memory, and how for this run.

    Raises Cancelled, InputError and ModelError as `Session.run` says.
    """
    marks = list[float]()

    def step_done(latents: torch.Tensor) -> None:
        if latents.device.type != "cpu":
            torch.get_device_module(latents.device).synchronize(latents.device)
        marks.append(time.perf_counter())
        if watch.on_latents:
            watch.on_latents(len(marks) - 1, latents)
        if watch.on_step:
            watch.on_step(len(marks), request.steps)
        check_stop(watch.stop)

    call = call_of(pipeline, called, request, step_done)
    generator = torch.Generator("cpu").manual_seed(request.seed)
    started = time.perf_counter()
    with ExitStack() as inside:
        memory = inside.enter_context(Sampler(device, LOOK))
        arguments = call.arguments
        if held is not None:
            holder, policy = held
            inside.enter_context(holder.during(policy))
            arguments = holder.encoded(request, arguments)
        view: Any = copy.copy(pipeline)  # shares the modules; what is registered below is the view's alone
        view.set_progress_bar_config(disable=True)
        view.register_modules(**call.components)
        view.register_to_config(**call.config)
        if policies is not None:
            inside.enter_context(step_policy(view, policies))
        if attention:
            from mxdit.integrations.diffusers_attention import attention_policy  # imports diffusers

            inside.enter_context(attention_policy(view, attention))
        try:
            made = view(**arguments, generator=generator, output_type="np")
        finally:
            view.maybe_free_model_hooks()  # a call that ends early leaves caches and offloaded modules as they are
    finished = time.perf_counter()
    frames = getattr(made, called.output)
    frames = frames if called.single else frames[0]
    frames = frames if frames.ndim == 4 else frames[None]
    if not np.isfinite(frames).all():
        raise ModelError(
            "the model produced NaN or inf", where=request.prompt, hint="Try BF16 as the dtype, or less guidance."
        )
    # A frame at a time: a long clip's floats are gigabytes.
    pixels = np.stack([(frame * 255).round().astype(np.uint8) for frame in frames])
    # The first step's time includes the text encoder, so steps are timed between their ends.
    gaps = tuple(after - before for before, after in pairwise(marks)) or (finished - started,)
    peak = memory.anon if torch.device(device).type == "cpu" else memory.device
    return Result(pixels, gaps, finished - started, peak or None, request)


def check_stop(stop: threading.Event | None) -> None:
    """Raise Cancelled where a run is to stop."""
    if stop is not None and stop.is_set():
        raise Cancelled("the run was cancelled")
