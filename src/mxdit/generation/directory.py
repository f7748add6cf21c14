"""What a pipeline's directory holds, read from its JSON files before any weight is."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from mxdit.checkpoint.files import read_json
from mxdit.checkpoint.sources import MODULAR
from mxdit.config import MXConfig
from mxdit.config.encoders import is_stated, read_stated
from mxdit.errors import CheckpointError, InputError
from mxdit.models import SPECS, TEXT_ENCODERS, UNSUPPORTED, about_unknown
from mxdit.models.encoders import BLOCKS
from mxdit.models.skeleton import skeleton_of
from mxdit.models.spec import Geometry, ModelSpec, PipelineSpec, Preset
from mxdit.quantize.plan import Decision, plan

KINDS = {"t2v": "a text-to-video", "i2v": "an image-to-video", "t2i": "a text-to-image"}


BUNDLED = ("t2v", "i2v")  # what the models that come with mxdit do


@dataclass(frozen=True)
class ModelDirectory:
    """What a pipeline's directory says about itself, before any weight is read.

    Attributes:
        path: the directory.
        spec: its family.
        pipelines: task -> name of the pipeline class that does it, the directory's own first.
        components: name of a transformer -> its config.json.
        geometry: the sizes that it takes.
        settings: what its model_index.json says beside its components, as a cascade's boundary_ratio.
        parts: name of any component -> (library, class).
        encoders: name of a text encoder that mxdit knows -> its config.json.
    """

    path: Path
    spec: ModelSpec
    pipelines: Mapping[str, str]
    components: Mapping[str, Mapping[str, Any]]
    geometry: Geometry
    settings: Mapping[str, Any]
    parts: Mapping[str, tuple[str, str]]
    encoders: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Names of the components that encode the prompt."""
        return tuple(name for name in self.parts if name.startswith("text_encoder"))

    @property
    def tasks(self) -> tuple[str, ...]:
        """What it can make ("t2v", "i2v", ...), its own pipeline's first."""
        return tuple(self.pipelines)

    @property
    def stored(self) -> dict[str, MXConfig]:
        """The quantization config of each transformer that is stored quantized."""
        return {
            name: MXConfig.from_dict(config["quantization_config"])
            for name, config in self.components.items()
            if config.get("quantization_config")
        }

    @property
    def stored_encoders(self) -> dict[str, MXConfig]:
        """The quantization config of each text encoder that is stored quantized."""
        stated = {name: config.get("quantization_config") for name, config in self.encoders.items()}
        return {name: read_stated(values) for name, values in stated.items() if values and is_stated(values)}

    @property
    def flow_shift(self) -> float | None:
        """The scheduler's own; None where it has none, or one that follows the size."""
        file = self.path / "scheduler" / "scheduler_config.json"
        config = read_json(file) if file.is_file() else {}
        return None if config.get("use_dynamic_shifting") else config.get("flow_shift", config.get("shift"))

    def preset(self, task: str) -> Preset:
        """Defaults for this model and `task`."""
        return self.spec.preset(task, next(iter(self.components.values())), len(self.components))

    def called(self, task: str) -> PipelineSpec:
        """How the pipeline that does `task` is called."""
        return self.spec.pipelines[self.pipelines[task]]

    def check_task(self, task: str) -> None:
        """Raise InputError for a task that this model does not do."""
        if task not in self.tasks:
            raise InputError(
                f"this is {' and '.join(KINDS.get(own, own) for own in self.tasks)} model",
                where=str(self.path),
                got=task,
                expected=" or ".join(self.tasks),
                hint="Leave the image out, or name a model that takes one." if task == "i2v" else None,
            )

    def takes(self, task: str, name: str) -> bool:
        """Whether a request for `task` may set this field of it; what a component takes needs one (a distilled model may lack
        its guider)."""
        called = self.called(task)
        component = called.call.get(name, "").rpartition(".")[0]
        return called.takes(name, self.settings) and component in ("", "config", *self.parts)


def bundled(task: str) -> Path:
    """Directory of the small trained model that comes with mxdit. Raises InputError where it is not installed, or has no such
    task."""
    if task not in BUNDLED:
        raise InputError("the bundled model does not do this", field="task", got=task, expected=" or ".join(BUNDLED))
    spec = find_spec("mxdit_models")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "the bundled model is not installed",
            where="mxdit_models",
            hint="Install it with `pip install ./models` from a checkout of mxdit, or name the directory of a model.",
        )
    return Path(next(iter(spec.submodule_search_locations))) / task


def open_model(path: Path) -> ModelDirectory:
    """Read a diffusers pipeline directory's JSON files.

    Raises:
        InputError: there is no such directory, or it holds no pipeline that mxdit knows.
        CheckpointError: a JSON file in it is missing or damaged.
    """
    if not os.path.isdir(path):  # unlike Path.is_dir, it does not raise for an impossible name
        hint = "Name a diffusers pipeline directory."
        if os.path.isfile(path):
            hint += " `mxdit inspect` says what a file is, and `mxdit quantize` makes a directory of it."
            raise InputError("a file, not a directory", where=str(path), hint=hint)
        raise InputError("no such directory", where=str(path), hint=hint)
    if not (path / "model_index.json").is_file():
        raise InputError(
            "this is no diffusers pipeline directory",
            where=str(path),
            got="no model_index.json",
            expected="the directory that holds model_index.json, transformer/, vae/, ...",
            hint="Call a modular pipeline through diffusers." if (path / MODULAR).is_file() else None,
        )
    index = read_json(path / "model_index.json")
    own = str(index.get("_class_name"))
    known = {name: spec for spec in SPECS.values() for name in spec.pipelines}
    spec = known.get(own)
    if spec is None or spec.geometry is None:
        raise InputError(
            "mxdit cannot run this kind of pipeline",
            where=str(path / "model_index.json"),
            got=index.get("_class_name"),
            hint=_about_pipeline(own, index, known),
        )
    present = []
    for name in spec.components:
        of = index.get(name)
        if of is not None and not (isinstance(of, list) and of):
            raise CheckpointError(
                "a component is no list of its library and class",
                where=str(path / "model_index.json"),
                got=f"{name}: {of!r}",
            )
        if of is not None and of[0] is not None:
            present.append(name)
    if not present:
        raise CheckpointError("the pipeline names no transformer", where=str(path / "model_index.json"))
    components = {name: read_json(path / name / "config.json") for name in present}
    for name, config in components.items():
        lacking = [key for key in ("_class_name", *spec.needed) if key not in config]
        if lacking:
            raise CheckpointError(
                "the transformer's config lacks what describes it",
                where=str(path / name / "config.json"),
                expected=", ".join(lacking),
                hint="Download or convert the model again.",
            )
    settings = {key: value for key, value in index.items() if not key.startswith("_") and not isinstance(value, list)}
    vae = read_json(path / "vae" / "config.json")
    try:
        geometry = spec.geometry(components[present[0]], vae)
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise CheckpointError(
            "no sizes can be told from the configs of the transformer and the VAE", where=str(path), got=str(error)
        ) from None
    pipelines = {spec.pipelines[own].task: own}
    if spec.shared and settings.get(spec.shared):
        for name, made in spec.pipelines.items():
            pipelines.setdefault(made.task, name)
    parts = {name: (of[0], of[1]) for name, of in index.items() if isinstance(of, list) and len(of) == 2 and all(of)}
    encoders = {
        name: read_json(path / name / "config.json")
        for name in TEXT_ENCODERS
        if name in parts and parts[name][1] in BLOCKS
    }
    return ModelDirectory(path, spec, pipelines, components, geometry, settings, parts, encoders)


def _about_pipeline(own: str, index: Mapping[str, Any], known: Iterable[str]) -> str:
    """What to tell whoever has a pipeline that mxdit cannot run: what it does with its transformer all the same, or why not."""
    if any(own in spec.hosts for spec in SPECS.values()):
        return (
            "`mxdit quantize` packs it; call it through diffusers, whose from_pretrained loads what was packed, "
            "for it takes what no request of mxdit has."
        )
    held = [of[1] for of in index.values() if isinstance(of, list) and len(of) == 2]
    for name in held:
        if name in SPECS and not SPECS[name].pipelines:
            return (
                f"The spec of {name} names no pipelines. `mxdit quantize` packs it all the same, and diffusers loads what was "
                "packed; to run it here, write `pipelines`, `geometry` and `presets` (docs/adapting-a-model.md)."
            )
    return about_unknown(next((name for name in held if name in UNSUPPORTED), own), known)


def describe(model: ModelDirectory) -> dict[str, dict[str, Any]]:
    """Per transformer, from the JSON and the tensors' sizes alone: method, linears by scheme, linears kept, activations
    by step, bytes of files."""
    return _described(model.path, model.components, model.stored)


def describe_encoders(model: ModelDirectory) -> dict[str, dict[str, Any]]:
    """The same of each text encoder that mxdit knows."""
    return _described(model.path, model.encoders, model.stored_encoders)


def _described(
    path: Path, configs: Mapping[str, Mapping[str, Any]], quantized: Mapping[str, MXConfig]
) -> dict[str, dict[str, Any]]:
    described = {}
    for name, config in configs.items():
        stored, skeleton = quantized.get(name), skeleton_of(config, str(path / name / "config.json"))
        linears = [at for at, module in skeleton.named_modules() if isinstance(module, nn.Linear)]
        decisions = plan(skeleton, stored) if stored else dict.fromkeys(linears, Decision())
        packed = [decision for decision in decisions.values() if decision.scheme]
        described[name] = {
            "quant_method": stored and str(stored.quant_method),
            "methods": dict(Counter(decision.method for decision in packed)),
            "schemes": dict(Counter(decision.scheme for decision in packed)),
            "kept": len(decisions) - len(packed),
            "activation_steps": stored.activation_steps.to_dict() if stored and stored.activation_steps else None,
            "bytes": sum(file.stat().st_size for file in _weights_in(path / name)),
        }
    return described


def _weights_in(folder: Path) -> list[Path]:
    """The files of one transformer's weights. Raises CheckpointError where one that its index names is missing."""
    files = sorted(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        named = read_json(index).get("weight_map")
        missing = (
            sorted({str(name) for name in named.values()} - {file.name for file in files})
            if isinstance(named, dict)
            else []
        )
        if missing:
            raise CheckpointError(
                "a file of weights is missing",
                where=str(folder),
                got=f"no {', '.join(missing)}",
                expected=f"all files that {index.name} names",
                hint="Download or convert the model again.",
            )
    return files
