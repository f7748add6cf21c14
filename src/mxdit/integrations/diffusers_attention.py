"""Attention of ours in models of diffusers (0.40 to 0.42): backends by name, and `attention_policy`.

diffusers looks a backend up by name at each call of attention; what a model's attention processors hold (or, where they hold
none, what is active) names it. Ours are "mxdit" and "mxdit_int8" there, beside diffusers' own.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from textwrap import indent
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from torch import Tensor, nn

from mxdit.config.attention import DEFAULT, FIELD, AttentionLike, AttentionPolicy
from mxdit.errors import InputError, ModelError
from mxdit.integrations.diffusers_steps import step_of
from mxdit.models import COMPONENTS, uncompiled
from mxdit.numerics.attention import METHODS
from mxdit.quantize.plan import resolve

BACKENDS = {method: "mxdit" if method == "exact" else f"mxdit_{method}" for method in METHODS}
"""Method -> what diffusers calls it."""
_HELD = "_attention_backend"  # of a processor: where diffusers' own set_attention_backend writes
_DIRECT = ("scaled_dot_product_attention", "flex_attention")  # of torch, past diffusers' table of backends


def register() -> None:
    """Let diffusers know our backends. Harmless when it is done twice."""
    for method, name in BACKENDS.items():
        if name not in AttentionBackendName._value2member_map_:
            _AttentionBackendRegistry.register(_new_member(name))(_backend(method))


def _new_member(name: str) -> AttentionBackendName:
    """diffusers' table of backends is held by members of an enumeration, which its functions look up by value; Python lets
    nobody add one, so it is made as the enumeration's own are."""
    member = str.__new__(AttentionBackendName, name)
    member._name_, member._value_ = name.upper(), name
    AttentionBackendName._member_map_[name.upper()] = member
    AttentionBackendName._value2member_map_[name] = member
    AttentionBackendName._member_names_.append(name.upper())
    return member


def _backend(method: str) -> Callable[..., Tensor]:
    """What diffusers calls: tensors are (batch, tokens, heads, width), arguments those of its native backend."""

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        _parallel_config: Any = None,
    ) -> Tensor:
        if dropout_p or return_lse or _parallel_config is not None:
            raise ModelError(
                "attention of mxdit has no dropout, gives no log-sum-exp, and is not split over devices",
                where=f"attention backend {BACKENDS[method]!r}",
                got=f"dropout_p={dropout_p}, return_lse={return_lse}, parallel: {_parallel_config is not None}",
                hint="Take another backend of diffusers for that.",
            )
        if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
            raise ModelError(
                "attention of mxdit has no gradient",
                where=f"attention backend {BACKENDS[method]!r}",
                hint="Take diffusers' native backend to train, or torch.no_grad() to run.",
            )
        if attn_mask is not None and attn_mask.ndim == 2 and attn_mask.shape == (query.shape[0], key.shape[1]):
            attn_mask = attn_mask[:, None, None]  # of keys, as diffusers' native backend reads it
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return torch.ops.mxdit.attention(query, key, value, attn_mask, scale, is_causal, method)

    return attend


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> attention layer, of those whose backend diffusers looks up by name."""
    return {
        path: module
        for path, module in uncompiled(model).named_modules()
        if hasattr(getattr(module, "processor", None), _HELD)
    }


def attend(module: nn.Module, policy: AttentionPolicy) -> None:
    """Give the attention layers of a module, such as a block, what a policy without steps says, for good."""
    for processor, method in methods_of(module, policy).items():
        if method != DEFAULT:
            setattr(processor, _HELD, AttentionBackendName(BACKENDS[method]))


def methods_of(module: nn.Module, policy: AttentionPolicy) -> dict[Any, str]:
    """Attention processor -> its method, where no step says another one. Raises as `attention_policy`; the module may be a
    skeleton."""
    layers = attention_layers(module)
    if not layers:
        raise ModelError(
            "diffusers computes this model's attention without looking up a backend",
            field=FIELD,
            where=type(module).__name__,
            got=repr(str(policy)),
            expected="attention processors with a backend's name, as WanTransformer3DModel has them",
            hint='Leave the policy out, which is attention="torch".',
        )
    named = resolve(module, list(layers), policy.layers, "layers", kind="an attention layer", field=FIELD)
    methods: dict[Any, str] = {}
    for path, layer in layers.items():
        own = policy.layers[named[path]] if path in named else policy.method
        if methods.setdefault(layer.processor, own) != own:  # one name is all that layers with one processor can have
            raise InputError(
                "layers with one processor, and two methods", field="attention", where=path, got=str(policy)
            )
    stubborn = {
        path: why
        for path, layer in layers.items()
        if {methods[layer.processor], *policy.steps} != {DEFAULT} and (why := _why_not(type(layer.processor)))
    }
    if stubborn:
        path, why = next(iter(stubborn.items()))
        left = dict.fromkeys((re.sub(r"(?<=\.)\d+(?=\.)", "*", path) for path in stubborn), DEFAULT)
        others = replace(policy, layers={**left, **policy.layers, **left}, steps={}, of=None)
        raise ModelError(
            "diffusers does not always compute this layer's attention by the backend that is set",
            field=FIELD,
            where=f"{type(module).__name__} {path}",
            got=f"{type(layers[path].processor).__name__}, which {why}",
            expected=f"a processor whose every call of attention takes self.{_HELD}",
            hint=f"Leave {len(stubborn)} of its {len(layers)} layers to diffusers, at every step: {str(others)!r}."
            if others and len(stubborn) < len(layers)
            else "Leave the policy out.",
        )
    return methods


@cache
def _why_not(processor: type) -> str | None:
    """Why a call of a processor's class may compute attention by another backend than the one set, as its source says; None
    where it does not. Masks of one backend's own kind are why: such a processor goes past what is set, or refuses it. What its
    methods call outside the class is not read."""
    if wanted := getattr(processor, _HELD, None):
        return f"is made for the backend {wanted!r}"
    try:  # a method's source is indented, but not the lines of a string in it
        trees = [ast.parse("if 1:\n" + indent(inspect.getsource(each), " ")) for each in _methods(processor)]
    except (OSError, SyntaxError):
        return "has no source to read"
    looks = False
    for call in (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func).rpartition(".")[2]
        if name in _DIRECT:
            return f"calls {name}"
        if name == dispatch_attention_fn.__name__:
            looks, taken = True, {each.arg: ast.unparse(each.value) for each in call.keywords}.get("backend")
            if taken != f"self.{_HELD}":
                return f"also takes backend={taken}"
    return None if looks else f"does not call {dispatch_attention_fn.__name__}"


def _methods(processor: type) -> Iterator[FunctionType]:
    """Those that calling a processor may run: its own, and what they stand in for where they call `super`."""
    for name in dict.fromkeys(name for cls in processor.__mro__ for name in vars(cls)):
        if name.startswith("__") and name != "__call__":
            continue
        for cls in processor.__mro__:
            method = vars(cls).get(name)
            method = getattr(method, "__func__", method)  # of static and class methods
            if isinstance(method, FunctionType):
                yield method
                if "super" not in method.__code__.co_names:
                    break


class AppliedAttention:
    """What `attention_policy` put on a pipeline. `remove` takes it away, and so does the end of a `with` block."""

    def __init__(self, switches: Mapping[str, AttentionSwitch]) -> None:
        self.policies = {name: switch.policy for name, switch in switches.items()}
        self._switches = tuple(switches.values())

    def remove(self) -> None:
        """Let every layer compute attention as it did before. Harmless when it is called twice."""
        for switch in self._switches:
            switch.remove()

    def __enter__(self) -> AppliedAttention:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def attention_policy(pipe: Any, policy: AttentionLike) -> AppliedAttention:
    """Let the transformers of a pipeline compute attention by a policy, in every later call of theirs until `remove`.

    A later call on the same pipeline takes the place of an earlier one. While a transformer is not called, its layers have
    the backends that `set_attention_backend` gave them.

        >>> mxdit.attention_policy(pipe, "int8")
        >>> with mxdit.attention_policy(pipe, "int8;0-1=exact;blocks.0.*=torch"):
        ...     video = pipe(prompt, num_inference_steps=40)

    Args:
        pipe: a pipeline of diffusers; what its weights are does not matter.
        policy: an `AttentionPolicy`, its JSON or its text form for all transformers; as JSON it may have others under
            `transformer` and `transformer_2`, each in any of these forms.

    Raises:
        ConfigError: no policy, or layers that there are not.
        ModelError: a model, or a layer, whose attention diffusers does not always look up by name; a pipeline that does not
            count its steps.
    """
    models = {name: model for name in COMPONENTS if isinstance(model := getattr(pipe, name, None), nn.Module)}
    chosen = AttentionPolicy.of_each(policy, models, COMPONENTS)
    for model in models.values():
        if (before := _SWITCHES.get(uncompiled(model))) is not None:
            before.remove()
    at = partial(step_of, pipe, where="attention_policy")
    return AppliedAttention({name: AttentionSwitch(models[name], one, at) for name, one in chosen.items()})


class AttentionSwitch:
    """Gives the attention layers of a model their backends around each of its calls, until `remove`.

    Args:
        model: a transformer of diffusers, or what `torch.compile` made of it.
        policy: what it switches to.
        at: (step, steps) of the call that begins; asked only where the policy names steps.

    Raises ModelError and ConfigError as `attention_policy`.
    """

    def __init__(self, model: nn.Module, policy: AttentionPolicy, at: Callable[[], tuple[int, int]]) -> None:
        inner = uncompiled(model)
        self.policy, self._at, self._methods = policy, at, methods_of(inner, policy)
        self._before: list[tuple[Any, Any]] = []
        _SWITCHES[inner] = self
        self._hooks = (
            model.register_forward_pre_hook(self._enter),
            model.register_forward_hook(self._leave, always_call=True),
        )

    def _enter(self, *_: Any) -> None:
        self._restore()
        at_step = self.policy.method_at(*self._at()) if self.policy.steps else None
        for processor, own in self._methods.items():
            method = at_step or own
            if method != DEFAULT:
                self._before.append((processor, getattr(processor, _HELD)))
                setattr(processor, _HELD, AttentionBackendName(BACKENDS[method]))

    def _leave(self, *_: Any) -> None:
        self._restore()

    def _restore(self) -> None:
        for processor, before in self._before:
            setattr(processor, _HELD, before)
        self._before.clear()

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._restore()


_SWITCHES: WeakKeyDictionary[nn.Module, AttentionSwitch] = WeakKeyDictionary()

register()
