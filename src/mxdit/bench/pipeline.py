"""``mxdit bench pipeline``: seconds of a denoising step, how much of it linears and attention are, and a block by operation."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.profiler import profile

from mxdit.bench.ceilings import Ceilings, linear_peak
from mxdit.bench.modes import CARRIERS, MODES
from mxdit.bench.operations import (
    ATTENTIONS,
    LINEARS,
    Operation,
    parts_of,
    quickest,
    seconds_of,
    share_of,
    table,
    work_of,
)
from mxdit.bench.profiling import activities, marked, split
from mxdit.bench.shapes import Wan
from mxdit.bench.standins import block_inputs, quantized, random_block
from mxdit.bench.timing import Times, alternate, timer
from mxdit.config.attention import AttentionLike, AttentionPolicy
from mxdit.generation.directory import ModelDirectory
from mxdit.generation.loading import show_loading
from mxdit.generation.recording import transformers_of
from mxdit.generation.request import Request
from mxdit.generation.session import Session
from mxdit.integrations.diffusers_attention import attend
from mxdit.integrations.diffusers_fused import fuse_

AGAIN = "{}, again"
SHARES = ("linear", "attention", "whole")  # what `split` gives


@dataclass(frozen=True)
class How:
    """How the quantized modes run; what they are compared with is diffusers as it is.

    Attributes:
        attention: how it is computed; a block has no steps, and no transformer around it.
        compiled: whether blocks are compiled. Compiled, a block is not split by operation.
        fused: whether ops of mxdit compute norms, rotary embeddings and GELU. A rotary embedding's time takes in its norms' then.
    """

    attention: AttentionLike | None = None
    compiled: bool = False
    fused: bool = False


@dataclass(frozen=True)
class StepTime:
    """A step of a pipeline, or a forward of a block.

    Attributes:
        mode: of `MODES`, of `CARRIERS`, `AGAIN` with one, or "as stored".
        times: seconds without the profiler.
        linear, attention: their shares, 0 to 1, of a step under the profiler, or of the operations. What is left are norms,
            modulation, rotary embeddings, guidance and the scheduler.
        ratio: the unquantized one's median over this one's, None where that was not measured.
        peak: operations a second that the widest linear in this mode reached alone, in the same run.
        operations: of a block's forward; each one's quickest of the profiled forwards; see `operations`.
    """

    mode: str
    times: Times
    linear: float
    attention: float
    ratio: float | None = None
    peak: float | None = None
    operations: tuple[Operation, ...] = ()

    @property
    def rest(self) -> float:
        """The share that is neither."""
        return 1 - self.linear - self.attention


def run(
    model: ModelDirectory,
    request: Request,
    modes: Sequence[str],
    device: str,
    tell: Callable[[str], None],
    how: How | None = None,
    rounds: int = 1,
) -> Iterator[StepTime]:
    """Make clips in every mode without the profiler and one with it.

    Args:
        model: as released, or stored quantized, which is then the only mode.
        request: the clip, of at least two steps; the first does not count, since the text encoder runs before it.
        modes: first what carries what is not quantized, of `CARRIERS`, then of `MODES`.
        tell: is told of each.
        how: the quantized modes run.
        rounds: clips of each mode. With one clip a mode follows the other, so the first is measured once more at the end: what
            it differs from the first time is the machine's. With more the modes take turns, and all are in memory at once.
    """
    show_loading(False)
    how = how or How()
    baseline = None

    def opened(mode: str) -> Session:
        tell(mode)
        method, activation = MODES.get(mode, (None, "mxfp4"))
        keys = {} if activation == "mxfp4" else {"activation": activation}
        options: dict[str, Any] = (
            {}
            if method is None and not model.stored
            else {"attention": how.attention, "compile": how.compiled, "fused": how.fused}
        )
        session = Session.open(
            model.path, task=request.task, method=method, keys=keys, dtype=CARRIERS[modes[0]], device=device, **options
        )
        session.run(replace(request, steps=2))  # does not count: allocators and thread pools begin
        return session

    if model.stored:
        turns = [("as stored",)]
    else:
        turns = [tuple(modes)] if rounds > 1 else [(mode,) for mode in (*modes, AGAIN.format(modes[0]))]
    for together in turns:
        sessions = {mode: opened(mode) for mode in together}
        seconds: dict[str, list[float]] = {mode: [] for mode in together}
        for _ in range(rounds):
            for mode, session in sessions.items():
                seconds[mode] += session.run(request).step_seconds
        for mode, session in sessions.items():
            times = Times.of(seconds[mode])
            with marked(transformers_of(session.load()).values()), profile(activities=activities(device)) as profiler:
                result = session.run(request)
            whole = sum(result.step_seconds) / len(result.step_seconds) * request.steps
            linear, attention, _ = split(profiler.events() or (), device)
            baseline = times.median if mode in CARRIERS else baseline
            ratio = None if baseline is None else baseline / times.median
            yield StepTime(mode, times, linear / whole, attention / whole, ratio)
        del sessions, session
        gc.collect()


class Called(nn.Module):
    """A compiled block, so that the profiler's marks lie outside of its graph."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *inputs: Any) -> Any:
        return self.block(*inputs)


@torch.inference_mode()
def run_block(
    wan: Wan,
    tokens: int,
    modes: Sequence[str],
    rounds: int,
    device: str,
    best: Ceilings,
    how: How | None = None,
) -> Iterator[StepTime]:
    """One block of random weights over that many video tokens and 512 of text, in every mode as `run` takes them, in rounds
    of one forward of each: first without the profiler, then with it. All modes' weights are on the device at once: with all
    modes 2.6 times the first one's bytes.

    Args:
        best: the device's ceilings, measured just before.
        how: the quantized modes run.
    """
    how = how or How()
    place, dtype, policy = torch.device(device), CARRIERS[modes[0]], AttentionPolicy.of_value(how.attention)
    plain = random_block(wan, device).to(dtype)
    x, text, *others = block_inputs(wan, tokens, device)
    inputs = (x.to(dtype), text.to(dtype), *others)
    blocks = {modes[0]: plain, **{mode: quantized(plain, *MODES[mode]) for mode in modes[1:]}}
    for mode in modes[1:]:
        if policy:
            attend(blocks[mode], policy)
        if how.fused:
            fuse_(blocks[mode])
        if how.compiled:
            blocks[mode].compile(fullgraph=True)
            blocks[mode] = Called(blocks[mode])
    seconds = alternate([[partial(block, *inputs)] for block in blocks.values()], rounds, timer(place))
    times = [Times.of(each) for each in seconds]
    seen: dict[str, list[dict[str, float]]] = {mode: [] for mode in blocks}
    for _ in range(rounds):
        for mode, block in blocks.items():
            with marked([block], inside=type(block) is not Called), profile(activities=activities(device)) as profiler:
                block(*inputs)
            events = profiler.events() or ()
            seen[mode].append(
                dict(zip(SHARES, split(events, device), strict=True))
                if type(block) is Called
                else seconds_of(events, device)
            )
    for (mode, block), taken in zip(blocks.items(), times, strict=True):
        if isinstance(block, Called):
            linear, attention, whole = (min(each[key] for each in seen[mode]) for key in SHARES)
            yield StepTime(mode, taken, linear / whole, attention / whole, times[0].median / taken.median)
            continue
        up = block.get_submodule("ffn.net.0.proj")
        assert isinstance(up, nn.Linear)
        peak = best.peak(mode) if mode in CARRIERS else linear_peak(up, best.size, place, dtype, rounds)
        operations = table(
            quickest(seen[mode]),
            work_of(block, wan, tokens, dtype),
            parts_of(block, wan, tokens, dtype, rounds, place),
            best,
            (peak, best.peak(modes[0])),
        )
        linear, attention = share_of(operations, LINEARS), share_of(operations, ATTENTIONS)
        yield StepTime(mode, taken, linear, attention, times[0].median / taken.median, peak, operations)
