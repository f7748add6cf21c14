"""Every pipeline of every family: opened, asked, run in BF16 and quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mxdit
from mxdit.checkpoint import inspect_checkpoint, quantize_checkpoint
from mxdit.errors import InputError
from mxdit.generation.directory import ModelDirectory, open_model
from mxdit.generation.loading import load
from mxdit.generation.recording import Recorder, repeat
from mxdit.generation.request import Request, make_request
from mxdit.generation.run import Result, generate
from mxdit.models import SPECS, ModelSpec
from tiny_families import families, pipelines, tiny_of


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The directory of a whole pipeline, by its class name."""
    root, made = tmp_path_factory.mktemp("pipelines"), {}
    for spec in SPECS.values():
        for name, called in spec.pipelines.items():
            made[name] = root / name
            tiny_of(spec).pipeline(called.task).save_pretrained(made[name])
    return made


def request(spec: ModelSpec, model: ModelDirectory, task: str, **options: Any) -> Request:
    """Two steps, or four where there are two transformers to take turns."""
    own = tiny_of(spec)
    if task == "i2v":
        options["image"] = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    if model.takes(task, "height"):
        options["size"] = own.size
    return make_request(
        model, task, prompt="a red seven moves left", frames=own.frames, steps=2 * len(model.components), **options
    )


def run(path: Path, task: str, wanted: Request, config: Any = None) -> Result:
    told: list[int] = []
    result = generate(load(open_model(path), task, config), wanted, lambda done, _: told.append(done))
    assert told == list(range(1, wanted.steps + 1))
    assert result.frames.shape == (wanted.frames, wanted.height, wanted.width, 3) and result.frames.dtype == np.uint8
    return result


@pipelines
def test_the_pipeline_runs_quantized_online_and_offline_alike(saved, tmp_path, spec, name):
    model, task = open_model(saved[name]), spec.pipelines[name].task
    assert model.spec is spec and model.tasks[0] == task and model.pipelines[task] == name
    wanted = request(spec, model, task)
    exact = run(saved[name], task, wanted).frames.astype(int)
    online = run(saved[name], task, wanted, mxdit.pipeline_config("mxfp8")).frames
    assert 0 < np.abs(online - exact).mean() < 32, "quantization changes the pixels, a little"
    quantize_checkpoint(saved[name], tmp_path / "packed", "mxfp8").write()
    assert inspect_checkpoint(tmp_path / "packed").clean
    assert open_model(tmp_path / "packed").stored.keys() == model.components.keys()
    assert np.array_equal(run(tmp_path / "packed", task, wanted).frames, online)


@pipelines
def test_guidance_changes_the_picture_and_the_pipeline_stays_as_it_was(saved, spec, name):
    model, task = open_model(saved[name]), spec.pipelines[name].task
    pipeline = load(model, task)
    components, config = pipeline.components, dict(pipeline.config)
    first = generate(pipeline, request(spec, model, task)).frames
    assert not np.array_equal(first, generate(pipeline, request(spec, model, task, guidance=1.5)).frames)
    assert np.array_equal(first, generate(pipeline, request(spec, model, task)).frames)
    assert all(part is components[key] for key, part in pipeline.components.items()) and dict(pipeline.config) == config


@pipelines
def test_a_recorded_call_can_be_repeated(saved, spec, name):
    model, task = open_model(saved[name]), spec.pipelines[name].task
    pipeline, recorder = load(model, task), Recorder(keep_calls=True)
    wanted = request(spec, model, task)
    with recorder.listening(pipeline):
        generate(pipeline, wanted, on_latents=recorder.on_latents)
    assert [step["step"] for step in recorder.steps] == list(range(wanted.steps))
    for call in recorder.calls:
        assert call["velocity"].shape == recorder.latents[0].shape
        assert torch.equal(repeat(getattr(pipeline, call["expert"]), call), call["velocity"])


@pipelines
def test_a_request_says_what_the_model_does_not_take(saved, spec, name):
    model, task = open_model(saved[name]), spec.pipelines[name].task
    options = {"negative_prompt": "x", "size": tiny_of(spec).size, "guidance_2": 2.0, "boundary_ratio": 0.5}
    for option, value in options.items():
        field = "height" if option == "size" else option
        if not model.takes(task, field):
            called = {"guidance_2": "guidance scale 2"}.get(option, option.replace("_", " "))
            with pytest.raises(InputError, match=f"takes no {called} for {task}"):
                request(spec, model, task, **{option: value})
    with pytest.raises(InputError, match="expected a request for"):
        make_request(model, "i2i", prompt="x")


@families
def test_presets_are_sizes_that_the_model_takes(saved, spec):
    for name, called in spec.pipelines.items():
        model = open_model(saved[name])
        multiple, temporal = model.geometry.multiple, model.geometry.temporal
        for preset in (preset for preset in spec.presets if preset.task == called.task):
            assert not any(side % multiple for side in preset.size), preset.name
            assert preset.frames == 1 if temporal is None else (preset.frames - 1) % temporal == 0, preset.name


def test_the_preset_of_a_published_model_is_found_by_its_config():
    flux, hunyuan = SPECS["FluxTransformer2DModel"], SPECS["HunyuanVideo15Transformer3DModel"]
    schnell = flux.preset("t2i", {"guidance_embeds": False}, 1)
    assert (schnell.name, schnell.steps, schnell.arguments) == ("FLUX.1-schnell", 4, {"max_sequence_length": 256})
    assert flux.preset("t2i", {"guidance_embeds": True}, 1).name == "FLUX.1-dev"
    assert hunyuan.preset("i2v", {"target_size": 960}, 1).size == (720, 1280)
    assert hunyuan.preset("t2v", {"target_size": 640}, 1).size == (480, 848)
