"""`step_policy`: activations by denoising step in a pipeline of diffusers (0.40 to 0.42).

A transformer is not told its step, so the pipeline's own counters are read at each of its calls, all of them public: the
scheduler counts the steps that it made (`step_index`), and the pipeline says how long its loop is (`num_timesteps`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from mxdit.config.components import each_of
from mxdit.config.steps import FIELD, StepPolicy
from mxdit.errors import ConfigError, ModelError
from mxdit.layers import MXLinear
from mxdit.models import COMPONENTS, uncompiled
from mxdit.quantize.recorded import recorded_config
from mxdit.quantize.steps import StepSwitch, forget


class AppliedStepPolicy:
    """What `step_policy` put on a pipeline. `remove` takes it away, and so does the end of a `with` block.

    Attributes:
        policies: transformer -> the policy that it runs by.
    """

    def __init__(self, switches: Mapping[str, StepSwitch]) -> None:
        self.policies = {name: switch.policy for name, switch in switches.items()}
        self._switches = tuple(switches.values())

    def remove(self) -> None:
        """Let every layer have its own activation at every step again. Harmless when it is called twice."""
        for switch in self._switches:
            switch.remove()

    def __enter__(self) -> AppliedStepPolicy:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def step_policy(pipe: Any, policy: StepPolicy | Mapping[str, Any] | None = None) -> AppliedStepPolicy:
    """Let a pipeline's calls run by a policy: what activations are quantized to at some of its denoising steps.

    At a step that the policy names, all quantized linears have that activation while the transformer is called, whatever
    `activation` and `w4a8_fallback_layers` say; afterwards each has its own again. It holds for every later call of `pipe`
    until `remove`. A later `step_policy` on the same transformers takes its place.

        >>> mxdit.step_policy(pipe, {"mxfp8": [0, 1, 38, 39], "of": 40})  # until .remove()
        >>> with mxdit.step_policy(pipe, {"bf16": [0]}):
        ...     video = pipe(prompt, num_inference_steps=40)

    Args:
        pipe: a pipeline with transformers that mxdit quantized or loaded. Steps are those of its call, from 0, and run on
            from a cascade's first transformer to its second. With a scheduler of second order (Heun) both of a step's
            halves are one step.
        policy: a `StepPolicy` or its JSON form for all quantized transformers. Under `transformer` and `transformer_2` it
            may have one for each instead. Empty: none. Not given: what each transformer's own config states.

    Raises:
        ConfigError: no policy, not one for these weights, or for a transformer that is not there. When the pipeline is
            called: a policy for another number of steps.
        ModelError: no quantized transformer, or a pipeline or scheduler that does not count its steps. When a transformer
            is called: outside a call of `pipe`, where there is no step.
    """
    models = {name: model for name in COMPONENTS if isinstance(model := getattr(pipe, name, None), nn.Module)}
    quantized = {name: model for name, model in models.items() if any(isinstance(m, MXLinear) for m in model.modules())}
    policies = _policies_of(models, quantized, policy)
    if policies:
        check_counters(pipe)
    for model in quantized.values():
        forget(uncompiled(model))
    at = partial(step_of, pipe)
    return AppliedStepPolicy({name: StepSwitch(models[name], chosen, at) for name, chosen in policies.items()})


def _policies_of(
    models: Mapping[str, nn.Module], quantized: Mapping[str, nn.Module], policy: StepPolicy | Mapping[str, Any] | None
) -> dict[str, StepPolicy]:
    """Transformer -> its policy, where it has one."""
    if not quantized:
        raise ModelError(
            "no transformer of the pipeline has a quantized linear",
            where="step_policy",
            got=", ".join(f"{name}: {type(model).__name__}" for name, model in models.items()) or "no transformer",
            hint="Load it with quantization_config=mxdit.pipeline_config(...), or load a quantized checkpoint.",
        )
    if policy is None:
        configs = {name: recorded_config(uncompiled(model)) for name, model in quantized.items()}
        chosen = {name: config.activation_steps for name, config in configs.items() if config is not None}
        if not any(chosen.values()):
            raise ConfigError(
                "no policy is given, and the configs of the transformers state none",
                field=FIELD,
                expected='something like {"mxfp8": [0, 1, 38, 39], "of": 40}',
            )
    else:
        absent = "no quantized transformer of this name"
        chosen = each_of(policy, quantized, COMPONENTS, StepPolicy.of_value, field=FIELD, absent=absent)
    return {name: one for name, one in chosen.items() if one}


def check_counters(pipe: Any, where: str = "step_policy") -> None:
    """Raise ModelError unless the pipeline and its scheduler say at which step they are."""
    scheduler = getattr(pipe, "scheduler", None)
    counted = hasattr(type(pipe), "num_timesteps") or hasattr(scheduler, "timesteps")
    lacking = [] if counted else [f"{type(pipe).__name__}.num_timesteps"]
    lacking += [f"{type(scheduler).__name__}.{n}" for n in ("step_index", "begin_index") if not hasattr(scheduler, n)]
    if lacking:
        raise ModelError(
            "the pipeline's denoising steps cannot be known",
            where=where,
            got=f"no {' and no '.join(lacking)}",
            expected="a pipeline and a scheduler that count them",
            hint="Take another scheduler, such as UniPCMultistepScheduler or FlowMatchEulerDiscreteScheduler.",
        )


def step_of(pipe: Any, where: str = "step_policy") -> tuple[int, int]:
    """(step, steps) at which the pipeline calls a transformer. Raises ModelError where it is at none, or cannot say it."""
    check_counters(pipe, where)  # its scheduler may have been replaced
    scheduler, loop = pipe.scheduler, getattr(pipe, "num_timesteps", None)  # there is none before the first call
    # Some pipelines (PixArt, ERNIE-Image) make every step of the schedule, and some schedulers have no number of steps until
    # the first call.
    if not hasattr(type(pipe), "num_timesteps") and getattr(scheduler, "num_inference_steps", None):
        loop = len(scheduler.timesteps)
    if loop is not None and getattr(pipe, "current_timestep", "unknown") is not None:  # None after a call
        every, begin, made = len(scheduler.timesteps), scheduler.begin_index, scheduler.step_index
        if begin is None:  # pipelines that begin in the middle of the schedule need not say so to the scheduler
            begin = every - loop
        done = 0 if made is None else made - begin
        if begin + loop == every and 0 <= done < loop:
            return done // scheduler.order, -(-loop // scheduler.order)
    raise ModelError(
        "a transformer is called, and the pipeline is at no step of a call",
        where=where,
        got=f"{type(pipe).__name__}.num_timesteps {loop}, {type(scheduler).__name__}.step_index {scheduler.step_index}",
        expected="a call of the pipeline that the policy was put on",
        hint="Put it on the pipeline that you call, or remove() it first.",
    )
