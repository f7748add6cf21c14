"""Making the pipeline that a directory describes, in any mode."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from mxdit.checkpoint.folders import choose_variant
from mxdit.errors import CheckpointError, ConfigError
from mxdit.generation.directory import ModelDirectory
from mxdit.integrations.diffusers_hook import pipeline_config
from mxdit.models import COMPONENTS
from mxdit.quantize.report import QuantReport, report_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def quantization(
    model: ModelDirectory,
    method: str | None,
    keys: Mapping[str, Any],
    components: Mapping[str, Any] | None = None,
) -> Any:
    """What to pass as `quantization_config` so that `model` runs as asked; None to load it as it is.

    Args:
        model: the directory.
        method: "mxfp4", "mxfp4_dualscale", "mxfp8", "none", or None, which means as stored.
        keys: MXConfig keys for every expert, those not given left out.
        components: per expert, keys that differ there, or None to leave that expert alone.

    Raises:
        ConfigError: keys without a method, or a method that the stored weights do not have.
    """
    stored = model.stored
    components = dict(components or {})
    unknown = [name for name in components if name not in model.components]
    if unknown:
        raise ConfigError(
            "a config for an expert that the model does not have",
            where=str(model.path),
            got=unknown[0],
            expected=" or ".join(model.components),
        )
    if method == "none" and stored:
        raise ConfigError(
            "the weights are stored quantized and cannot be run unquantized",
            where=str(model.path),
            got=", ".join(f"{name}: {config.quant_method}" for name, config in stored.items()),
            hint="Load the BF16 model instead, or leave --quantization out.",
        )
    if method in (None, "none"):
        if not keys and not components:
            return None
        if not stored or method == "none":
            raise ConfigError(
                "quantization options without a method",
                where=str(model.path),
                got=", ".join([*keys, *components]),
                hint="Add --quantization mxfp4, mxfp4_dualscale or mxfp8.",
            )
        # Run-time choices over weights whose methods, one for each expert, are what they are.
        method = str(next(iter(stored.values())).quant_method)
        for name, config in stored.items():
            components[name] = {"quant_method": str(config.quant_method), **(components.get(name) or {})}
    for name in model.components:
        if stored and name not in stored:
            components[name] = None  # stored unquantized on purpose
    if all(components.get(name, {}) is None for name in model.components):
        raise ConfigError(
            "every expert is left unquantized",
            where=str(model.path),
            got=f"method {method!r}, and null for {', '.join(model.components)}",
            hint="Leave --quantization out to run the model as it is.",
        )
    return pipeline_config(method, **keys, **components)


def load(
    model: ModelDirectory,
    task: str,
    quantization_config: Any = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    variant: str | None = None,
) -> DiffusionPipeline:
    """The pipeline for `task`, on `device`; transformers and text encoder in `dtype`, the VAE in FP32.

    The VAE decodes once and is small, and its BF16 error shows in flat areas: diffusers' own Wan examples load it so.
    `variant` is diffusers' own: of the weight files, such as "fp16"; None takes the plain files, or the one variant that there
    is.

    Raises:
        InputError: there is no such variant, or more than one to choose from.
        CheckpointError: a file is missing or damaged, or does not fit the model.
        ConfigError: the quantization config does not fit the model.
    """
    import diffusers
    from safetensors import SafetensorError

    pipeline_class = getattr(diffusers, model.pipelines[task])
    options = {} if quantization_config is None else {"quantization_config": quantization_config}
    chosen = choose_variant(model.path, variant)
    if chosen is not None:
        options["variant"] = chosen
    dtypes = {"vae": torch.float32, "default": dtype}
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
    return pipeline.to(device)


def show_loading(show: bool) -> None:
    """Show the hosts' progress bars while weights load, or not."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for host in (diffusers_logging, transformers_logging):
        (host.enable_progress_bar if show else host.disable_progress_bar)()


def experts_of(pipeline: Any) -> dict[str, QuantReport]:
    """What the linears of each expert of a loaded pipeline are."""
    found = {name: getattr(pipeline, name, None) for name in COMPONENTS}
    return {name: report_of(model) for name, model in found.items() if model is not None}


def summary(report: QuantReport) -> str:
    """One line: how many linears run how."""
    counts = Counter(f"{layer.method} {layer.scheme}" for layer in report.quantized)
    parts = [f"{count} linears {name}" for name, count in counts.items()]
    if report.kept:
        parts.append(f"{len(report.kept)} linears unquantized")
    return f"{', '.join(parts)}; {report.bytes_after / 2**20:.1f} MiB of linears"
