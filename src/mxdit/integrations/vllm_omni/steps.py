"""Which denoising step of how many a request of the engine is at, and what activations a policy asks for there."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any
from weakref import WeakSet

from mxdit.config.steps import FIELD, StepPolicy
from mxdit.errors import BackendError, ConfigError

LOGGER = "vllm_omni.mxdit"  # below a name whose messages the engine shows
logger = logging.getLogger(LOGGER)
WARM_UP = 2
"""Steps of the request that the engine makes of its own when it starts, as the first of a process."""
_begun = 0  # requests of this process


class StepSwitch:
    """What a policy asks for at the request's step.

    It is set as a step begins. A linear that asked for the step itself would do so inside a block, and where the engine compiles
    blocks, each step would be another graph; so there is one for each activation.
    """

    def __init__(self, policy: StepPolicy) -> None:
        self._policy = policy
        self._set = False
        self._asked: str | None = None
        _SWITCHES.add(self)
        count_steps()

    def begin_step(self) -> None:
        """Take what the policy says of the step that the engine is at. Where that is an error, it is the next linear's."""
        self._set = False
        with suppress(BackendError, ConfigError):
            self._asked = self._now(FIELD)
            self._set = True

    def asked(self, where: str) -> str | None:
        """The activation of every quantized linear now; None: each its own.

        Raises ConfigError where the policy is for another number of steps, BackendError as `current_step`.
        """
        return self._asked if self._set else self._now(where)

    def _now(self, where: str) -> str | None:
        at = current_step(where)
        return None if at is None else self._policy.activation_at(*at)


_SWITCHES: WeakSet[StepSwitch] = WeakSet()


def current_step(where: str) -> tuple[int, int] | None:
    """(the request's step, from 0, over all transformers of its cascade; the number of its steps). None in the warm-up.

    Raises BackendError where the model's pipeline does not say.
    """
    from vllm_omni.diffusion.forward_context import get_forward_context, is_forward_context_available

    context = get_forward_context() if is_forward_context_available() else None
    step = None if context is None else context.denoise_step_idx
    steps = None if context is None else context.total_denoise_steps
    if step is None or steps is None:
        raise BackendError(
            "activations differ by step, and the engine's pipeline does not say at which step it is",
            where=where,
            got=f"step {step} of {steps}",
            hint="Leave activation_steps (w4a8_fallback_steps) out for this model.",
        )
    return None if _begun == 1 and steps == WARM_UP else (step, steps)


def count_steps() -> None:
    """Have pipelines that publish a request's step publish how many there are, too, and switches know of each step.

    In 0.30 Wan's call `record_denoise_step` without `total_steps`, which that function has an argument for; a policy that was
    written for another number of steps could not be told from one that fits. This fills the argument in from the
    scheduler's timesteps, where a pipeline gives none. It also counts requests, for nothing else tells the engine's warm-up.
    """
    from vllm_omni.diffusion.forward_context import DenoiseProgressMixin

    own = DenoiseProgressMixin.record_denoise_step
    if getattr(own, "counts_steps", False):
        return

    def record_denoise_step(
        self: Any, step_idx: int | None, timestep: Any = None, scheduler: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        global _begun
        if kwargs.get("total_steps") is None and len(args) < 2:
            timesteps = getattr(scheduler or getattr(self, "scheduler", None), "timesteps", None)
            kwargs["total_steps"] = None if timesteps is None else len(timesteps)
        if step_idx == 0:
            _begun += 1
            if _begun == 1 and kwargs.get("total_steps") == WARM_UP:
                logger.info("the first request has %d steps: taken for the engine's warm-up, without a policy", WARM_UP)
        own(self, step_idx, timestep, scheduler, *args, **kwargs)
        for switch in _SWITCHES:
            switch.begin_step()

    record_denoise_step.counts_steps = True  # type: ignore[attr-defined]
    DenoiseProgressMixin.record_denoise_step = record_denoise_step  # type: ignore[method-assign]
