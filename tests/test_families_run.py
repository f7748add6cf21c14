"""Every pipeline of every family: opened, asked, run in BF16 and quantized."""

from __future__ import annotations

import io
import json
import re
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from mxdit import MXLinear, Session
from mxdit.checkpoint import inspect_checkpoint, quantize_checkpoint
from mxdit.errors import InputError
from mxdit.evals.velocities import branches_of
from mxdit.generation.directory import open_model
from mxdit.generation.recording import Recorder, repeat, transformers_of
from mxdit.generation.request import Request
from mxdit.generation.session import Result
from mxdit.models import SPECS, ModelSpec
from tiny_families import PIPELINES, TINY, tiny_of

pytestmark = pytest.mark.slow


METHOD = "mxfp4"  # what a method does to a layer has tests of its own


class Opened:
    """One pipeline of a family: its directory, and its sessions, each made when it is first asked for and then shared."""

    def __init__(self, spec: ModelSpec, name: str, root: Path) -> None:
        self.spec, self.name, self.task, self._root = spec, name, spec.pipelines[name].task, root

    @cached_property
    def directory(self) -> Path:
        """The whole pipeline in BF16."""
        own = tiny_of(self.spec)
        if self.name in own.others:
            made = own.others[self.name]()
        else:
            assert own.pipeline is not None, f"write the tiny pipelines of {self.spec.transformer}"
            made = own.pipeline(self.task)
        if type(made).__name__ != self.name:  # a second class for one task, of the same parts
            made = getattr(diffusers, self.name)(**made.components)
        made.save_pretrained(self._root)
        return self._root

    def open(self, directory: Path | None = None, **options: Any) -> Session:
        """A session of it, or of another directory of the same model."""
        return Session.open(directory or self.directory, parts=tiny_of(self.spec).parts, **options)

    @cached_property
    def plain(self) -> tuple[Session, Result, Recorder]:
        """Unquantized, and what its first run gave and called."""
        session, recorder = self.open(), Recorder(keep_calls=True)
        with recorder.listening(session.load()):
            return session, run(session, recorder), recorder

    @cached_property
    def quantized(self) -> tuple[Session, Result]:
        """Quantized while it loaded, and what its first run gave."""
        session = self.open(method=METHOD)
        return session, run(session)


@pytest.fixture(scope="module", params=[pytest.param(of.values, id=of.id) for of in PIPELINES])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """Each pipeline once: its tests run one after the other, and then it is let go."""
    return Opened(*request.param, tmp_path_factory.mktemp("pipeline"))


def request(session: Session, **options: Any) -> Request:
    """Two steps, or four where there are two transformers to take turns."""
    own = tiny_of(session.model.spec)
    if session.task == "i2v":
        options["image"] = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    if session.model.takes(session.task, "height"):
        options["size"] = own.size
    if session.model.takes(session.task, "frames"):
        options["frames"] = own.frames
    steps = 2 * len(session.model.components)
    return session.request(**{"prompt": "a red seven moves left", "steps": steps, **options})


def run(session: Session, recorder: Recorder | None = None) -> Result:
    told, wanted = list[int](), request(session)
    result = session.run(
        wanted, lambda done, _: told.append(done), on_latents=recorder.on_latents if recorder else None
    )
    assert told == list(range(1, wanted.steps + 1))
    assert result.frames.shape == (wanted.frames, wanted.height, wanted.width, 3) and result.frames.dtype == np.uint8
    return result


def test_the_pipeline_runs_quantized_online_and_offline_alike(opened, tmp_path):
    session, exact, _ = opened.plain
    assert session.model.spec is opened.spec and session.task == opened.task
    assert session.model.pipelines[session.task] == opened.name
    _, online = opened.quantized
    if opened.spec.pipelines[opened.name].makes:
        assert not exact.frames[:, :2, :2].any(), "a guardrail of ours has seen the frames, and blackens a corner"
    assert 0 < np.abs(online.frames - exact.frames.astype(int)).mean() < 32, "quantization changes the pixels, a little"
    quantize_checkpoint(opened.directory, tmp_path / "packed", METHOD).write()
    assert inspect_checkpoint(tmp_path / "packed").clean
    packed = opened.open(tmp_path / "packed")
    assert packed.model.stored.keys() == packed.model.components.keys()
    assert np.array_equal(run(packed).frames, online.frames)
    online.save(tmp_path / ("clip.png" if session.task == "t2i" else "clip.mp4"))


def test_guidance_changes_the_picture_and_the_pipeline_stays_as_it_was(opened):
    session, first, _ = opened.plain
    pipeline = session.load()
    components, config = pipeline.components, dict(pipeline.config)
    assert not np.array_equal(first.frames, session.run(request(session, guidance=1.75)).frames)
    assert np.array_equal(first.frames, session.run(request(session)).frames)
    assert all(part is components[key] for key, part in pipeline.components.items()) and dict(pipeline.config) == config


def test_a_recorded_call_can_be_repeated(opened):
    session, result, recorder = opened.plain
    assert [step["step"] for step in recorder.steps] == list(range(result.request.steps))
    # Not of the latents' shape: some keep given frames out of them, some predict tokens, or variances beside.
    assert {call["step"] for call in recorder.calls} == set(range(result.request.steps))
    for call in recorder.calls:
        torch.save(call, file := io.BytesIO())
        kept = torch.load(io.BytesIO(file.getvalue()), weights_only=True)  # as calibration keeps it
        assert torch.equal(repeat(getattr(session.load(), call["expert"]), kept), call["velocity"])


def test_both_branches_of_guidance_are_told_apart(opened, monkeypatch):
    """The scheduler is given what guidance makes of them: the prompt's is the first of two calls, or as the spec has it."""
    session, _, _ = opened.plain
    scheduler, recorder = type(session.load().scheduler), Recorder(keep_calls=True)
    step, given = scheduler.step, list[tuple[torch.Tensor, torch.Tensor]]()
    mark = opened.spec.pipelines[opened.name].step_given

    def watched(self: Any, velocity: torch.Tensor, t: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if mark is None or mark in kwargs:
            given.append((velocity, sample))
        return step(self, velocity, t, sample, *args, **kwargs)

    monkeypatch.setattr(scheduler, "step", watched)
    with recorder.listening(session.load()):
        session.run(request(session, guidance=3.0), on_latents=recorder.on_latents)
    first = [call for call in recorder.calls if call["step"] == 0]
    branches = [v for call in first for v in branches_of(call["velocity"].double(), call)][:2]
    batched = len(first[0]["velocity"]) > 1
    assert batched or not opened.spec.pipelines[opened.name].prompt_first, "prompt_first is for calls of both branches"
    if len(branches) == 1:
        return  # a model that was distilled to take guidance as a number
    guided, sample = (tensor.double() for tensor in given[0])
    if branches[0].numel() == 2 * guided.numel():  # PixArt's have variances beside
        branches = [v.chunk(2, dim=1)[0] for v in branches]
    if branches[0].numel() != guided.numel():
        assert opened.task == "i2v", "only a given frame is left out of what the scheduler is given"
        return
    tensors = [guided, *branches, sample]
    if opened.task == "i2v" and guided.ndim == 5 and all(tensor.shape == guided.shape for tensor in tensors):
        tensors = [tensor[:, :, 1:] for tensor in tensors]  # some give the scheduler the frame that is given
    # Of g c + (1 - g) u, or its negative: the prompt's branch has the larger part. Some mix predictions of the clip, with a part
    # of the sample in them.
    wanted, *columns = (tensor.flatten() for tensor in tensors)
    conditional, unconditional, _ = torch.linalg.lstsq(torch.stack(columns, 1), wanted[:, None]).solution.flatten()
    assert abs(conditional) > abs(unconditional)
    if opened.task != "i2v":
        # Some scale it afterwards, which leaves their proportion about the same.
        scale = 3.0 + opened.spec.pipelines[opened.name].guidance_added
        assert float(conditional / unconditional) == pytest.approx(-scale / (scale - 1), rel=0.08)


def test_a_request_says_what_the_model_does_not_take(opened):
    session = opened.open()
    options = {"negative_prompt": "x", "size": tiny_of(opened.spec).size, "guidance_2": 2.0, "boundary_ratio": 0.5}
    for option, value in options.items():
        if not session.model.takes(session.task, "height" if option == "size" else option):
            with pytest.raises(InputError, match=f"takes no .* for {session.task}") as caught:
                request(session, **{option: value})
            assert caught.value.field == option
    with pytest.raises(InputError, match=f"got i2i; expected {session.task}"):
        Session.open(opened.directory, task="i2i")


def test_a_pipeline_that_makes_a_guardrail_does_not_run_without_one(tmp_path, monkeypatch):
    own = TINY["CosmosTransformer3DModel"]
    assert own.pipeline is not None
    own.pipeline("t2i").save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "cosmos_guardrail", None)  # as where it is not installed
    with pytest.raises(InputError, match=r"makes its safety checker of a package.*no cosmos_guardrail.*pip install"):
        Session.open(tmp_path).load()
    checker = type(own.parts["safety_checker"])()
    for parts in ({"safety_checker": None}, {"safety": checker}, {"transformer": checker, "safety_checker": checker}):
        with pytest.raises(InputError, match="no component of this pipeline that can be given") as caught:
            Session.open(tmp_path, parts=parts).load()
        assert caught.value.field == "parts"
    session = Session.open(tmp_path, parts={"safety_checker": checker})
    session.run(request(session, prompt="a red seven"))
    assert checker.seen == ["a red seven", (1, *own.size, 3)]
    with pytest.raises(ValueError, match="unsafe text in the prompt: a weapon"):
        session.run(request(session, prompt="a weapon"))
    config = tmp_path / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"concat_padding_mask": True}))
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(InputError, match=r"the transformer needs a package.*concat_padding_mask, and no torchvision"):
        Session.open(tmp_path, parts={"safety_checker": checker}).load()


def test_a_distilled_model_without_a_guider_takes_no_guidance(tmp_path):
    make = TINY["HunyuanImageTransformer2DModel"].pipeline
    assert make is not None
    pipeline: Any = make("t2i")
    pipeline.register_modules(guider=None, ocr_guider=None)
    pipeline.save_pretrained(tmp_path)
    session = Session.open(tmp_path)
    assert request(session).guidance is None
    with pytest.raises(InputError, match="takes no guidance scale for t2i"):
        request(session, guidance=2.0)


def test_a_size_that_the_pipeline_would_change_is_refused(tmp_path):
    own, spec = TINY["HiDreamImageTransformer2DModel"], SPECS["HiDreamImageTransformer2DModel"]
    assert own.pipeline is not None and spec.geometry is not None
    scaled = spec.geometry({"patch_size": 2}, {}).scaled
    assert scaled is not None
    # Source: what inference.py of the model's release offers.
    for size in ((1024, 1024), (768, 1360), (1360, 768), (880, 1168), (1168, 880), (1248, 832), (832, 1248)):
        assert scaled(*size) == size
    assert scaled(512, 512) == (1024, 1024)
    pipeline: Any = own.pipeline("t2i")
    pipeline.save_pretrained(tmp_path)
    session = Session.open(tmp_path)
    with pytest.raises(InputError, match="would make another size of this one; got 128x32") as caught:
        session.request(prompt="a", size=(32, 128))
    width, height = map(int, re.findall(r"\d+", str(caught.value.hint)))
    assert caught.value.field == "size"
    assert session.request(prompt="a", size=(height, width)).width == 4 * height
    with pytest.raises(InputError, match="sides that are less unequal"):
        session.request(prompt="a", size=(16, 2**20))
    made = pipeline("a", height=32, width=128, num_inference_steps=1, guidance_scale=1.0, output_type="latent").images
    assert made.shape[-2:] == (height, width)  # its VAE has stride 1


def test_a_vae_that_decodes_whole_tiles_takes_their_sizes_alone(tmp_path):
    make = TINY["AllegroTransformer3DModel"].pipeline
    assert make is not None
    make("t2v").save_pretrained(tmp_path)
    session = Session.open(tmp_path)  # tiles of 24 x 128 x 128
    assert session.load().vae.use_tiling
    # A share of a tile is decoded by none of them, and black.
    refused = {"frames": (23, 39), "size": ((112, 128), (128, 144))}
    for field, values in refused.items():
        for value in values:
            with pytest.raises(InputError, match=f"fit the .*VAE.*{24 if field == 'frames' else 128}") as caught:
                session.request(**{"prompt": "red", "frames": 24, "size": (128, 128), field: value})
            assert caught.value.field == field
    assert session.request(prompt="red", frames=40, size=(144, 176)).frames == 40
    published = SPECS["AllegroTransformer3DModel"]
    assert published.geometry is not None
    geometry, preset = published.geometry({"patch_size": 2}, {}), published.presets[0]
    assert geometry.tiles == ((320, 400), (320, 240)) and geometry.nearest_frames(80) == 88 == preset.frames
    assert not any((side - least) % step for side, (least, step) in zip(preset.size, geometry.tiles, strict=True))


def test_presets_are_sizes_that_the_model_takes(opened):
    model = open_model(opened.directory)
    geometry, config = model.geometry, next(iter(model.components.values()))
    for preset in (preset for preset in opened.spec.presets if preset.task == opened.task):
        assert not any(side % geometry.multiple for side in preset.size), preset.name
        if preset.fits(config, len(model.components)):  # another model's VAE may have another stride
            assert preset.frames == (1 if geometry.temporal is None else geometry.nearest_frames(preset.frames))


def test_the_preset_of_a_published_model_is_found_by_its_config():
    flux, hunyuan = SPECS["FluxTransformer2DModel"], SPECS["HunyuanVideo15Transformer3DModel"]
    schnell = flux.preset("t2i", {"guidance_embeds": False}, 1)
    assert (schnell.name, schnell.steps, schnell.arguments) == ("FLUX.1-schnell", 4, {"max_sequence_length": 256})
    assert flux.preset("t2i", {"guidance_embeds": True}, 1).name == "FLUX.1-dev"
    assert hunyuan.preset("i2v", {"target_size": 960}, 1).size == (720, 1280)
    assert hunyuan.preset("t2v", {"target_size": 640}, 1).size == (480, 848)


def test_activations_by_step(opened):
    """Each pipeline says its steps in a way that mxdit understands: at each, all linears have what the request says."""
    session, plain = opened.quantized
    models = transformers_of(session.load())
    seen, done, hooks = [], list[int](), []
    for model in models.values():
        linears = [module for module in model.modules() if isinstance(module, MXLinear)]
        block = model.get_submodule(opened.spec.blocks[0])[0]  # pyright: ignore[reportIndexIssue]
        hook = block.register_forward_pre_hook(
            lambda *_, linears=linears: seen.append((len(done), {m.activation for m in linears}))
        )
        hooks.append(hook)
    last = plain.request.steps - 1
    policy = {"bf16": [0], "mxfp8": [last], "of": last + 1}
    mixed = session.run(request(session, activation_steps=policy), lambda *_: done.append(1)).frames
    own = {0: {"bf16"}, last: {"mxfp8"}}
    assert {step for step, _ in seen} == set(range(last + 1))
    assert all(found == own.get(step, {"mxfp4"}) for step, found in seen)
    seen.clear()
    again = session.run(request(session)).frames
    assert seen and all(found == {"mxfp4"} for _, found in seen)
    for hook in hooks:
        hook.remove()
    assert not np.array_equal(mixed, plain.frames) and np.array_equal(again, plain.frames)
