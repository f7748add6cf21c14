"""Forwards under torch's profiler: which modules are marked in it, and what it has seen of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function

from mxdit.errors import BackendError

FORWARD = "mxdit.bench: forward"  # what the profiler calls the forward of what is measured
SCOPE = "mxdit.bench, inside: "  # and, with its path, that of a module inside
LINEARS = ("mxdit::linear", "aten::linear")
ATTENTION = ("aten::scaled_dot_product_attention", "mxdit::attention")


@contextmanager
def marked(modules: Iterable[nn.Module], inside: bool = False) -> Iterator[None]:
    """Let every forward of these modules be an event of the profiler's, and those of the modules inside them if wanted."""
    before: list[tuple[nn.Module, Any]] = []
    for outer in modules:
        for path, module in outer.named_modules() if inside else (("", outer),):
            before.append((module, vars(module).get("forward")))
            vars(module)["forward"] = _marking(module.forward, SCOPE + path if path else FORWARD)
    try:
        yield
    finally:
        for module, forward in before:
            vars(module).pop("forward") if forward is None else vars(module).update(forward=forward)


def _marking(forward: Callable[..., Any], name: str) -> Callable[..., Any]:
    """No hook: beside one, what would work in place of a result keeps it whole."""

    def marked_forward(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return forward(*args, **kwargs)

    return marked_forward


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


def activities(device: str) -> list[ProfilerActivity]:
    """What the profiler has to watch for times on that device."""
    own = {"cpu": None, "cuda": ProfilerActivity.CUDA, "xpu": ProfilerActivity.XPU}
    other = own.get(torch.device(device).type, ProfilerActivity.PrivateUse1)
    return [ProfilerActivity.CPU, *([] if other is None else [other])]
