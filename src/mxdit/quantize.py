"""Applying a config to a model: what each linear becomes, why the others stay, and what that saves.

`plan` decides, from names alone; `quantize_` carries the plan out on a model in memory; the diffusers integration carries
out the same plan while a checkpoint loads.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from mxdit.config import ConfigLike, MXConfig, check_activation, near_names
from mxdit.errors import ConfigError, FormatError, ModelError
from mxdit.formats import block_format, scheme_for
from mxdit.layers import MXLinear
from mxdit.models import ModelSpec, spec_of
from mxdit.report import LayerReport, QuantReport
from mxdit.version import __version__

logger = logging.getLogger(__name__)

# The first blocks are the most sensitive to dual-scale FP4: vLLM-Omni keeps 5 of them, in models of 30 and of 40 blocks. No
# model gives up more than the share that 5 of 30 are, or a model of a few blocks would have nothing left to quantize.
FALLBACK_BLOCKS = {"mxfp4_dualscale": 5}
FALLBACK_SHARE = 6


@dataclass(frozen=True)
class Decision:
    """What becomes of one linear: a scheme and the activation that goes with it, or the reason why it stays as it is."""

    scheme: str | None = None
    activation: str | None = None
    reason: str = ""

    def __str__(self) -> str:
        return self.scheme or self.reason


def plan(model: nn.Module, config: ConfigLike) -> dict[str, Decision]:
    """Decide for every linear of `model`, by its path and in the model's order, what `config` makes of it.

    Looks at names and module types only, so the model may be on the meta device, or quantized already.

    Raises:
        ModelError: no ModelSpec knows the model's class.
        ConfigError: a pattern matches no linear, layers that runtimes fuse would differ, or nothing would be quantized.
    """
    config, spec = MXConfig.of(config), spec_of(model)
    linears = [path for path, module in model.named_modules() if isinstance(module, (nn.Linear, MXLinear))]
    ignored = _resolve(model, linears, config.ignored_layers, "ignored_layers")
    raised = _resolve(model, linears, config.w4a8_fallback_layers, "w4a8_fallback_layers")
    blocks = _block_count(model, spec)
    first = fallback_blocks(config, blocks)

    decisions: dict[str, Decision] = {}
    for path in linears:
        block = spec.block_of(path)
        if block is None:
            decisions[path] = Decision(reason=f"outside the {spec.blocks}")
        elif path in ignored:
            pattern = "" if ignored[path] == path else f": {ignored[path]}"
            decisions[path] = Decision(reason=f"ignored_layers{pattern}")
        elif block[0] < first:
            decisions[path] = Decision(reason=f"num_bf16_fallback_layers: {first}")
        elif _features(model, path) % block_format(config.quant_method).per_byte:
            decisions[path] = Decision(reason="odd number of input features")
        elif any(fnmatchcase(block[1], pattern) for pattern in spec.keep):
            decisions[path] = Decision(reason=f"kept by the spec of {spec.transformer}")
        else:
            activation = "mxfp8" if path in raised else config.effective_activation
            decisions[path] = Decision(scheme_for(config.quant_method, activation).name, activation)

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
    _check_groups(decisions, spec)
    return decisions


def quantize_(model: nn.Module, config: ConfigLike) -> QuantReport:
    """Quantize `model` in place, one layer at a time, and report what became of each.

    A layer's weight is encoded on the device it is on and freed before the next one is read, so memory never holds more
    than the model plus one layer. A diffusers model also notes the config, so that `save_pretrained` writes it.

    Raises what `plan` raises, and ModelError for a model that is quantized already or whose weights are not loaded.
    """
    config, _ = MXConfig.of(config), spec_of(model)
    if config.is_checkpoint_serialized:
        raise ConfigError(
            "the config is one of a serialized checkpoint, and this model is to be quantized now",
            where=type(model).__name__,
            hint="Leave is_checkpoint_serialized out, or load the checkpoint with from_pretrained.",
        )
    for path, module in model.named_modules():
        if isinstance(module, MXLinear):
            raise ModelError("the model is quantized already", where=path, got=module.method, expected="an nn.Linear")
        if isinstance(module, nn.Linear) and module.weight.is_meta:
            raise ModelError("the weight is not loaded", where=path, got="a tensor on the meta device")
    decisions = plan(model, config)
    for path, decision in decisions.items():
        if decision.scheme:
            linear = model.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            swap(model, path, quantized(linear.weight, linear.bias, config, decision, path))
            del linear  # or its weight would live until the next one is quantized
    record(model, config, decisions)
    return report_of(model, decisions)


def set_activation(model: nn.Module, activation: str, layers: Iterable[str] | None = None) -> None:
    """Set what the activations of a quantized model are quantized to, over the same weights, from the next call on.

    Args:
        model: a model that mxdit quantized or loaded.
        activation: "mxfp4", "mxfp8" or "bf16" (not at all).
        layers: paths or globs of the linears it applies to; None means every quantized one.

    Raises:
        ConfigError: a pattern matches no quantized linear, the weights do not go with such activations, or layers that
            runtimes fuse would differ.
        ModelError: the model has no quantized linear.
    """
    spec = spec_of(model)
    quantized_layers = {path: module for path, module in model.named_modules() if isinstance(module, MXLinear)}
    if not quantized_layers:
        raise ModelError(
            "the model has no quantized linear", where=type(model).__name__, hint="Quantize it first: mxdit.quantize_."
        )
    patterns = ["*"] if layers is None else _pattern_list(layers)
    chosen = _resolve(model, list(quantized_layers), patterns, "layers", kind="a quantized linear")
    for path in chosen:
        check_activation(quantized_layers[path].method, activation, where=path)
    after = {path: activation if path in chosen else layer.activation for path, layer in quantized_layers.items()}
    _check_groups(
        {p: Decision(scheme_for(layer.method, after[p]).name, after[p]) for p, layer in quantized_layers.items()}, spec
    )
    for path in chosen:
        quantized_layers[path].activation = activation
    _note_activations(model, quantized_layers)


def report_of(model: nn.Module, decisions: Mapping[str, Decision] | None = None) -> QuantReport:
    """What the linears of `model` are now, whichever way they came to be so.

    Args:
        model: a transformer that a ModelSpec knows.
        decisions: what `plan` said; by default the plan of the config that the model was quantized or loaded with.
    """
    spec = spec_of(model)
    recorded = _recorded(model)
    if decisions is None:
        decisions = plan(model, recorded) if recorded else {}
    float_size = next((p.element_size() for p in model.parameters() if p.is_floating_point()), torch.bfloat16.itemsize)
    layers = []
    for path, module in model.named_modules():
        if not isinstance(module, (nn.Linear, MXLinear)):
            continue
        shape = (module.out_features, module.in_features)
        after = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
        if isinstance(module, MXLinear):
            size = float_size if module.bias is None else module.bias.element_size()
            before = shape[0] * shape[1] * size + (0 if module.bias is None else module.bias.nbytes)
            layers.append(LayerReport(path, module.method, module.scheme, shape, before, after))
        else:
            decision = decisions.get(path)
            reason = (
                decision.reason
                if decision
                else "not quantized"
                if spec.block_of(path)
                else f"outside the {spec.blocks}"
            )
            layers.append(LayerReport(path, None, None, shape, after, after, reason))
    return QuantReport(type(model).__name__, tuple(layers))


def fallback_blocks(config: MXConfig, blocks: int) -> int:
    """How many of a model's first blocks stay in their float dtype."""
    if config.num_bf16_fallback_layers is not None:
        return config.num_bf16_fallback_layers
    if config.is_checkpoint_serialized:
        return 0
    return min(FALLBACK_BLOCKS.get(config.quant_method, 0), blocks // FALLBACK_SHARE)


def quantized(weight: Tensor, bias: Tensor | None, config: MXConfig, decision: Decision, path: str) -> MXLinear:
    """The layer that `decision` makes of the float weight (N, K) and bias (N,) or None of `path`, on the weight's device.

    Raises ModelError, with the path, for a weight that cannot be quantized: one that holds an inf or a NaN.
    """
    try:
        return MXLinear.from_weight(
            weight, bias, method=str(config.quant_method), activation=decision.activation, rule=config.rule
        )
    except FormatError as error:
        raise ModelError(
            error.what, where=f"{path}.weight", got=error.got, expected=error.expected, hint=error.hint
        ) from error


def swap(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path` of `model`, with the training flag of what was there."""
    parent, _, name = path.rpartition(".")
    module.train(model.get_submodule(path).training)
    setattr(model.get_submodule(parent), name, module)


def record(model: nn.Module, config: MXConfig, decisions: Mapping[str, Decision]) -> None:
    """Note in a diffusers model's own config how its tensors are stored, for `save_pretrained` to write."""
    register = getattr(model, "register_to_config", None)
    if callable(register):
        kept = [path for path, decision in decisions.items() if not decision.scheme]
        register(quantization_config=config.serialized(kept, {"mxdit": __version__}))


def _note_activations(model: nn.Module, layers: Mapping[str, MXLinear]) -> None:
    """Bring a diffusers model's recorded config up to date with the activations that its layers now have."""
    recorded = _recorded(model)
    if recorded is None:
        return
    # A config can say one activation, and MXFP8 for some layers.
    others = {layer.activation for layer in layers.values()} - {"mxfp8"}
    if len(others) > 1:
        logger.warning(
            "%s: activations in %s at once hold for this run only; a saved copy would run with %s",
            type(model).__name__,
            " and ".join(sorted(others)),
            recorded.effective_activation,
        )
        return
    base = others.pop() if others else "mxfp8"
    raised = [path for path, layer in layers.items() if layer.activation != base]
    updated = replace(recorded, activation=base, w4a8_fallback_layers=tuple(raised))
    model.register_to_config(quantization_config=updated)  # pyright: ignore[reportCallIssue]


def _recorded(model: nn.Module) -> MXConfig | None:
    """The config that `record` left in a diffusers model."""
    recorded = getattr(getattr(model, "config", None), "quantization_config", None)
    return recorded if isinstance(recorded, MXConfig) else None


def _features(model: nn.Module, path: str) -> int:
    linear = model.get_submodule(path)
    assert isinstance(linear, (nn.Linear, MXLinear))
    return linear.in_features


def _block_count(model: nn.Module, spec: ModelSpec) -> int:
    blocks = model.get_submodule(spec.blocks)
    if isinstance(blocks, nn.ModuleList):
        return len(blocks)
    raise ModelError(
        "the model is not built as its ModelSpec says",
        where=f"{type(model).__name__}.{spec.blocks}",
        got=type(blocks).__name__,
        expected="a ModuleList",
    )


def _pattern_list(layers: Iterable[str]) -> list[str]:
    if isinstance(layers, str):
        raise ConfigError(
            "layers is one string", where="set_activation", got=repr(layers), expected=f"a list, as in {[layers]}"
        )
    return list(layers)


def _resolve(
    model: nn.Module, linears: list[str], patterns: Iterable[str], key: str, kind: str = "a linear layer"
) -> dict[str, str]:
    """The linears that paths and globs name, each with the first pattern that named it; ConfigError for an idle pattern."""
    found: dict[str, str] = {}
    for pattern in patterns:
        matches = [path for path in linears if path == pattern or fnmatchcase(path, pattern)]
        if not matches:
            raise _idle_pattern(model, linears, pattern, key, kind)
        for path in matches:
            found.setdefault(path, pattern)
    return found


def _idle_pattern(model: nn.Module, linears: list[str], pattern: str, key: str, kind: str) -> ConfigError:
    others = [(path, module) for path, module in model.named_modules() if path and fnmatchcase(path, pattern)]
    if not others:
        hint = near_names(pattern, linears) or f"Paths look like {linears[0]!r}; '*' matches anything."
        return ConfigError("the pattern matches nothing", where=f"{key} {pattern!r}", expected=kind, hint=hint)
    path, module = others[0]
    inside = [name for name in linears if name.startswith(f"{path}.")]
    hint = f"To name the {len(inside)} linears inside it, write '{pattern}.*'." if inside else "Leave it out."
    got = f"{path!r}, a {type(module).__name__}"
    return ConfigError("the pattern matches no linear", where=f"{key} {pattern!r}", got=got, expected=kind, hint=hint)


def _check_groups(decisions: Mapping[str, Decision], spec: ModelSpec) -> None:
    """Layers with one input are one product in the runtimes that fuse them: one precision for all of them, or none."""
    by_block: dict[int, dict[str, tuple[str, Decision]]] = {}
    for path, decision in decisions.items():
        block = spec.block_of(path)
        if block:
            by_block.setdefault(block[0], {})[block[1]] = (path, decision)
    for index, inside in by_block.items():
        for group in spec.groups:
            members = [inside[name] for name in group if name in inside]
            if len({decision.scheme for _, decision in members}) > 1:
                raise ConfigError(
                    "layers that share their input would differ in precision",
                    where=f"{spec.blocks}.{index}",
                    got=", ".join(f"{path} {decision.scheme or 'kept'}" for path, decision in members),
                    expected="the same for all of them, because runtimes fuse them",
                    hint="Name all of them in ignored_layers (or w4a8_fallback_layers), or none.",
                )
