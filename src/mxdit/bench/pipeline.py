"""``mxdit bench pipeline``: seconds of a denoising step, and how much of it is linears and how much attention."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from mxdit.bench.modes import CARRIERS, MODES
from mxdit.bench.shapes import Wan
from mxdit.bench.standins import block_inputs, quantized, random_block
from mxdit.bench.timing import Times, alternate, timer
from mxdit.errors import BackendError
from mxdit.generation.directory import ModelDirectory
from mxdit.generation.loading import show_loading
from mxdit.generation.recording import transformers_of
from mxdit.generation.request import Request
from mxdit.generation.session import Session

FORWARD = "mxdit.bench: forward"  # what the profiler calls a transformer's forward
LINEARS = ("mxdit::linear", "aten::linear")
ATTENTION = ("aten::scaled_dot_product_attention",)
AGAIN = "{}, again"


@dataclass(frozen=True)
class StepTime:
    """A step of a pipeline, or a forward of a block.

    Attributes:
        mode: of `MODES`, of `CARRIERS`, `AGAIN` with one, or "as stored".
        times: seconds without the profiler.
        linear, attention: their shares, 0 to 1, of a step under the profiler. What is left are norms, modulation, rotary
            embeddings, guidance and the scheduler.
        ratio: the unquantized one's median over this one's, None where that was not measured.
    """

    mode: str
    times: Times
    linear: float
    attention: float
    ratio: float | None = None

    @property
    def rest(self) -> float:
        """The share that is neither."""
        return 1 - self.linear - self.attention


def run(
    model: ModelDirectory, request: Request, modes: Sequence[str], device: str, tell: Callable[[str], None]
) -> Iterator[StepTime]:
    """Make one clip in every mode without the profiler and one with it.

    Args:
        model: as released, or stored quantized, which is then the only mode.
        request: the clip, of at least two steps; the first does not count, since the text encoder runs before it.
        modes: first what carries what is not quantized, of `CARRIERS`, then of `MODES`. One follows the other, so the first
            is measured once more at the end: what it differs from the first time is the machine's.
        tell: is told of each.
    """
    show_loading(False)
    baseline = None
    for mode in ("as stored",) if model.stored else (*modes, AGAIN.format(modes[0])):
        tell(mode)
        method, activation = MODES.get(mode, (None, "mxfp4"))
        keys = {} if activation == "mxfp4" else {"activation": activation}
        session = Session.open(
            model.path, task=request.task, method=method, keys=keys, dtype=CARRIERS[modes[0]], device=device
        )
        session.run(replace(request, steps=2))  # does not count: allocators and thread pools begin
        times = Times.of(session.run(request).step_seconds)
        transformers = transformers_of(session.load()).values()
        with _marked(transformers), profile(activities=_activities(device)) as profiler:
            result = session.run(request)
        whole = sum(result.step_seconds) / len(result.step_seconds) * request.steps
        linear, attention, _ = split(profiler.events() or (), device)
        baseline = times.median if mode in CARRIERS else baseline
        ratio = None if baseline is None else baseline / times.median
        yield StepTime(mode, times, linear / whole, attention / whole, ratio)
        del session, transformers
        gc.collect()


@torch.inference_mode()
def run_block(wan: Wan, tokens: int, modes: Sequence[str], rounds: int, device: str) -> list[StepTime]:
    """One block of random weights over that many video tokens and 512 of text, in every mode as `run` takes them, in rounds
    of one forward of each. All modes' weights are on the device at once: with all modes 2.6 times the first one's bytes."""
    place, dtype = torch.device(device), CARRIERS[modes[0]]
    plain = random_block(wan, device).to(dtype)
    x, text, *others = block_inputs(wan, tokens, device)
    inputs = (x.to(dtype), text.to(dtype), *others)
    blocks = {modes[0]: plain, **{mode: quantized(plain, *MODES[mode]) for mode in modes[1:]}}
    seconds = alternate([[partial(block, *inputs)] for block in blocks.values()], rounds, timer(place))
    times = [Times.of(each) for each in seconds]
    rows = []
    for (mode, block), taken in zip(blocks.items(), times, strict=True):
        with _marked([block]), profile(activities=_activities(device)) as profiler:
            block(*inputs)
        linear, attention, whole = split(profiler.events() or (), device)
        rows.append(StepTime(mode, taken, linear / whole, attention / whole, times[0].median / taken.median))
    return rows


def split(events: Iterable[Any], device: str) -> tuple[float, float, float]:
    """Seconds of linears, of attention, and of everything, inside the forwards that a profiler saw. A linear inside another
    one, or inside an attention, counts with that."""
    seconds = dict.fromkeys((*LINEARS, *ATTENTION, FORWARD), 0.0)
    for event in events:
        if event.name in seconds and str(event.device_type).endswith("CPU"):
            above = set(_names_above(event))
            if event.name == FORWARD or (FORWARD in above and not above & {*LINEARS, *ATTENTION}):
                seconds[event.name] += (event.cpu_time_total if device == "cpu" else event.device_time_total) / 1e6
    if not seconds[FORWARD]:
        raise BackendError(
            "the profiler saw no time on the device",
            where="bench pipeline",
            got=f"no {device} times in torch.profiler",
            hint="Its support in torch.profiler may be missing here; the seconds of `mxdit generate` do not need it.",
        )
    return sum(seconds[name] for name in LINEARS), sum(seconds[name] for name in ATTENTION), seconds[FORWARD]


def _names_above(event: Any) -> Iterator[str]:
    while (event := event.cpu_parent) is not None:
        yield event.name


@contextmanager
def _marked(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let every forward of these modules be an event of the profiler's."""
    open_marks: list[record_function] = []
    handles = []
    for module in modules:
        handles.append(
            module.register_forward_pre_hook(lambda *_: open_marks.append(record_function(FORWARD).__enter__()))
        )
        handles.append(module.register_forward_hook(lambda *_: open_marks.pop().__exit__(None, None, None)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _activities(device: str) -> list[ProfilerActivity]:
    own = {"cpu": None, "cuda": ProfilerActivity.CUDA, "xpu": ProfilerActivity.XPU}
    other = own.get(torch.device(device).type, ProfilerActivity.PrivateUse1)
    return [ProfilerActivity.CPU, *([] if other is None else [other])]
