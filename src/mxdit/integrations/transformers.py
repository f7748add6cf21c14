"""The quantizer that transformers hosts, for text encoders: online inside `from_pretrained`, saved, and reloaded by itself.

Importing this module registers every method of mxdit with transformers (4.57 to 5), each with the prefix of
`mxdit.config.encoders`; `import mxdit` sees to it that the import happens when transformers is imported. The two majors load
in different ways: 4.57 asks for each parameter that is to be quantized (`create_quantized_param`), 5 runs an operation on it
(`get_quantize_ops`) and fills a quantized model's buffers itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mxdit.checkpoint.checks import SMALL
from mxdit.checkpoint.fitting import read_headers
from mxdit.config import Method, MXConfig
from mxdit.config.encoders import PREFIX, encoder_config, read_stated, stated
from mxdit.embedding import MXEmbedding
from mxdit.errors import CheckpointError, ConfigError, FormatError
from mxdit.layers import HostedLinear, MXLinear
from mxdit.models import spec_of
from mxdit.numerics.formats import FLOATS, PARTS, TensorInfo
from mxdit.packed import PackedModule
from mxdit.quantize.apply import quantized, swap
from mxdit.quantize.plan import Decision, plan
from mxdit.quantize.preconditions import check_state
from mxdit.quantize.recorded import record
from mxdit.quantize.report import report_of
from mxdit.quantize.tables import put_table, skeleton_table, table_of
from mxdit.weights import quantize_weight

logger = logging.getLogger(__name__)
OPERATIONS = int(transformers.__version__.partition(".")[0]) >= 5  # whether weights pass through operations


class EncoderConfig(QuantizationConfigMixin):
    """What `from_pretrained(quantization_config=)` of a transformers model takes: an `MXConfig`, by transformers' rules.

    Args:
        config: what `encoder_config` takes: "mxfp8", {"quant_method": "mxfp8", ...} or an MXConfig.
    """

    def __init__(self, config: object) -> None:
        self.config = encoder_config(config, "text_encoder")
        self.quant_method: Any = PREFIX + str(self.config.quant_method)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(read_stated(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return stated(self.config)


class MXTransformersQuantizer(HfQuantizer):
    """Quantizes one text encoder while transformers loads it, or loads one that is quantized already."""

    requires_parameters_quantization = True  # 4.57: that `create_quantized_param` is to be called

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.config: MXConfig = quantization_config.config
        if self.config.is_checkpoint_serialized != self.pre_quantized:
            raise ConfigError(
                "the config passed to from_pretrained says that the checkpoint is quantized, and its config.json does not"
                if self.config.is_checkpoint_serialized
                else "config.json states a quantization that was never carried out",
                where="is_checkpoint_serialized",
                got=self.config.is_checkpoint_serialized,
                expected=self.pre_quantized,
                hint="Leave the key out to quantize while loading; a directory of mxdit needs no config at all.",
            )
        self.decisions: dict[str, Decision] = {}
        self.table: str | None = None
        self.dtype: torch.dtype | None = None

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    # -- before the weights ------------------------------------------------------------------------------------------

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise ConfigError(
                "quantized layers cannot be offloaded to disk while loading", where="device_map", got="'disk'"
            )
        if self.pre_quantized and self.config.quant_method == Method.MXFP4_DUALSCALE and not OPERATIONS:
            # 4.57 casts every float of a file to the model's dtype, and an outer scale in BF16 is another number.
            raise ConfigError(
                "this transformers would round the outer scales of mxfp4_dualscale",
                where="transformers",
                got=transformers.__version__,
                expected="5 or newer",
                hint="Upgrade it, or quantize the text encoder to mxfp4.",
            )

    def update_dtype(self, dtype: Any) -> Any:
        if isinstance(dtype, torch.dtype) and dtype not in FLOATS:
            raise ConfigError(
                "unsupported dtype", where="from_pretrained", got=dtype, expected=" or ".join(map(str, FLOATS))
            )
        self.dtype = dtype
        return dtype

    update_torch_dtype = update_dtype  # its name in 4.57's base class, which warns

    def adjust_target_dtype(self, dtype: Any) -> torch.dtype:
        return torch.uint8  # for device_map="auto" in 4.57

    @property
    def quantized_element_size(self) -> float:
        return 1.0  # likewise in 5: a byte an element, which no method exceeds by more than its scales

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Iterable[str] | None = None, **kwargs: Any
    ) -> Any:
        self.decisions = plan(model, self._without_float32(model))
        self.table = table_of(self.config, spec_of(model))
        if self.table is not None:
            packed = skeleton_table(model, self.config, self.table)
            if not OPERATIONS:
                _mark(packed)
            put_table(model, spec_of(model), packed)
        if not self.pre_quantized:
            return model  # each linear stays until its weight arrives
        for path, decision in self.decisions.items():
            if decision.scheme:
                swap(model, path, self._skeleton(model.get_submodule(path), decision))
        if checkpoint_files is not None:
            self._check_files(checkpoint_files)
        return model

    def _without_float32(self, model: nn.Module) -> MXConfig:
        """The config, which leaves what transformers keeps in FP32 where all else is FP16: T5's `wo`, whose results exceed
        FP16's range."""
        if self.dtype is not torch.float16:
            return self.config
        names = getattr(model, "_keep_in_fp32_modules", None) or ()
        linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        kept = [path for path in linears if path.rpartition(".")[2] in names]
        if not self.pre_quantized:
            return replace(self.config, ignored_layers=(*self.config.ignored_layers, *kept))
        packed = sorted({*kept} - {*self.config.ignored_layers})
        if packed:
            raise ConfigError(
                "torch.float16 cannot hold what a quantized layer gives, which transformers keeps in FP32 then",
                where=packed[0],
                got=self.dtype,
                expected="torch.bfloat16",
                hint="Load in bfloat16, or quantize the float model while it loads in float16.",
            )
        return self.config

    def _skeleton(self, linear: nn.Module, decision: Decision) -> HostedLinear:
        assert isinstance(linear, nn.Linear) and decision.method is not None
        layer = HostedLinear(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            method=decision.method,
            activation=decision.activation,
            rule=self.config.rule_of(decision.method),
            device="meta",
            dtype=linear.weight.dtype,
        )
        if not OPERATIONS:
            _mark(layer)  # 4.57 draws initial values before it loads; 5 afterwards, and marks what it loads itself
        return layer

    def _check_files(self, files: Iterable[str]) -> None:
        """Refuse files that do not hold as many quantized linears as config.json says, each of the right dtypes: transformers
        casts floats to codes, and makes up what is missing. Names are theirs, which it may change while it loads."""
        stored = read_headers(files, ())
        packed = [name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")]
        count = sum(1 for decision in self.decisions.values() if decision.scheme) + (self.table is not None)
        if stored and len(packed) != count:
            raise CheckpointError(
                "the files hold other layers quantized than config.json says",
                where=next(iter(files)),
                got=f"{len(packed)} layers with scales",
                expected=count,
                hint="Quantize the model again, or restore its config.json.",
            )
        for path in packed:
            for leaf in PARTS:
                info = stored.get(f"{path}.{leaf}")
                dtype = torch.float32 if leaf in SMALL else torch.uint8
                if (info is None and leaf in PARTS[:2]) or (info is not None and info.dtype != dtype):
                    got = "none" if info is None else info
                    raise CheckpointError("missing or mistyped tensor", where=f"{path}.{leaf}", got=got, expected=dtype)
                if info is not None and leaf == "mul_scale":
                    raise CheckpointError("text encoders are not smoothed", where=f"{path}.{leaf}")

    # -- the weights -------------------------------------------------------------------------------------------------

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        path, _, leaf = param_name.rpartition(".")
        decision = self.decisions.get(path)
        leaves = ("weight",) if not self.pre_quantized else () if OPERATIONS else PARTS
        ours = path == self.table if decision is None else decision.scheme is not None
        return ours and leaf in leaves

    def create_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, target_device: Any, *args: Any, **kwargs: Any
    ) -> None:
        """4.57: take one tensor of a file."""
        path, _, leaf = param_name.rpartition(".")
        if not self.pre_quantized:
            self.put(model, path, param_value.to(target_device))
            return
        module = model.get_submodule(path)
        assert isinstance(module, PackedModule)
        try:
            module.load({leaf: param_value.to(target_device)})
        except FormatError as error:
            raise CheckpointError(error.what, where=param_name, got=error.got, expected=error.expected) from error

    def get_quantize_ops(self) -> Any:
        """5: what is run on each weight that `param_needs_quantization` names."""
        from transformers.core_model_loading import ConversionOps

        quantizer = self

        class Quantize(ConversionOps):
            def convert(self, input_dict: dict[str, Any], **given: Any) -> dict[str, Any]:
                ((_, weight),) = input_dict.items()
                name = given["full_layer_name"]
                # What is raised here, transformers gathers and tells at the end.
                quantizer.put(
                    given["model"], name.rpartition(".")[0], weight[0] if isinstance(weight, list) else weight
                )
                if given.get("missing_keys") is not None:
                    given["missing_keys"] -= {name, *quantizer.made_of(name)}
                return {}

        return Quantize()

    def made_of(self, name: str) -> set[str]:
        """The tensors that are made of the table's, which the model has from the start and no float file holds."""
        path, _, leaf = name.rpartition(".")
        return {f"{path}.{other}" for other in PARTS if path == self.table and leaf == "weight"} - {name}

    def put(self, model: nn.Module, path: str, weight: Tensor) -> None:
        """Quantize a weight, and put the layer in the linear's place."""
        linear = model.get_submodule(path)
        if self.dtype is not None:
            weight = weight.to(self.dtype)
        if path == self.table:
            assert isinstance(linear, MXEmbedding)
            linear.load(quantize_weight(weight, str(self.config.embedding), where=f"{path}.weight"))
            _mark(linear)
            return
        assert isinstance(linear, nn.Linear)
        new = quantized(weight, None, self.config, self.decisions[path], path, HostedLinear)
        if linear.bias is not None:  # loaded before its weight, or still to come
            new.bias = linear.bias
        _mark(new)
        swap(model, path, new)

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """4.57: it would make up the weights that are missing, and have them quantized."""
        absent = [name for name in missing_keys if self.param_needs_quantization(model, name)]
        if absent:
            raise _absent(model, absent)
        made = set() if self.pre_quantized else self.made_of(f"{self.table}.weight")
        return [name for name in missing_keys if name not in made]

    # -- after the weights -------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        absent = []
        for path in [*(path for path, decision in self.decisions.items() if decision.scheme), self.table]:
            if path is None:
                continue
            layer = model.get_submodule(path)
            if not isinstance(layer, PackedModule):
                absent.append(f"{path}.weight")
                continue
            for leaf, info in layer.record.items():
                part = layer._buffers[leaf]
                assert part is not None
                if leaf == "weight" and isinstance(layer, MXLinear) and layer.layout != "packed":
                    continue  # `load` has seen it
                if part.is_meta or (OPERATIONS and not getattr(part, "_is_hf_initialized", False)):
                    absent.append(f"{path}.{leaf}")
                elif TensorInfo.of(part) != info:
                    got = TensorInfo.of(part)
                    raise CheckpointError("not a tensor of this layer", where=f"{path}.{leaf}", got=got, expected=info)
                if leaf in SMALL and not part.is_meta:
                    SMALL[leaf](part, f"{path}.{leaf}")
            if isinstance(layer, MXLinear):
                layer.prepack()
                if layer.bias is not None:
                    layer.bias.requires_grad_(False)
            elif isinstance(layer, MXEmbedding) and self.dtype is not None:
                layer.dtype = self.dtype
        if absent:
            raise _absent(model, absent)
        model.register_load_state_dict_pre_hook(check_state)
        record(model, self.config, self.decisions)
        self.report = report_of(model, self.decisions)
        logger.info(
            "%s: %d linears quantized to %s, %d kept",
            self.report.model,
            len(self.report.quantized),
            self.config.quant_method,
            len(self.report.kept),
        )
        return model


def _absent(model: nn.Module, names: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{len(names)} tensors were not loaded",
        where=type(model).__name__,
        got=f"no data for {', '.join(names[:3])}",
        hint="The checkpoint is incomplete: download or convert it again.",
    )


def _mark(layer: nn.Module) -> None:
    """Tell transformers that these tensors need no initial values."""
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
    layer._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]


for _method in Method:
    register_quantization_config(PREFIX + _method.value)(EncoderConfig)
    register_quantizer(PREFIX + _method.value)(MXTransformersQuantizer)
