"""Recording what a pipeline's transformers are called with, and calling them so again.

A call is everything that one step hands to the transformer in charge: the latents (for I2V with the image's), the timestep, the
text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mxdit.models import COMPONENTS


def transformers_of(pipeline: Any) -> dict[str, nn.Module]:
    """The transformers of a pipeline, by component name."""
    found = {name: getattr(pipeline, name, None) for name in COMPONENTS}
    return {name: model for name, model in found.items() if model is not None}


class Recorder:
    """Keeps the calls of the transformers and the latents after each step of one image or video.

    Attributes:
        calls: {"step", "timestep", "expert", "inputs": {name: tensor}, "velocity": tensor}, all on the CPU; "expert" is the
            component's name, "velocity" has the latents' shape. The conditional call of a step is first, the unconditional
            one follows where guidance is on.
        latents: after each step, fp32, as the pipeline has them: of a video (1, C, T, H, W).
        steps: {"step", "timestep", "expert"} of each step.
    """

    def __init__(self, keep_calls: bool) -> None:
        self.calls: list[dict[str, Any]] = []
        self.latents: list[Tensor] = []
        self.steps: list[dict[str, Any]] = []
        self._keep_calls = keep_calls
        self._moved: dict[int, tuple[Tensor, Tensor]] = {}

    def on_latents(self, step: int, latents: Tensor) -> None:
        """For `Session.run`."""
        self.latents.append(latents.float().cpu())

    @contextmanager
    def listening(self, pipeline: Any) -> Iterator[None]:
        """Record what the pipeline's transformers are called with."""
        hooks = [
            model.register_forward_hook(self._hook(name), with_kwargs=True)
            for name, model in transformers_of(pipeline).items()
        ]
        try:
            yield
        finally:
            self._moved.clear()
            for hook in hooks:
                hook.remove()

    def _hook(self, expert: str) -> Any:
        def called(_: nn.Module, __: Any, inputs: dict[str, Any], output: Any) -> None:
            step = {
                "step": len(self.latents),
                "timestep": float(inputs["timestep"].max()),  # TI2V has one for each token, 0 for given frames
                "expert": expert,
            }
            if len(self.steps) == step["step"]:
                self.steps.append(step)
            if self._keep_calls:
                tensors = {key: self._move(value) for key, value in inputs.items() if isinstance(value, Tensor)}
                self.calls.append({**step, "inputs": tensors, "velocity": output[0].cpu()})

        return called

    def _move(self, tensor: Tensor) -> Tensor:
        """On the CPU, once for all calls that share it: `torch.save` then writes it once."""
        kept, moved = self._moved.get(id(tensor), (None, None))
        if kept is not tensor or moved is None:
            moved = tensor.cpu()
            self._moved[id(tensor)] = (tensor, moved)  # kept, so that its id stays its own
        return moved


def repeat(model: nn.Module, call: Mapping[str, Any]) -> Tensor:
    """The velocity that a transformer predicts for a recorded call, in the latents' shape, on its device."""
    device = next(model.parameters()).device
    with torch.no_grad():
        return model(**{key: value.to(device) for key, value in call["inputs"].items()}, return_dict=False)[0]
