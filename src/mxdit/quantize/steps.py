"""Activations by denoising step, on a quantized model that runs: what its layers have is switched around each of its calls."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn
from torch.utils.hooks import RemovableHandle

from mxdit.config import ACTIVATIONS, check_activation
from mxdit.config.steps import StepPolicy
from mxdit.layers import MXLinear
from mxdit.models import uncompiled

logger = logging.getLogger(__name__)


class StepSwitch:
    """Lets the quantized linears of a model have the activations of a policy while the model is called, until `remove`.

    Around each call: what a layer has is looked at when the call begins and given back when it ends, by an error too. Only
    Ctrl-C gives back later, at the next call or in `remove`, because torch calls no hook then.

    Args:
        model: a quantized model, or what `torch.compile` made of it. A model's own hooks run outside its graphs: each
            activation has a graph, compiled once.
        policy: what it switches to.
        step_of: (step, steps) of the call that begins, steps from 0. What it raises ends the call.

    Raises ConfigError for an activation that goes with no layer's weights. Of two methods in one model, the layers whose
    weights do not go with a step's activation keep their own.
    """

    def __init__(self, model: nn.Module, policy: StepPolicy, step_of: Callable[[], tuple[int, int]]) -> None:
        self.layers = {path: m for path, m in uncompiled(model).named_modules() if isinstance(m, MXLinear)}
        methods = dict.fromkeys(layer.method for layer in self.layers.values())
        for activation in policy.activations if methods else ():
            check_activation(methods, activation, where=next(iter(self.layers)))
        self.policy, self.step_of = policy, step_of
        self._own: list[tuple[MXLinear, str]] = []
        self._model = uncompiled(model)
        forget(self._model)
        _SWITCHES[self._model] = ref(self)
        self._hooks = (
            model.register_forward_pre_hook(self._enter),
            model.register_forward_hook(self._leave, always_call=True),
        )

    def _enter(self, *_: Any) -> None:
        self._restore()
        activation = self.policy.activation_at(*self.step_of())
        if activation is None:
            return
        for layer in self.layers.values():
            if layer.activation != activation and activation in ACTIVATIONS[layer.method]:
                self._own.append((layer, layer.activation))
                layer.activation = activation

    def _leave(self, *_: Any) -> None:
        self._restore()

    def _restore(self) -> None:
        for layer, own in self._own:
            layer.activation = own
        self._own.clear()

    def remove(self) -> None:
        """Leave the model as it was; a second time, or after another switch took the place of this one, it does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._restore()


# Of a model: the switch that is on it (the hooks keep it alive), or the hook that says at its first call that none is.
_SWITCHES: WeakKeyDictionary[nn.Module, ref[StepSwitch]] = WeakKeyDictionary()
_REMINDERS: WeakKeyDictionary[nn.Module, RemovableHandle] = WeakKeyDictionary()


def remind(model: nn.Module, policy: StepPolicy | None) -> None:
    """Let a model whose config states a policy say so, once, if it is called before somebody tells it the steps."""
    if policy:
        _REMINDERS[model] = model.register_forward_pre_hook(_say_once)


def _say_once(model: nn.Module, _: Any) -> None:
    if (reminder := _REMINDERS.pop(model, None)) is None:
        return  # a copy of the model that is to say it
    reminder.remove()
    logger.warning(
        "%s: its config states activation_steps, and nobody told it the steps: every layer runs with its own activation. "
        "Call mxdit.step_policy(pipe) once, after the pipeline is loaded; mxdit.step_policy(pipe, {}) runs it without.",
        type(model).__name__,
    )


def forget(model: nn.Module) -> None:
    """Take away the switch or the reminder that is on a model, if any."""
    if (held := _SWITCHES.pop(model, None)) is not None and (switch := held()) is not None:
        switch.remove()
    if (reminder := _REMINDERS.pop(model, None)) is not None:
        reminder.remove()
