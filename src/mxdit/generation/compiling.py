"""torch.compile of the repeated blocks of a pipeline's transformers: where it can be had, what it makes, and what that takes.

Blocks are compiled, not whole models: all of one kind share a graph, so that a model of 40 blocks compiles as fast as one of 2.
They are those of the `ModelSpec`, which every family has; diffusers' own list (`_repeated_blocks`) is empty for a third of them.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mxdit.errors import InputError, ModelError
from mxdit.models import spec_of

logger = logging.getLogger(__name__)

CACHE = "TORCHINDUCTOR_CACHE_DIR"  # torch's own name of where compiled code is kept
ROOM = 128  # graphs that one piece of code may have; torch's 8 are too few for activations, sizes and adapters at once
INSTEAD = "Leave compile out to run it as it is."
WITHOUT = {
    "cpu": "On a CPU it needs a C++ compiler (g++ or clang++; CXX names another) and Python's headers (python3-dev)."
}
WITHOUT_ELSEWHERE = "On this device it needs Triton, which torch's own CUDA wheels bring, and a C compiler."

# What is being compiled, and seconds of each graph so far.
_LISTENING: ContextVar[tuple[str, list[float]] | None] = ContextVar("_LISTENING", default=None)
_made = 0  # graphs since torch forgot all


def prepare(device: str) -> None:
    """Make sure, before work begins, that torch.compile works for this device, and where it keeps what it compiles.

    Raises InputError where it does not: what is missing, and what to install.
    """
    place = _place()
    os.environ[CACHE] = str(place)
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise InputError(
            "compiled code cannot be kept here",
            field="compile",
            where=str(place),
            got=error.strerror,
            hint=f"{CACHE} names another directory.",
        ) from None
    try:
        torch.compile(_trial, fullgraph=True)(torch.zeros(8, device=device))
    except (RuntimeError, OSError) as error:  # torch's own errors of compiling are RuntimeErrors
        hint = WITHOUT.get(torch.device(device).type, WITHOUT_ELSEWHERE)
        raise InputError(
            "torch.compile does not work here", field="compile", got=_said(error), hint=f"{hint} {INSTEAD}"
        ) from error


def _place() -> Path:
    """Where compiled code is kept: as `CACHE` says, unless that is torch's own default, which lies among temporary files and
    which torch writes there itself once it is asked."""
    named = os.environ.get(CACHE)
    if named and not named.startswith(os.path.join(tempfile.gettempdir(), "torchinductor_")):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "mxdit" / "compiled"


def _trial(x: torch.Tensor) -> torch.Tensor:
    return x.exp() + 1


def compile_blocks(models: Iterable[nn.Module]) -> None:
    """Have the repeated blocks of transformers compiled, each in place and when it is first called.

    A block is one graph: an error is raised where it cannot be, at its first call inside `listening`. What is changed in a model,
    such as activations or adapters, is compiled anew; hooks that are put into a block later are not called.
    """
    for model in models:
        for block in _blocks(model):
            block.compile(backend=_inductor, fullgraph=True)


def _blocks(model: nn.Module) -> list[nn.Module]:
    return [block for path in spec_of(model).blocks for block in model.get_submodule(path).children()]


@contextmanager
def listening(models: Iterable[nn.Module]) -> Iterator[list[float]]:
    """Inside, compiled blocks of these models may be called. Gives the seconds of each graph that is compiled for them, and logs
    them.

    Raises ModelError for a block that cannot be compiled.
    """
    global _made
    from torch._dynamo import config
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    if _made > ROOM // 2:  # of many adapters; what is needed again is read from the disk
        torch.compiler.reset()
        _made = 0
    what = " and ".join(dict.fromkeys(type(block).__name__ for model in models for block in _blocks(model)))
    seconds = list[float]()
    token = _LISTENING.set((what, seconds))
    try:
        with config.patch(recompile_limit=ROOM):
            yield seconds
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        raise ModelError("a block cannot be compiled", where=what, got=_said(error), hint=INSTEAD) from error
    finally:
        _LISTENING.reset(token)


def _inductor(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
    """torch's own compiler, which says what it does."""
    global _made
    from torch._dynamo import lookup_backend

    what, seconds = _LISTENING.get() or ("blocks", [])
    logger.info("compiling %s, graph %d: this step takes longer", what, len(seconds) + 1)
    started = time.perf_counter()
    made = lookup_backend("inductor")(graph, inputs)
    seconds.append(time.perf_counter() - started)
    _made += 1
    logger.info("compiled graph %d in %.1f s", len(seconds), seconds[-1])
    return made


def _said(error: BaseException) -> str:
    """The beginning of what torch says."""
    inner = getattr(error, "inner_exception", error)
    text = " ".join(str(inner).split())
    return text if len(text) <= 200 else f"{text[:200]} ..."
