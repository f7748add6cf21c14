"""What a pipeline's directory holds, read from its JSON files before any weight is."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mxdit.checkpoint.files import read_json
from mxdit.config import MXConfig
from mxdit.errors import CheckpointError, InputError
from mxdit.models import COMPONENTS, SPECS
from mxdit.models.presets import Preset, preset_for
from mxdit.quantize.plan import plan

if TYPE_CHECKING:
    pass


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
