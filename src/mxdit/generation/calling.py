"""A request in the words of one pipeline class: arguments of its call, and what of it is other for that one call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

from torch import Tensor

from mxdit.errors import InputError
from mxdit.generation.request import Request
from mxdit.models.spec import PipelineSpec


class Call(NamedTuple):
    """How one request is run: `pipeline(**arguments)`, with these components and keys of its config in place of its own."""

    arguments: dict[str, Any]
    components: dict[str, Any]
    config: dict[str, Any]


def call_of(pipeline: Any, called: PipelineSpec, request: Request, on_step: Callable[[Tensor], None]) -> Call:
    """What runs `request` with a loaded pipeline, which stays as it is.

    Args:
        pipeline: loaded.
        called: how its class is called.
        request: its fields that the pipeline does not take are passed over, and so are those that are None.
        on_step: is told the latents after each step. All pipelines ask their scheduler for a step, and not all of them
            have a callback, so the scheduler of this call tells.

    Raises InputError for a flow shift that the scheduler does not have.
    """
    arguments, changes = dict(request.arguments), {"scheduler": _shift_of(pipeline.scheduler, request.flow_shift)}
    for name, place in called.call.items():
        component, dot, key = place.rpartition(".")
        value = getattr(request, name)
        if value is not None:
            (changes.setdefault(component, {}) if dot else arguments)[key] = value
    config = changes.pop("config", {})
    components = {}
    for name, keys in changes.items():
        component = getattr(pipeline, name)
        made = type(component) if name != "scheduler" else _telling(type(component), on_step, called.step_given)
        components[name] = made.from_config(component.config, **keys)
    return Call(arguments, components, config)


def _shift_of(scheduler: Any, shift: float | None) -> dict[str, float]:
    if shift is None:
        return {}
    key = next((key for key in ("flow_shift", "shift") if key in scheduler.config), None)
    if key is None or scheduler.config.get("use_dynamic_shifting"):
        raise InputError(
            "this model's scheduler has no flow shift" if key is None else "this model's flow shift follows the size",
            field="flow_shift",
            got=type(scheduler).__name__,
            expected="UniPCMultistepScheduler or FlowMatchEulerDiscreteScheduler, without use_dynamic_shifting",
        )
    return {key: shift}


def _telling(scheduler: type, tell: Callable[[Tensor], None], given: str | None) -> Any:
    """A scheduler class that does what `scheduler` does, and tells the latents of each step that it made; of those calls alone
    that have the keyword `given`, where there is one."""

    class Telling(scheduler):
        @wraps(
            scheduler.step
        )  # some pipelines look in its signature for what else it takes, as the generator of its noise
        def step(self, *args: Any, **kwargs: Any) -> Any:
            made = super().step(*args, **kwargs)
            if given is None or given in kwargs:
                tell(made[0])
            return made

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            """A copy tells nothing: pipelines make one for what they make beside the video, as its sound."""
            other: Any = object.__new__(scheduler)
            other.__dict__.update(copy.deepcopy(self.__dict__, memo))
            return other

    class Counting(Telling):
        """For the schedulers of CogVideoX, which do not count their steps; activations by step ask for it."""

        begin_index = step_index = 0

        @wraps(scheduler.step)
        def step(self, *args: Any, **kwargs: Any) -> Any:
            made = super().step(*args, **kwargs)
            self.step_index += 1
            return made

    return Telling if hasattr(scheduler, "step_index") else Counting
