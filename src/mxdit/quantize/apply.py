"""Carrying a plan out on a model in memory, one layer at a time."""

from __future__ import annotations

from torch import Tensor, nn

from mxdit.config import ConfigLike, MXConfig
from mxdit.errors import ConfigError, FormatError, ModelError
from mxdit.layers import HostedLinear, MXLinear
from mxdit.models import TEXT_ENCODERS, ModelSpec, adopt, spec_of, uncompiled
from mxdit.quantize.plan import Decision, plan
from mxdit.quantize.preconditions import check_modules, check_state, check_weights
from mxdit.quantize.recorded import record
from mxdit.quantize.report import QuantReport, report_of
from mxdit.quantize.tables import put_table, skeleton_table, table_of
from mxdit.weights import quantize_weight


def quantize_(model: nn.Module, config: ConfigLike, *, spec: ModelSpec | None = None) -> QuantReport:
    """Quantize `model` in place, one layer at a time, and report what became of each.

    A layer's weight is encoded on the device it is on and freed before the next one is read, so memory never holds more
    than the model plus one layer. A diffusers model also notes the config, so that `save_pretrained` writes it.

    With `spec`, which need not be registered, the model's class may be one that mxdit does not know; from then on this model
    has it. A checkpoint that `save_pretrained` makes of it says nothing of the spec: who loads it, in this process or another,
    calls `mxdit.models.register_family(spec)` first, or installs a package with an entry point for it
    (docs/adapting-a-model.md).

    Raises what `plan` raises, and ModelError for a model that is quantized already, whose weights are elsewhere (offloaded,
    not loaded, in another library's form), or whose modules are not those that its config makes (adapters, fused
    projections): see `preconditions`.
    """
    model, config = uncompiled(model), MXConfig.of(config)
    own, spec = spec, spec or spec_of(model)
    layer = HostedLinear if spec.components == TEXT_ENCODERS else MXLinear
    if config.is_checkpoint_serialized:
        raise ConfigError(
            "the config is one of a serialized checkpoint, and this model is to be quantized now",
            where=type(model).__name__,
            hint="Leave is_checkpoint_serialized out, or load the checkpoint with from_pretrained.",
        )
    for path, module in model.named_modules():
        if isinstance(module, MXLinear):
            raise ModelError("the model is quantized already", where=path, got=module.method, expected="an nn.Linear")
    check_weights(model)
    check_modules(model)
    decisions = plan(model, config, spec=own)
    if own is not None:
        adopt(model, own)
    for path, decision in decisions.items():
        if decision.scheme:
            linear = model.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            swap(model, path, quantized(linear.weight, linear.bias, config, decision, path, layer))
            del linear  # or its weight would live until the next one is quantized
    table = table_of(config, spec)
    if table is not None:
        packed = skeleton_table(model, config, table)
        embedding = model.get_submodule(table)
        assert isinstance(embedding, nn.Embedding)
        packed.load(quantize_weight(embedding.weight, str(config.embedding), where=f"{table}.weight"))
        put_table(model, spec, packed)
    model.register_load_state_dict_pre_hook(check_state)
    record(model, config, decisions)
    return report_of(model, decisions)


def quantized(
    weight: Tensor,
    bias: Tensor | None,
    config: MXConfig,
    decision: Decision,
    path: str,
    layer: type[MXLinear] = MXLinear,
) -> MXLinear:
    """The `layer` that `decision` makes of the float weight (N, K) and bias (N,) or None of `path`, on the weight's device.

    Raises ModelError, with the path, for a weight that cannot be quantized: one that holds an inf or a NaN.
    """
    method = decision.method
    assert method is not None
    try:
        return layer.from_weight(
            weight, bias, method=method, activation=decision.activation, rule=config.rule_of(method)
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
