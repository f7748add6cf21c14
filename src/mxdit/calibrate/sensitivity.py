"""How much the error of each linear moves the velocity: a first-order estimate, by random probes sent back through the model.

E over u of (u J dY)^2 is ||J dY||^2 for u of independent +-1 (Hutchinson, 1989), where dY is what quantizing changes in a
linear's output and J how the velocity depends on it. One pass back serves all linears and every way to quantize them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from mxdit.calibrate.observe import STATES, bytes_of_state
from mxdit.calibrate.walk import Call, Walk
from mxdit.generation.offload import on
from mxdit.layers import MXLinear

PROBES = 2  # for each call


def sensitivities(
    model: nn.Module,
    calls: Sequence[Call],
    layers: Mapping[str, Mapping[str, MXLinear]],
    *,
    weights: Sequence[float] | None = None,
    before: Callable[[Call], None] = lambda call: None,
    probes: int = PROBES,
    seed: int = 0,
) -> Iterator[dict[str, dict[str, float]]]:
    """Share of the velocity's power that each linear's error is, quantized alone.

    Args:
        model: the float one.
        calls: of it, with the velocities that it gave.
        layers: path of a linear -> name of a way to run it -> the layer.
        weights: of the calls' shares in the mean; equal ones by default.
        before: told each call before it is sent back: layers may be set for it.
        probes: random directions for each call.

    Yields {path: {name: share}} after each call, the weighted sum so far over the sum of all weights.
    """
    weights = [1.0] * len(calls) if weights is None else weights
    total = {path: dict.fromkeys(ways, 0.0) for path, ways in layers.items()}
    generator = torch.Generator().manual_seed(seed)
    scale, walk = 0.0, Walk(model, [])
    # What all blocks give to a call is held at once: of a clip of A14B 13 GB and more.
    at_once = max(1, STATES // (len(walk.blocks) * bytes_of_state(model, calls[0])))

    def hook(path: str) -> Any:
        def called(linear: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
            if output.requires_grad:
                x, y = inputs[0].detach(), output.detach()
                output.register_hook(lambda gradient: add(path, x, y, gradient))

        return called

    def add(path: str, x: Tensor, y: Tensor, gradient: Tensor) -> None:
        with torch.no_grad():
            for name, layer in layers[path].items():
                with on(layer, x.device):
                    change = (layer(x).float() - y.float()) * gradient.float()
                total[path][name] += scale * float(change.sum(dtype=torch.float64)) ** 2

    with ExitStack() as hooks:
        for path in layers:
            hooks.callback(model.get_submodule(path).register_forward_hook(hook(path)).remove)
        for number, call in enumerate(calls):
            if number % at_once == 0:
                walk = Walk(model, calls[number : number + at_once], keep=True)
                for _, _, run in walk:
                    for _ in run():
                        pass
            velocity: Tensor = call["velocity"]
            scale = weights[number] / (sum(weights) * probes * float(velocity.double().square().sum()))
            before(call)
            for _ in range(probes):
                signs = torch.randint(0, 2, velocity.shape, generator=generator) * 2 - 1
                for _ in walk.back(number % at_once, signs.to(velocity.dtype)):
                    pass
            yield total
