"""What a model's transformers are called with while it makes clips, and the inputs of their linears."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mxdit.calibrate.walk import Call, Walk
from mxdit.generation.recording import Recorder
from mxdit.generation.request import Request
from mxdit.generation.session import Session

SEARCH_ROWS = 4096  # rows of a linear's input that are kept at least, to learn from
ROWS_PER_CHANNEL = 8  # and for each channel: a Hessian of fewer says little
HELD_ROWS = 2048  # to judge by, of captions that nothing was learned from
STATES = 8 << 30  # bytes that what a block gives to all calls may take
CLIP, CALLS = "clip.npy", "calls.pt"


def record(session: Session, request: Request, directory: Path, on_step: Callable[[int, int], None]) -> None:
    """Make one clip and write it, and every call of a transformer, into a directory."""
    recorder = Recorder(True)
    with session.lock, recorder.listening(session.load()):
        result = session.run(request, on_step, on_latents=recorder.on_latents)
    torch.save(recorder.calls, directory / CALLS)
    np.save(directory / CLIP, result.frames)


def calls_in(directory: Path) -> list[Call]:
    """The calls of a recorded clip, mapped from the disk."""
    return torch.load(directory / CALLS, weights_only=True, mmap=True)


@dataclass(frozen=True)
class Inputs:
    """Rows of what a linear is called with, in the model's dtype, on the CPU: ``fit`` (T, K) to learn from, ``held`` (R, K)."""

    fit: Tensor
    held: Tensor


def choose_calls(clips: Sequence[Sequence[Call]], expert: str, most: int, seed: int) -> list[Call]:
    """At most so many of an expert's calls, spread over clips, steps and both branches of guidance by chance."""
    calls = [call for clip in clips for call in clip if call["expert"] == expert]
    if len(calls) <= most:
        return calls
    order = torch.randperm(len(calls), generator=torch.Generator().manual_seed(seed))
    return [calls[i] for i in sorted(order[:most].tolist())]


def inputs_of(
    model: nn.Module,
    groups: Sequence[Sequence[str]],
    fit: Sequence[Call],
    held: Sequence[Call],
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[tuple[str, dict[tuple[str, ...], Inputs]]]:
    """Block by block, rows of the inputs of its groups of linears.

    As many rows of each call, whichever they are: text tokens count as they run, padding included.

    Args:
        model: the float transformer.
        groups: paths of linears, those together that share their input.
        fit, held: calls to learn from and to judge by.
        seed: of which rows are kept.
        progress: told how many calls have gone through the block at hand.

    Yields (path of the block, group -> rows). Take out what is used up: of A14B a block's are 6 GB.
    """
    calls = [*fit, *held]
    for path, _, run in Walk(model, calls):
        mine = [tuple(group) for group in groups if group[0].startswith(f"{path}.")]
        found: dict[tuple[str, ...], tuple[list[Tensor], list[Tensor]]] = {group: ([], []) for group in mine}
        passed = list[Call]()

        def hook(group: tuple[str, ...], found: Any = found, passed: Any = passed) -> Any:
            def called(_: nn.Module, inputs: tuple[Tensor]) -> None:
                x, at = inputs[0].detach().flatten(0, -2), len(passed)
                learned = at < len(fit)
                most = max(SEARCH_ROWS, ROWS_PER_CHANNEL * x.shape[1]) if learned else HELD_ROWS
                share = math.ceil(most / (len(fit) if learned else len(held)))
                found[group][0 if learned else 1].append(_some(x, share, seed * len(calls) + at).cpu())

            return called

        with ExitStack() as hooks:
            for group in mine:
                linear = model.get_submodule(group[0])
                hooks.callback(linear.register_forward_pre_hook(hook(group)).remove)
            for call in run():
                passed.append(call)
                progress(len(passed))
        rows = {}
        for group in mine:
            learned, judged = found.pop(group)  # not held while others are put together
            rows[group] = Inputs(torch.cat(learned), torch.cat(judged))
            del learned, judged
        yield path, rows


def _some(x: Tensor, count: int, seed: int) -> Tensor:
    """That many rows, chosen by chance, or all."""
    if count >= len(x):
        return x
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:count]
    return x[chosen.sort().values.to(x.device)]


def bytes_of_state(model: nn.Module, call: Call) -> int:
    """How much a block gives to a call, by what the first one gives."""
    walk = Walk(model, [call])
    _, _, run = next(iter(walk))
    for _ in run():
        pass
    return walk.nbytes
