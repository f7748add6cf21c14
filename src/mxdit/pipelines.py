"""Video pipelines in any mode: what a directory holds, what to quantize, and loading it.

`open_model` reads what a directory is without loading weights; `load` makes the pipeline. diffusers is imported inside the
functions, so that the command line can refuse bad input at once.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mxdit.checkpoint.files import read_json
from mxdit.config import MXConfig
from mxdit.errors import CheckpointError, ConfigError, InputError
from mxdit.integrations import pipeline_config
from mxdit.models import COMPONENTS, SPECS
from mxdit.models.presets import Preset, preset_for
from mxdit.quantize import plan, report_of
from mxdit.report import QuantReport

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

TASKS = {name: task for spec in SPECS.values() for name, task in spec.pipelines.items()}
PIPELINES = {task: name for name, task in TASKS.items()}
NEEDED = ("_class_name", "num_layers", "num_attention_heads", "attention_head_dim", "patch_size", "rope_max_seq_len")


@dataclass(frozen=True)
class ModelDirectory:
    """What a pipeline's directory says about itself, before any weight is read.

    Attributes:
        path: the directory.
        tasks: what it can make, "t2v" or "i2v" or both, its own pipeline's first.
        experts: component name -> its config.json.
        boundary_ratio: share of the noise schedule above which the first expert runs, or None for a single expert.
        vae_stride: (frames, height and width) per latent position.
    """

    path: Path
    tasks: tuple[str, ...]
    experts: Mapping[str, Mapping[str, Any]]
    boundary_ratio: float | None
    vae_stride: tuple[int, int]

    @property
    def stored(self) -> dict[str, MXConfig]:
        """The quantization config of each expert that is stored quantized."""
        return {
            name: MXConfig.from_dict(config["quantization_config"])
            for name, config in self.experts.items()
            if config.get("quantization_config")
        }

    @property
    def size_multiple(self) -> int:
        """What height and width have to be multiples of: VAE stride times patch."""
        patch = next(iter(self.experts.values()))["patch_size"]
        return self.vae_stride[1] * int(patch[1])

    @property
    def max_positions(self) -> int:
        """Most positions along one axis that the rotary embedding has, counted in latent frames or patches."""
        return next(iter(self.experts.values()))["rope_max_seq_len"]

    def preset(self, task: str) -> Preset:
        """Defaults for this model and `task`."""
        config = next(iter(self.experts.values()))
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return preset_for(task, config["num_layers"], width, len(self.experts))


def bundled(task: str) -> Path:
    """Directory of the small trained model that comes with mxdit. Raises InputError where it is not installed."""
    spec = find_spec("mxdit_models")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "the bundled model is not installed",
            where="mxdit_models",
            hint="Install it with `pip install ./models` from a checkout of mxdit, or name a model with --model.",
        )
    return Path(next(iter(spec.submodule_search_locations))) / task


def open_model(path: Path) -> ModelDirectory:
    """Read a diffusers pipeline directory's JSON files.

    Raises:
        InputError: there is no such directory, or it holds no pipeline that mxdit knows.
        CheckpointError: a JSON file in it is missing or damaged.
    """
    if not os.path.isdir(path):  # unlike Path.is_dir, it does not raise for an impossible name
        raise InputError("no such directory", where=str(path), hint="Name a diffusers pipeline directory.")
    if not (path / "model_index.json").is_file():
        raise InputError(
            "this is no diffusers pipeline directory",
            where=str(path),
            got="no model_index.json",
            expected="the directory that holds model_index.json, transformer/, vae/, ...",
        )
    index = read_json(path / "model_index.json")
    task = TASKS.get(str(index.get("_class_name")))
    if task is None:
        raise InputError(
            "mxdit cannot run this kind of pipeline",
            where=str(path / "model_index.json"),
            got=index.get("_class_name"),
            expected=" or ".join(TASKS),
        )
    present = [name for name in COMPONENTS if (index.get(name) or [None])[0] is not None]
    if not present:
        raise CheckpointError("the pipeline names no transformer", where=str(path / "model_index.json"))
    experts = {name: read_json(path / name / "config.json") for name in present}
    for name, config in experts.items():
        lacking = [key for key in NEEDED if key not in config]
        if lacking:
            raise CheckpointError(
                "the transformer's config lacks what describes it",
                where=str(path / name / "config.json"),
                expected=", ".join(lacking),
                hint="Download or convert the model again.",
            )
    vae = read_json(path / "vae" / "config.json")
    stride = (int(vae.get("scale_factor_temporal") or 4), int(vae.get("scale_factor_spatial") or 8))
    # TI2V: one set of weights, whose first latent frame may be given.
    tasks = (task, *(t for t in PIPELINES if t != task)) if index.get("expand_timesteps") else (task,)
    return ModelDirectory(path, tasks, experts, index.get("boundary_ratio"), stride)


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
    unknown = [name for name in components if name not in model.experts]
    if unknown:
        raise ConfigError(
            "a config for an expert that the model does not have",
            where=str(model.path),
            got=unknown[0],
            expected=" or ".join(model.experts),
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
    for name in model.experts:
        if stored and name not in stored:
            components[name] = None  # stored unquantized on purpose
    if all(components.get(name, {}) is None for name in model.experts):
        raise ConfigError(
            "every expert is left unquantized",
            where=str(model.path),
            got=f"method {method!r}, and null for {', '.join(model.experts)}",
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
) -> DiffusionPipeline:
    """The pipeline for `task`, on `device`; transformers and text encoder in `dtype`, the VAE in FP32.

    The VAE decodes once and is small, and its BF16 error shows in flat areas: diffusers' own Wan examples load it so.

    Raises:
        CheckpointError: a file is missing or damaged, or does not fit the model.
        ConfigError: the quantization config does not fit the model.
    """
    import diffusers
    from safetensors import SafetensorError

    pipeline_class = getattr(diffusers, PIPELINES[task])
    options = {} if quantization_config is None else {"quantization_config": quantization_config}
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


def describe(model: ModelDirectory) -> dict[str, dict[str, Any]]:
    """Per expert, from the JSON and the tensors' sizes alone: method, linears by scheme, linears kept, bytes of files."""
    import diffusers

    described = {}
    for name, config in model.experts.items():
        stored = model.stored.get(name)
        with torch.device("meta"):
            skeleton = getattr(diffusers, config["_class_name"]).from_config(dict(config))
        if stored is None:
            schemes = [None for module in skeleton.modules() if isinstance(module, torch.nn.Linear)]
        else:
            schemes = [decision.scheme for decision in plan(skeleton, stored).values()]
        described[name] = {
            "quant_method": stored and str(stored.quant_method),
            "schemes": dict(Counter(scheme for scheme in schemes if scheme)),
            "kept": schemes.count(None),
            "bytes": sum(file.stat().st_size for file in (model.path / name).glob("*.safetensors")),
        }
    return described


def summary(report: QuantReport) -> str:
    """One line: how many linears run how."""
    counts = Counter(f"{layer.method} {layer.scheme}" for layer in report.quantized)
    parts = [f"{count} linears {name}" for name, count in counts.items()]
    if report.kept:
        parts.append(f"{len(report.kept)} linears unquantized")
    return f"{', '.join(parts)}; {report.bytes_after / 2**20:.1f} MiB of linears"
