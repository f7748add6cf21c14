"""The quantizer that diffusers hosts: online inside `from_pretrained`, saved by `save_pretrained`, reloaded by itself.

Importing this module registers every method of mxdit in diffusers' tables (0.40 to 0.42); `import mxdit` sees to it that
the import happens when diffusers is imported. What a host does to a guest, and the answer, is said where it is answered.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from mxdit.checkpoint.checks import SMALL
from mxdit.checkpoint.fitting import adopt_dtypes, check_tensors, read_headers
from mxdit.config import ConfigLike, Method, MXConfig
from mxdit.errors import CheckpointError, ConfigError, FormatError, ModelError
from mxdit.integrations.diffusers_config import config_of_caller, reconciled
from mxdit.integrations.diffusers_files import Codes, take_codes
from mxdit.layers import MXLinear
from mxdit.numerics.formats import FLOATS, PARTS, TensorInfo, block_format
from mxdit.quantize.apply import quantized, swap
from mxdit.quantize.plan import Decision, plan
from mxdit.quantize.preconditions import check_state, remedy
from mxdit.quantize.recorded import record
from mxdit.quantize.report import report_of

logger = logging.getLogger(__name__)


class MXQuantizer(DiffusersQuantizer):
    """Quantizes one transformer while diffusers loads it, or loads one that is quantized already."""

    use_keep_in_fp32_modules = True  # without it diffusers casts Wan's norms and tables to bf16 as well

    def __init__(self, quantization_config: ConfigLike, *, pre_quantized: bool | None = None, **kwargs: Any) -> None:
        config = MXConfig.of(quantization_config)
        if config.is_checkpoint_serialized and pre_quantized is False:
            raise ConfigError(
                "the config passed to from_pretrained says that the checkpoint is quantized, and its config.json does not",
                where="is_checkpoint_serialized",
                got="true, with no quantization_config in config.json",
                hint="Leave the key out to quantize while loading; a converted directory needs no config at all.",
            )
        if config.is_checkpoint_serialized:
            config = reconciled(config, config_of_caller())
        # diffusers passes no `pre_quantized` when it loads a single file, and its base class then assumes that it is.
        # And it names a mixin of its own as the config's class, of which nothing that MXConfig lacks is called.
        super().__init__(cast(Any, config), pre_quantized=config.is_checkpoint_serialized, **kwargs)
        self.quantization_config: MXConfig = config
        self.decisions: dict[str, Decision] = {}
        self.tensors: dict[str, TensorInfo | None] = {}
        self.codes = Codes({}, {})
        self.holders: set[str] = set()
        self.as_stored = False

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters beside it: gradients reach its input, and its weights are frozen

    @property
    def is_compileable(self) -> bool:
        return True

    @property
    def supports_parallel_loading(self) -> bool:
        return False  # shards read at once would each hold a tensor that is being quantized

    # -- before the weights ------------------------------------------------------------------------------------------

    def validate_environment(
        self, *args: Any, torch_dtype: torch.dtype | None = None, device_map: Any = None, **kwargs: Any
    ) -> None:
        """diffusers calls it twice: first with the dtype and the map as given, then with the map it made."""
        if torch_dtype is not None and torch_dtype not in FLOATS:
            raise ConfigError(
                "unsupported torch_dtype",
                where="from_pretrained",
                got=torch_dtype,
                expected=" or ".join(map(str, FLOATS)),
                hint="It is the dtype of what is not quantized.",
            )
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            # The host writes such tensors to disk before it asks the guest, in the float dtype that it cast them to.
            where = [name for name, device in device_map.items() if device == "disk"]
            raise ConfigError(
                "quantized layers cannot be offloaded to disk while loading",
                where="device_map",
                got=f"'disk' for {', '.join(where)}",
                expected="devices and 'cpu' only",
            )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """None means bfloat16 when quantizing, and as stored when reloading: a plain reload must change nothing."""
        self.as_stored = torch_dtype is None and self.pre_quantized
        if torch_dtype is None and not self.pre_quantized:
            logger.info("torch_dtype is not given: what is not quantized loads as torch.bfloat16")
            return torch.bfloat16
        return torch_dtype

    def adjust_target_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """For device_map="auto": a byte an element, which no method exceeds by more than its scales."""
        return torch.uint8

    def get_special_dtypes_update(self, model: nn.Module, torch_dtype: torch.dtype | None) -> dict[str, torch.dtype]:
        """For device_map="auto": what is not quantized keeps its size."""
        parameters = model.named_parameters()
        return {name: torch_dtype or p.dtype for name, p in parameters if not self._is_quantized(name, ("weight",))}

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """The host's one mention of the files: read what tensors they hold, so that a wrong one is refused unread."""
        self.tensors = read_headers(checkpoint_files, loaded_keys)
        return loaded_keys

    def _process_model_before_weight_loading(
        self, model: nn.Module, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        self.decisions = plan(model, config)
        if state_dict is not None:  # from_single_file, which has read and renamed the tensors by now
            if not self.pre_quantized:
                methods = {path: of.method for path, of in self.decisions.items() if of.method}
                self.codes = take_codes(state_dict, methods, type(model).__name__)
            self.tensors = {name: TensorInfo.of(tensor) for name, tensor in state_dict.items()}
        if self.pre_quantized:
            # Online, the nn.Linear stays until its weight arrives: the host takes a tensor of another shape than the
            # skeleton's only from a checkpoint that is quantized already.
            for path, decision in self.decisions.items():
                if decision.scheme:
                    swap(model, path, self._skeleton(model.get_submodule(path), path, decision))
        check_tensors(model, self.tensors, config)
        if self.as_stored:
            adopt_dtypes(model, self.tensors)

    def _skeleton(self, linear: nn.Module, path: str, decision: Decision) -> MXLinear:
        assert isinstance(linear, nn.Linear)
        config, method = self.quantization_config, decision.method
        assert method is not None
        smooth = config.require_smooth_scale or f"{path}.mul_scale" in self.tensors
        return MXLinear(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            method=method,
            activation=decision.activation,
            rule=config.rule_of(method),
            device="meta",
            dtype=linear.weight.dtype,
            smooth=smooth and block_format(method).smooths,
        )

    # -- the weights -------------------------------------------------------------------------------------------------

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: Mapping[str, Tensor], **kwargs: Any
    ) -> bool:
        return param_name in self.codes.values or self._is_quantized(
            param_name, PARTS if self.pre_quantized else ("weight",)
        )

    def check_quantized_param_shape(self, param_name: str, current_param: Tensor, loaded_param: Tensor) -> bool:
        """Called for a misshapen tensor whose file told no shapes beforehand."""
        raise CheckpointError(
            "misshapen tensor", where=param_name, got=tuple(loaded_param.shape), expected=tuple(current_param.shape)
        )

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device | str | int,
        state_dict: Mapping[str, Tensor],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        path, _, name = param_name.rpartition(".")
        module = model.get_submodule(path)
        if self.pre_quantized:
            # Not `param_value`: the host has cast that to torch_dtype, and a bf16 level-0 scale is another number.
            tensor = state_dict[param_name]
            if name in SMALL:
                SMALL[name](tensor, param_name)
            assert isinstance(module, MXLinear)
            try:
                module.load({name: tensor.to(target_device)})
            except FormatError as error:  # of a file that told no dtypes beforehand
                raise CheckpointError(error.what, where=param_name, got=error.got, expected=error.expected) from error
            return
        coded = self.codes.values.pop(param_name, None)
        if coded is not None:  # `param_value` is its stand-in, in the dtype that the host wants
            param_value = coded.read().to(param_value.dtype)
        if not self._is_quantized(param_name, ("weight",)):
            parameter = getattr(module, name)
            value = nn.Parameter(param_value.to(target_device), requires_grad=parameter.requires_grad)
            setattr(module, name, value)
            return
        assert isinstance(module, nn.Linear)
        parts = self.codes.parts.pop(path, None)
        if parts is not None:
            new = self._skeleton(module, path, self.decisions[path])
            new.load({leaf: part.to(target_device) for leaf, part in parts.items()})
        else:
            new = quantized(param_value.to(target_device), None, self.quantization_config, self.decisions[path], path)
        if module.bias is not None:  # loaded before its weight, or still to come
            new.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
        swap(model, path, new)

    def _is_quantized(self, tensor: str, names: tuple[str, ...]) -> bool:
        path, _, name = tensor.rpartition(".")
        decision = self.decisions.get(path)
        return decision is not None and decision.scheme is not None and name in names

    # -- after the weights -------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        absent = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
        if absent:
            raise CheckpointError(
                f"{len(absent)} tensors were not loaded",
                where=type(model).__name__,
                got=f"no data for {', '.join(absent[:3])}",
                hint="The checkpoint is incomplete: download or convert it again.",
            )
        model.register_load_state_dict_pre_hook(check_state)
        record(model, self.quantization_config, self.decisions)
        self.report = report_of(model, self.decisions)
        self.tensors, self.holders = {}, _holders(model.state_dict())
        logger.info(
            "%s: %s, %d kept",
            self.report.model,
            ", ".join(f"{count} linears quantized to {method}" for method, count in self.report.methods.items()),
            len(self.report.kept),
        )
        return model

    # -- saving ------------------------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The host's last word before it writes: refuse what could not be loaded again, adapters and their like."""
        changed = sorted(_holders(state_dict) ^ self.holders)
        if changed:
            raise ModelError(
                "the modules that hold the model's tensors are not those that were loaded",
                where="save_pretrained",
                got=f"{', '.join(changed[:2])}{' and others' if len(changed) > 2 else ''} added or removed",
                hint=remedy(changed, "saving") or "What its config.json does not make could not be loaded again.",
            )
        return super().get_state_dict_and_metadata(state_dict, safe_serialization)


def _holders(tensors: Iterable[str]) -> set[str]:
    """The paths of the modules that tensors are of."""
    return {name.rpartition(".")[0] for name in tensors}


def _register() -> None:
    for method in Method:
        known = AUTO_QUANTIZER_MAPPING.setdefault(method.value, MXQuantizer)
        AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(method.value, MXConfig)
        if known is not MXQuantizer:
            logger.warning("diffusers has its own quantizer for %r: mxdit cannot load or quantize to it", method.value)


_register()
