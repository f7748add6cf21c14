"""Which linears of a model of the engine are quantized, and to what: `MXOmniConfig`.

It reads the engine's keys and ours (`MXConfig`) and decides by `mxdit.quantize.plan.plan`, as the diffusers path does, so that
one config means the same in both.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm_omni.diffusion.config import get_current_diffusion_config, get_current_diffusion_config_or_none
from vllm_omni.diffusion.data import TransformerConfig
from vllm_omni.platforms import current_omni_platform
from vllm_omni.quantization import mxfp4_config, mxfp8_config
from vllm_omni.quantization.component_config import ComponentQuantizationConfig

from mxdit.checkpoint.canonical import read_component
from mxdit.checkpoint.layouts.vllm_omni import KEYS, NAME
from mxdit.checkpoint.sources import open_source
from mxdit.config import STEPS_OF_W4A8, MXConfig
from mxdit.config.choices import check_choice
from mxdit.errors import ConfigError
from mxdit.integrations.vllm_omni.linear import MXLinearMethod
from mxdit.integrations.vllm_omni.steps import LOGGER, StepSwitch
from mxdit.models import SPECS, spec_of
from mxdit.models.skeleton import skeleton_of
from mxdit.quantize.plan import Decision, plan
from mxdit.quantize.report import in_words

logger = logging.getLogger(LOGGER)
ENVIRONMENT = "MXDIT_VLLM_OMNI"
CHOICES = ("auto", "mxdit", "engine")
"""Whose linears answer on Ascend: auto takes the engine's where it has what is asked for."""
STEPS = {"activation_steps", STEPS_OF_W4A8}
RUNTIME = ("activation", *sorted(STEPS), "w4a8_fallback_layers", "mxfp4_scale_alg")
"""Keys that say how to run, not what the checkpoint holds: what a user gives wins over its config.json."""
_ENGINES = {
    "mxfp4": mxfp4_config.DiffusionMXFP4Config,
    "mxfp4_dualscale": mxfp4_config.DiffusionMXFP4DualScaleMixedConfig,
    "mxfp8": mxfp8_config.DiffusionMXFP8Config,
}
_CHOOSING = {"ignored_layers", "modules_to_not_convert", "num_bf16_fallback_layers", "w4a8_fallback_layers"}


def config_for(method: str, **keys: Any) -> MXOmniConfig:
    """What the engine calls for `--quantization METHOD`, for a `quantization_config`, and for a config.json that has one.

    What a user asked for replaces what config.json says of it: an activation replaces all of `RUNTIME`'s activations, as in
    `MXConfig.run_as`, and steps under either name replace steps under either.
    """
    if not _from_disk(keys):
        return MXOmniConfig(method, keys)
    asked = _asked_for()
    replaced = set(asked)
    if "activation" in asked:
        replaced |= {*STEPS, "w4a8_fallback_layers"}
    elif replaced & STEPS:
        replaced |= STEPS
    return MXOmniConfig(method, {**{key: value for key, value in keys.items() if key not in replaced}, **asked})


def _from_disk(keys: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's config.json says so: the engine rebuilds a serialized component's config from there."""
    flags = [value for key, value in keys.items() if key.startswith("is_checkpoint_") and key.endswith("serialized")]
    return any(flags) and get_current_diffusion_config_or_none() is not None


def _asked_for() -> dict[str, Any]:
    """The keys of `RUNTIME` that the user gave the engine, and that its own rebuilding leaves out.

    Raises ConfigError where they differ from component to component: here the engine does not say which is being built.
    """
    engine = get_current_diffusion_config()
    active = engine.quantization_config
    if engine.quantization_config_is_auto_detected or active is None:
        return {}
    components = [active]
    if isinstance(active, ComponentQuantizationConfig):
        components = [*active.component_configs.values(), active.default_config]
    ours = [config.given for config in components if isinstance(config, MXOmniConfig)]
    asked = [{key: given[key] for key in RUNTIME if key in given} for given in ours]
    if any(one != asked[0] for one in asked[1:]):
        raise ConfigError(
            "components of a quantized checkpoint are to run differently",
            where="quantization_config",
            got=" and ".join(map(str, asked)),
            hint=f"Write {' and '.join(RUNTIME[:2])} into each component's config.json instead.",
        )
    return asked[0] if asked else {}


class MXOmniConfig(QuantizationConfig):
    """What one transformer is quantized to, as the engine asks for it.

    Args:
        method: ``mxfp4``, ``mxfp4_dualscale`` or ``mxfp8``; of the layers that ``layer_methods`` does not name.
        given: keys of the engine's config of that name, or of `MXConfig`. Layers may be named as in diffusers or as in the
            engine, as globs too. ``mxfp4_scale_alg`` defaults to the engine's 0, but in a checkpoint of ours (key ``layout``).

    Raises:
        ConfigError: for a key or value that is neither's.
    """

    def __init__(self, method: str, given: Mapping[str, Any]) -> None:
        super().__init__()
        self.method, self.given = method, {key: value for key, value in given.items() if value not in (None, [], ())}
        others = given.get("layer_methods")
        single = "mxfp4" in (method, *(others if isinstance(others, Mapping) else ()))
        defaults = {"mxfp4_scale_alg": 0} if single and "layout" not in given else {}
        self.config = MXConfig.from_dict({**defaults, **self.given, "quant_method": method})
        self.kernels = os.environ.get(ENVIRONMENT, "auto")
        check_choice(ENVIRONMENT, self.kernels, CHOICES, where="environment")
        # What the engine reads of a config, to see whether a config.json says more.
        self.ignored_layers = list(self.config.ignored_layers)
        self.is_checkpoint_serialized = self.config.is_checkpoint_serialized
        self.is_checkpoint_mxfp4_serialized = self.is_checkpoint_mxfp8_serialized = self.is_checkpoint_serialized
        self.is_checkpoint_quantized = self.is_checkpoint_serialized
        self._decisions: dict[str, Decision] | None = None

    # The engine asks of instances; the base class declares two of these for the class.
    def get_name(self) -> str:  # type: ignore[override]
        return self.method

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MXOmniConfig:
        keys = {key: value for key, value in config.items() if key != "quant_method"}
        return cls(str(config.get("quant_method")), keys)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a layer while its model is built: the engine's own, ours, or none."""
        if not isinstance(layer, LinearBase):
            return None
        why_not = self.why_not_engine(getattr(layer, "tp_size", 1))  # one that is not split has none yet
        if why_not is not None and self.kernels == "engine":
            raise ConfigError(
                "vLLM-Omni's own linears cannot answer here",
                where=f"{ENVIRONMENT}=engine",
                got=why_not,
                hint=f"Set {ENVIRONMENT}=auto.",
            )
        if why_not is None and not _known(get_current_diffusion_config().tf_model_config):
            return _ENGINES[self.method](**self.given).get_quant_method(layer, prefix)
        if self._decisions is None:
            self._decisions = self._decide()
        decision = self._decisions.get(prefix)
        if decision is None or not decision.scheme:
            return UnquantizedLinearMethod()
        if why_not is None:
            return self._engines(prefix, decision).get_quant_method(layer, prefix)
        return MXLinearMethod(self.config, decision, prefix, self._switch)

    def _engines(self, prefix: str, decision: Decision) -> QuantizationConfig:
        """The engine's own config for one linear that is quantized: which are is decided here, by all the names it takes."""
        keys = {key: value for key, value in self.given.items() if key not in _CHOOSING}
        if self.method == "mxfp4_dualscale":
            keys["num_bf16_fallback_layers"] = 0
        elif decision.activation == "mxfp8" and self.method == "mxfp4":
            keys["w4a8_fallback_layers"] = [prefix]
        return _ENGINES[self.method](**keys)

    def why_not_engine(self, degree: int) -> str | None:
        """Why ours answer and not the engine's own linears, at this degree of tensor parallelism; None where those do."""
        if self.kernels == "mxdit":
            return f"{ENVIRONMENT}=mxdit"
        if not current_omni_platform.is_npu():
            return "its MXFP4 runs on Ascend NPUs"
        known = KEYS[self.method] | _CHOOSING
        beyond = [key for key, value in self.given.items() if value and key not in known]
        if beyond:
            return f"it has no key {beyond[0]!r}"
        if self.method == "mxfp4_dualscale":
            if degree > 1:
                return "its dual-scale linears are not split"
            if self.config.activation_steps or self.config.w4a8_fallback_layers:
                return "its dual-scale linears have no other activations"
        return None

    @cached_property
    def _switch(self) -> StepSwitch | None:
        """Of linears of ours, where activations differ by step."""
        return StepSwitch(self.config.activation_steps) if self.config.activation_steps else None

    def _decide(self) -> dict[str, Decision]:
        """What becomes of every linear, by its name in the engine.

        Raises:
            CheckpointError: the checkpoint's headers show that it is damaged, mixed, or of another method.
            ConfigError: the config does not fit the model, or the engine's names for this family are not known.
        """
        engine = get_current_diffusion_config()
        model, described = str(engine.model), engine.tf_model_config
        if not _known(described):
            raise ConfigError(
                "mxdit does not know by which names vLLM-Omni calls the layers of this family",
                where=model,
                got=described.get("_class_name"),
                hint="docs/supported-models.md says whose it knows; `runtimes` of a family's ModelSpec are those names "
                "(docs/adapting-a-model.md).",
            )
        skeleton = skeleton_of(described.to_dict(), model)
        spec = spec_of(skeleton)
        if os.path.isdir(model):
            _check(Path(model))
        linears = [path for path, module in skeleton.named_modules() if isinstance(module, torch.nn.Linear)]
        names = {path: spec.runtime_name(path, NAME) for path in linears}
        config = replace(
            self.config,
            ignored_layers=tuple(_paths(self.config.ignored_layers, names)),
            layer_methods={of: tuple(_paths(named, names)) for of, named in self.config.layer_methods.items()},
            w4a8_fallback_layers=tuple(_paths(self.config.w4a8_fallback_layers, names)),
        )
        decisions = {names[path]: decision for path, decision in plan(skeleton, config).items()}
        counts = Counter(f"{d.method} {d.scheme}" for d in decisions.values() if d.scheme)
        how = "quantized already" if self.is_checkpoint_serialized else "quantized while they load"
        logger.info("mxdit: %s linears by layer of the engine, %s", in_words(counts), how)
        return decisions


def _known(described: TransformerConfig) -> bool:
    """Whether the engine's names for the layers of this transformer are known."""
    spec = SPECS.get(str(described.get("_class_name")))
    return spec is not None and NAME in spec.runtimes


def _paths(patterns: Iterable[str], names: Mapping[str, str]) -> list[str]:
    """Layers' names and globs with the engine's names replaced by diffusers paths, of one or of the three that it fuses."""
    found: list[str] = []
    for pattern in patterns:
        paths = [path for path, name in names.items() if fnmatchcase(name, pattern)]
        found += paths or [pattern]
    return list(dict.fromkeys(found))


@cache
def _check(model: Path) -> None:
    """Raise CheckpointError for what headers and small tensors show of a directory, before weights are read."""
    source = open_source(model)
    for name in source.components:
        component = read_component(source.read(name))
        component.require_sound()
