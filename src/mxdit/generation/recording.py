"""Recording what a pipeline's transformers are called with, and calling them so again.

A call is everything that one step hands to the transformer in charge: the latents (for I2V with the image's), the timestep, the
text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from mxdit.models import COMPONENTS, spec_of


def transformers_of(pipeline: Any) -> dict[str, nn.Module]:
    """The transformers of a pipeline, by component name."""
    found = {name: getattr(pipeline, name, None) for name in COMPONENTS}
    return {name: model for name, model in found.items() if model is not None}


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with each tensor in it changed; one in a list, a tuple or a dict, too."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: map_tensors(part, change) for key, part in value.items()}
    return type(value)(map_tensors(part, change) for part in value) if isinstance(value, (tuple, list)) else value


def velocity_of(output: Any) -> Tensor:
    """What a transformer predicts, of what it gave; of one that gives a list of clips, their batch."""
    return output[0] if isinstance(output[0], Tensor) else torch.stack(output[0])


class Recorder:
    """Keeps the calls of the transformers and the latents after each step of one image or video.

    Attributes:
        calls: {"step", "timestep", "expert", "inputs": {name: what was given}, "velocity": tensor, "prompt_first": bool,
            "guidance_added": float}, all tensors on the CPU; "expert" is the component's name, "velocity" what the transformer
            gives first. The conditional call of a step is first, the unconditional one follows where guidance is on; some
            pipelines make one call of both, as a batch, whose order "prompt_first" tells. The last two are as in a
            `PipelineSpec`.
        latents: after each step, fp32, as the scheduler gives them: of a video mostly (1, C, T, H, W). Of a pipeline that keeps
            the first frame itself (HunyuanVideo's I2V) all but that frame.
        steps: {"step", "timestep", "expert"} of each step.
    """

    def __init__(self, keep_calls: bool) -> None:
        self.calls: list[dict[str, Any]] = []
        self.latents: list[Tensor] = []
        self.steps: list[dict[str, Any]] = []
        self._keep_calls = keep_calls
        self._moved: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def on_latents(self, step: int, latents: Tensor) -> None:
        """For `Session.run`."""
        self.latents.append(latents.float().cpu())

    @contextmanager
    def listening(self, pipeline: Any) -> Iterator[None]:
        """Record what the pipeline's transformers are called with."""
        hooks = [
            model.register_forward_hook(self._hook(name, type(pipeline).__name__), with_kwargs=True)
            for name, model in transformers_of(pipeline).items()
        ]
        try:
            yield
        finally:
            self._moved.clear()
            for hook in hooks:
                hook.remove()

    def _hook(self, expert: str, pipeline: str) -> Any:
        def called(model: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            spec = spec_of(model)
            inputs = signature(model.forward).bind(*given, **named).arguments  # not all pipelines name all of them
            step = {
                "step": len(self.latents),
                "timestep": float(spec.timestep(inputs).max()),  # TI2V has one a token, 0 for given frames
                "expert": expert,
            }
            if len(self.steps) == step["step"]:
                self.steps.append(step)
            if self._keep_calls:
                for name in (
                    "return_dict",
                    *spec.idle,
                ):  # how its output is handed over, and what changes nothing in it
                    inputs.pop(name, None)
                kept = {key: map_tensors(value, self._move) for key, value in inputs.items() if value is not None}
                run = spec.pipelines.get(pipeline)
                mixed = {
                    "prompt_first": run is not None and run.prompt_first,
                    "guidance_added": 0.0 if run is None else run.guidance_added,
                }
                self.calls.append({**step, **mixed, "inputs": kept, "velocity": velocity_of(output).cpu()})

        return called

    def _move(self, tensor: Tensor) -> Tensor:
        """A copy on the CPU, one for all calls that share it, so that `torch.save` writes it once.

        A pipeline may write into a tensor between calls, as Kandinsky 5's do into the latents: then it is another one.
        """
        state = (id(tensor), tensor._version)
        kept, moved = self._moved.get(state, (None, None))
        if kept is not tensor or moved is None:
            moved = tensor.to("cpu", copy=True)
            self._moved[state] = (tensor, moved)  # kept, so that its id stays its own
        return moved


def repeat(model: nn.Module, call: Mapping[str, Any]) -> Tensor:
    """The velocity that a transformer predicts for a recorded call, in the same shape, on its device."""
    device = next(model.parameters()).device
    with torch.no_grad():
        # Without return_dict=False, with which Kandinsky 5 gives a bare tensor and others a tuple.
        return velocity_of(model(**map_tensors(call["inputs"], lambda tensor: tensor.to(device))))
