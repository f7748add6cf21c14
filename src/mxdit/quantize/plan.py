"""Deciding, from names and module types alone, what a config makes of every linear of a model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate

from torch import nn

from mxdit.config import ConfigLike, MXConfig
from mxdit.config.choices import near_names
from mxdit.errors import ConfigError, ModelError
from mxdit.layers import linears_of
from mxdit.models import ModelSpec, spec_of, uncompiled
from mxdit.numerics.formats import block_format, scheme_for
from mxdit.quantize.tables import table_of

logger = logging.getLogger(__name__)
# The first blocks are the most sensitive to dual-scale FP4: vLLM-Omni keeps 5 of them, in models of 30 and of 40 blocks. No
# model gives up more than the share that 5 of 30 are, or a model of a few blocks would have nothing left to quantize.
FALLBACK_BLOCKS = {"mxfp4_dualscale": 5}
FALLBACK_SHARE = 6
OUTSIDE = "outside the blocks"


@dataclass(frozen=True)
class Decision:
    """What becomes of one linear: a scheme, its activation and its weight's method, or the reason why it stays as it is."""

    scheme: str | None = None
    activation: str | None = None
    reason: str = ""
    method: str | None = None

    def __str__(self) -> str:
        return self.scheme or self.reason


def plan(model: nn.Module, config: ConfigLike, *, spec: ModelSpec | None = None) -> dict[str, Decision]:
    """Decide for every linear of `model`, by its path and in the model's order, what `config` makes of it.

    Looks at names and module types only, so the model may be on the meta device, or quantized already. `spec` is by default
    the one that is registered for the model's class.

    Raises:
        ModelError: no ModelSpec knows the model's class, or `spec` is one of another model.
        ConfigError: a pattern matches no linear, layers that runtimes fuse would differ, or nothing would be quantized.
    """
    model, config = uncompiled(model), MXConfig.of(config)
    if spec is not None and spec.transformer not in {cls.__name__ for cls in type(model).__mro__}:
        raise ModelError(
            "the ModelSpec is of another model", where="spec", got=spec.transformer, expected=type(model).__name__
        )
    spec = spec or spec_of(model)
    table_of(config, spec)
    found = dict(linears_of(model))
    linears = list(found)
    ignored = resolve(model, linears, config.ignored_layers, "ignored_layers")
    raised = resolve(model, linears, config.w4a8_fallback_layers, "w4a8_fallback_layers")
    others = _others(model, linears, config)
    counts = block_counts(model, spec)
    blocks = sum(counts.values())
    first = fallback_blocks(config, blocks)
    before = dict(
        zip(counts, accumulate(counts.values(), initial=0), strict=False)
    )  # blocks that run before a list's first

    decisions: dict[str, Decision] = {}
    for path in linears:
        place, method = spec.place_of(path), others.get(path, str(config.quant_method))
        if place is None:
            decisions[path] = Decision(reason=OUTSIDE)
        elif path in ignored:
            pattern = "" if ignored[path] == path else f": {ignored[path]}"
            decisions[path] = Decision(reason=f"ignored_layers{pattern}")
        elif before[place.blocks] + place.index < first and (config.num_bf16_fallback_layers or path not in others):
            decisions[path] = Decision(reason=f"num_bf16_fallback_layers: {first}")
        elif found[path].in_features % block_format(method).per_byte:
            decisions[path] = Decision(reason="odd number of input features")
        elif (kept := spec.kept(place.inside)) is not None:
            decisions[path] = Decision(reason=f"kept by the spec of {spec.transformer}: {kept}")
        else:
            activation = "mxfp8" if path in raised else config.activation_of(method)
            decisions[path] = Decision(scheme_for(method, activation).name, activation, method=method)

    if not any(decision.scheme for decision in decisions.values()):
        raise ConfigError(
            "the config leaves nothing quantized",
            where=type(model).__name__,
            got=f"{len(linears)} linears, of which ignored_layers keeps {len(ignored)}, and {first} fallback blocks",
            expected=f"at least one linear of its {blocks} blocks",
            hint="Shorten ignored_layers or lower num_bf16_fallback_layers, or load the model without a quantization config.",
        )
    idle = [path for path in raised if not decisions[path].scheme]
    if idle:
        raise ConfigError(
            "a layer is to run with MXFP8 activations and is not quantized",
            where="w4a8_fallback_layers",
            got=f"{idle[0]!r}, which stays: {decisions[idle[0]].reason}",
            hint="Leave it out, or let it be quantized.",
        )
    _check_methods(model, linears, config, decisions)
    check_groups(decisions, spec)
    return decisions


def fallback_blocks(config: MXConfig, blocks: int) -> int:
    """How many of a model's first blocks stay in their float dtype."""
    if config.num_bf16_fallback_layers is not None:
        return config.num_bf16_fallback_layers
    if config.is_checkpoint_serialized:
        return 0
    return min(FALLBACK_BLOCKS.get(config.quant_method, 0), blocks // FALLBACK_SHARE)


def _others(model: nn.Module, linears: list[str], config: MXConfig) -> dict[str, str]:
    """The linears that `layer_methods` names, each with its method; ConfigError where that would be two."""
    found: dict[str, str] = {}
    for method, patterns in config.layer_methods.items():
        for path in resolve(model, linears, patterns, f"layer_methods {method}"):
            if path in found:
                got = f"{path!r} under '{found[path]}' and '{method}'"
                raise ConfigError("a layer has two methods", where="layer_methods", got=got, hint="Keep one of them.")
            found[path] = method
    return found


def _check_methods(model: nn.Module, linears: list[str], config: MXConfig, decisions: Mapping[str, Decision]) -> None:
    """Raise ConfigError for a pattern of `layer_methods` that comes to nothing, and where none is left for `quant_method`."""
    for method, patterns in config.layer_methods.items():
        for pattern in patterns:
            named = matches(linears, pattern)
            if not any(decisions[path].scheme for path in named):
                raise ConfigError(
                    "layers are to have another method, and none of them is quantized",
                    where=f"layer_methods {method} {pattern!r}",
                    got=f"{named[0]!r}, which stays: {decisions[named[0]].reason}",
                    hint="Leave the pattern out, or let a layer of it be quantized.",
                )
    if config.layer_methods and not any(of.method == config.quant_method for of in decisions.values()):
        raise ConfigError(
            "every quantized layer has another method than quant_method",
            where=type(model).__name__,
            got=f"quant_method '{config.quant_method}', and layer_methods of {' and '.join(config.layer_methods)}",
            hint="Name the method that most layers have as quant_method, and the exceptions in layer_methods.",
        )


def block_counts(model: nn.Module, spec: ModelSpec) -> dict[str, int]:
    """How many blocks each of the spec's lists has in this model, in the order in which they run.

    Raises ModelError where the model is not built as its spec says.
    """
    counts, modules = {}, dict(model.named_modules())
    for name in spec.blocks:
        blocks = modules.get(name)
        if not isinstance(blocks, nn.ModuleList):
            raise ModelError(
                "the model is not built as its ModelSpec says",
                where=f"{type(model).__name__}.{name}",
                got="nothing" if blocks is None else type(blocks).__name__,
                expected="a ModuleList",
            )
        counts[name] = len(blocks)
    return counts


def resolve(
    model: nn.Module,
    layers: list[str],
    patterns: Iterable[str],
    key: str,
    kind: str = "a linear layer",
    field: str | None = None,
) -> dict[str, str]:
    """The layers that paths and globs name, each with the first pattern that named it; ConfigError for an idle pattern."""
    found: dict[str, str] = {}
    for pattern in patterns:
        named = matches(layers, pattern)
        if not named:
            raise _idle_pattern(model, layers, pattern, f"{key} {pattern!r}", kind, field)
        for path in named:
            found.setdefault(path, pattern)
    return found


def matches(linears: Iterable[str], pattern: str) -> list[str]:
    """The linears that a path or glob names."""
    return [path for path in linears if path == pattern or fnmatchcase(path, pattern)]


def _idle_pattern(
    model: nn.Module, layers: list[str], pattern: str, where: str, kind: str, field: str | None
) -> ConfigError:
    others = [(path, module) for path, module in model.named_modules() if path and fnmatchcase(path, pattern)]
    if not others:
        hint = near_names(pattern, layers) or f"Paths look like {layers[0]!r}; '*' matches anything."
        return ConfigError("the pattern matches nothing", field=field, where=where, expected=kind, hint=hint)
    path, module = others[0]
    inside = [name for name in layers if name.startswith(f"{path}.")]
    hint = f"To name the {len(inside)} inside it, write '{pattern}.*'." if inside else "Leave it out."
    got = f"{path!r}, a {type(module).__name__}"
    return ConfigError("the pattern matches no such layer", field=field, where=where, got=got, expected=kind, hint=hint)


def check_groups(decisions: Mapping[str, Decision], spec: ModelSpec) -> None:
    """Layers with one input are one product in the runtimes that fuse them: one precision for all of them, or none."""
    for members in spec.sharing(decisions):
        schemes = {decisions[path].scheme for path in members}
        if len({decisions[path].method for path in members}) > 1 or len(schemes) > 1:
            place = spec.place_of(members[0])
            assert place is not None
            # W4A4 is over two formats of weights.
            said = {path: decisions[path].scheme if len(schemes) > 1 else decisions[path].method for path in members}
            raise ConfigError(
                "layers that share their input would differ in precision",
                where=f"{place.blocks}.{place.index}",
                got=", ".join(f"{path} {how or 'kept'}" for path, how in said.items()),
                expected="the same for all of them, because runtimes fuse them",
                hint="Name all of them in ignored_layers (or w4a8_fallback_layers, or layer_methods), or none.",
            )
