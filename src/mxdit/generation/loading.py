"""Making the pipeline that a directory describes, in any mode."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mxdit.checkpoint.folders import choose_variant
from mxdit.config import MXConfig
from mxdit.config.attention import AttentionPolicy
from mxdit.config.components import configs_of
from mxdit.config.encoders import encoder_config
from mxdit.errors import CheckpointError, ConfigError, InputError
from mxdit.generation.directory import ModelDirectory
from mxdit.generation.offload import offload
from mxdit.generation.pages import release
from mxdit.models.skeleton import skeleton_of
from mxdit.numerics.formats import FORMATS
from mxdit.quantize.report import QuantReport

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def quantization(
    model: ModelDirectory,
    method: str | None,
    keys: Mapping[str, Any],
    own: Mapping[str, Any] | None = None,
) -> dict[str, MXConfig | None]:
    """The config that each transformer of `model` is loaded with, None for one that is loaded as it is.

    Args:
        model: the directory.
        method: "mxfp4", "mxfp4_dualscale", "mxfp8", "none", or None, which means as `keys` say, or as stored.
        keys: keys of `MXConfig` for every transformer.
        own: component -> keys that differ there, an MXConfig that replaces all, or None to leave it as it is.

    Raises:
        ConfigError: keys without a method, or a method that the stored weights do not have.
    """
    stored, where = model.stored, str(model.path)
    if method not in (None, "none", *FORMATS):
        raise InputError("unknown method", field="method", got=repr(method), expected=", ".join(("none", *FORMATS)))
    if method == "none" and stored:
        raise ConfigError(
            "the weights are stored quantized and cannot be run unquantized",
            where=where,
            got=", ".join(f"{name}: {' and '.join(config.methods)}" for name, config in stored.items()),
            hint="Load the BF16 model instead, or leave the method out.",
        )
    given = (*keys, *(own or {}))
    if not given and method in (None, "none"):
        return dict.fromkeys(model.components)
    if method == "none":
        raise ConfigError(
            "quantization options, and no quantization",
            field="method",
            where=where,
            got=", ".join(given),
            hint="Leave them out, or name a method.",
        )
    if method is None and "quant_method" not in keys:
        if not stored:
            raise ConfigError(
                "quantization options without a method",
                field="method",
                where=where,
                got=", ".join(given),
                expected=", ".join(FORMATS),
            )
        # Run-time choices over weights whose methods, one for each component, are what they are.
        method = str(next(iter(stored.values())).quant_method)
        own = dict(own or {})
        for name, config in stored.items():
            mine = own.get(name, {})
            if isinstance(mine, Mapping):
                own[name] = {"quant_method": str(config.quant_method), **mine}
    configs = configs_of(model.components, method, keys, own)
    if stored:  # what is stored unquantized is so on purpose
        configs = {name: config if name in stored else None for name, config in configs.items()}
    if not any(configs.values()):
        raise ConfigError(
            "every component is left unquantized",
            where=where,
            got=f"method {method!r}, and null for {', '.join(model.components)}",
            hint="Leave the method out to run the model as it is.",
        )
    return configs


def encoders(model: ModelDirectory, own: Mapping[str, Any]) -> dict[str, MXConfig]:
    """Text encoder -> the config that it is quantized with while it loads, of those that `own` names.

    Raises:
        ConfigError: a text encoder that the model does not have or mxdit does not know, one that is stored quantized, or what
            `encoder_config` refuses.
    """
    stored = model.stored_encoders
    configs = {name: encoder_config(value, name) for name, value in own.items() if value is not None}
    for name, config in configs.items():
        if name not in model.encoders:
            raise ConfigError(
                "a config for a text encoder that the model does not have, or that mxdit does not know",
                where=str(model.path),
                got=name,
                expected=" or ".join(model.encoders) or "none",
            )
        if name in stored:
            raise ConfigError(
                "the text encoder is stored quantized",
                where=str(model.path / name),
                got=f"{stored[name].quant_method}, and {config.quant_method} asked for",
                hint="Leave it out, or load the float model to quantize it otherwise.",
            )
    return configs


def check_attention(model: ModelDirectory, policies: Mapping[str, AttentionPolicy]) -> None:
    """Raise, before weights are read, ModelError for a transformer whose attention cannot be as its policy says, and
    ConfigError for layers that it does not have."""
    if policies:
        from mxdit.integrations.diffusers_attention import methods_of  # imports diffusers

        for name, policy in policies.items():
            methods_of(skeleton_of(model.components[name], name), policy)


def load(
    model: ModelDirectory,
    task: str,
    configs: Mapping[str, MXConfig | None],
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    variant: str | None = None,
    offloaded: bool = False,
    encoders: Mapping[str, MXConfig] | None = None,
    parts: Mapping[str, Any] | None = None,
) -> DiffusionPipeline:
    """The pipeline for `task`, on `device`, in `dtype` but for the components that its spec wants in FP32.

    Args and errors are those of `read`, and:
        device: name of a torch device.
        offloaded: leave the weights on the CPU, to be on `device` for as long as they are used.
    """
    pipeline = read(model, task, configs, dtype=dtype, variant=variant, encoders=encoders, parts=parts)
    if not offloaded:
        return pipeline.to(device)
    offload(pipeline, device)
    return pipeline


def read(
    model: ModelDirectory,
    task: str,
    configs: Mapping[str, MXConfig | None],
    *,
    dtype: torch.dtype,
    variant: str | None = None,
    encoders: Mapping[str, MXConfig] | None = None,
    without: Collection[str] = (),
    parts: Mapping[str, Any] | None = None,
) -> DiffusionPipeline:
    """The pipeline for `task`, on the CPU.

    Args:
        configs: from `quantization`.
        variant: diffusers' own word for one set of weight files, such as "fp16"; None takes the plain files, or the one
            variant that there is.
        encoders: from `encoders`.
        without: components that are left out, None in their place.
        parts: components that are taken as they are given.

    Raises:
        InputError: there is no such variant, or more than one to choose from; a component is given that the pipeline does not
            have; or one is not given that is made of a package which is not installed.
        CheckpointError: a file is missing or damaged, or does not fit the model.
        ConfigError: a config does not fit the model.
    """
    import diffusers
    from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig
    from safetensors import SafetensorError

    from mxdit.integrations.diffusers_config import encoders_of

    with _without_import_warnings():
        pipeline_class = getattr(diffusers, model.pipelines[task])
    parts = dict(parts or {})
    _check_parts(model, task, parts, signature(pipeline_class.__init__).parameters)
    mapping: Any = {name: config for name, config in configs.items() if config is not None}
    mapping |= encoders_of(encoders or {})
    options: dict[str, Any] = (
        {"quantization_config": PipelineQuantizationConfig(quant_mapping=mapping)} if mapping else {}
    )
    dtypes = {**dict.fromkeys(model.called(task).float32, torch.float32), "default": dtype}
    chosen = choose_variant(model.path, variant)
    if chosen is not None:
        options["variant"] = chosen
    options.update(dict.fromkeys(without), **parts)
    try:
        with warnings.catch_warnings():
            # diffusers 0.42 calls it `dtype`; 0.40 knows only the old name.
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            pipeline = pipeline_class.from_pretrained(
                str(model.path), torch_dtype=dtypes, local_files_only=True, **options
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            "the model cannot be loaded",
            where=str(model.path),
            got=" ".join(str(error).split()).rstrip("."),
            hint="A file is missing or damaged: download or convert the model again.",
        ) from error
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            release(part)  # what was cast or quantized from is not read again
    if model.called(task).tiled:
        pipeline.vae.enable_tiling()
    return pipeline


def _check_parts(model: ModelDirectory, task: str, parts: Mapping[str, Any], components: Collection[str]) -> None:
    for name, part in parts.items():
        if name not in components or name in model.components or part is None:
            raise InputError(
                "no component of this pipeline that can be given",
                field="parts",
                where=str(model.path),
                got=f"{name}: {type(part).__name__}",
                expected=f"a component of {model.pipelines[task]} other than {' and '.join(model.components)}",
            )
    for package, key in model.spec.packages.items():
        if any(config.get(key) for config in model.components.values()) and find_spec(package) is None:
            raise InputError(
                "the transformer needs a package that is not installed",
                where=str(model.path),
                got=f"{key}, and no {package}",
                hint=f"Install the {package} that fits your torch.",
            )
    for name, package in model.called(task).makes.items():
        if name not in parts and find_spec(package) is None:
            raise InputError(
                f"the pipeline makes its {name.replace('_', ' ')} of a package that is not installed",
                where=str(model.path),
                got=f"no {package}",
                hint=f"pip install {package}, or give one of your own: Session.open(..., parts={{{name!r}: ...}}).",
            )


@contextmanager
def _without_import_warnings() -> Iterator[None]:
    """While a pipeline's class is imported, transformers warns where torchvision is missing for classes that the pipeline may
    never use. That is its own affair; what it warns of later, about weights, is not."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(max(level, logging.ERROR))
    try:
        yield
    finally:
        logging.set_verbosity(level)


def show_loading(show: bool) -> None:
    """Show the hosts' progress bars while weights load, or not."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for host in (diffusers_logging, transformers_logging):
        (host.enable_progress_bar if show else host.disable_progress_bar)()


def summary(report: QuantReport) -> str:
    """One line: how many linears run how."""
    counts = Counter(f"{layer.method} {layer.scheme}" for layer in report.quantized)
    parts = [f"{count} linears {name}" for name, count in counts.items()]
    if report.kept:
        parts.append(f"{len(report.kept)} linears unquantized")
    return f"{', '.join(parts)}; {report.bytes_after / 2**20:.1f} MiB of linears"
