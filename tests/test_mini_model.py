"""The bundled model: ordinary diffusers directories, shapes that exercise the formats, and clips that survive four bits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import mxdit
from mxdit.generation import directory, media
from mxdit.generation.session import Session
from processes import output_of

pytestmark = pytest.mark.slow

STOCK = """
import sys
import numpy as np, torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image
for cls, directory, image in ((WanPipeline, sys.argv[1], dict()),
                              (WanImageToVideoPipeline, sys.argv[2], dict(image=Image.open(sys.argv[3])))):
    pipe = cls.from_pretrained(directory, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(prompt="a red seven moving left slowly on a blue background", negative_prompt="", height=64, width=64,
                  num_frames=5, num_inference_steps=2, guidance_scale=3.0, output_type="np",
                  generator=torch.Generator().manual_seed(0), **image).frames
    assert "mxdit" not in sys.modules and frames.shape == (1, 5, 64, 64, 3) and np.isfinite(frames).all()
"""


def first_frame() -> Path:
    return directory.bundled("t2v").parent / "first_frame.png"


def test_stock_diffusers_loads_it_without_mxdit():
    output_of("-c", STOCK, directory.bundled("t2v"), directory.bundled("i2v"), first_frame())


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_shapes_are_the_big_models_in_small(task):
    model = directory.open_model(directory.bundled(task))
    assert set(model.components) == {"transformer", "transformer_2"}
    assert model.settings["boundary_ratio"] == {"t2v": 0.875, "i2v": 0.9}[task]
    for config in model.components.values():
        width = config["num_attention_heads"] * config["attention_head_dim"]
        assert config["num_attention_heads"] > 1 and config["num_layers"] >= 4
        assert width % 64 == 0 and config["ffn_dim"] % 1024 == 512  # an odd number of 512 groups, as 13824 = 27 x 512
        assert config["in_channels"] == {"t2v": 16, "i2v": 36}[task]
    preset = model.preset(task)
    assert preset.name.startswith("mini") and preset.frames >= 17 and min(preset.size) >= 64


def test_it_is_small_enough_for_a_repository():
    folder = directory.bundled("t2v").parent
    assert sum(file.stat().st_size for file in folder.rglob("*.safetensors")) <= 60e6


@pytest.mark.parametrize("component", ["vae", "text_encoder", "tokenizer"])
def test_both_pipelines_have_the_same(component):
    """The repository holds these files once, as links, and a wheel twice: an edit of one directory alone is a mistake."""
    t2v, i2v = (
        {file.name: file.read_bytes() for file in (directory.bundled(task) / component).iterdir()}
        for task in ("t2v", "i2v")
    )
    assert len(t2v) == 2 and t2v == i2v


def clip(task: str, method: str | None, source: Path | None = None) -> tuple[np.ndarray, object]:
    """A short T2V or I2V clip, and the pipeline that made it."""
    session = Session.open(source or directory.bundled(task), task=task, method=method)
    image = media.read_image(first_frame()) if task == "i2v" else None
    return session.run(session.request(image=image, frames=5, steps=4)).frames, session.load()


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_offline_is_online_bit_for_bit_and_both_stay_near_bf16(task, tmp_path):
    reference, _ = clip(task, None)
    for method, least in (("mxfp8", 24.0), ("mxfp4", 14.0), ("mxfp4_dualscale", 14.0)):
        online, pipe = clip(task, method)
        pipe.save_pretrained(tmp_path / method)  # pyright: ignore[reportAttributeAccessIssue]
        stored = json.loads((tmp_path / method / "transformer" / "config.json").read_text())["quantization_config"]
        assert stored["quant_method"] == method and stored["is_checkpoint_serialized"] is True
        offline, again = clip(task, None, tmp_path / method)
        assert np.array_equal(online, offline)
        for name in ("transformer", "transformer_2"):
            left, right = getattr(pipe, name).state_dict(), getattr(again, name).state_dict()
            assert left.keys() == right.keys()
            assert all(torch.equal(left[key], right[key]) and left[key].dtype == right[key].dtype for key in left)
        error = np.square(online.astype(float) - reference).mean()
        assert error > 0 and 10 * np.log10(255**2 / error) > least  # another clip entirely would be at about 8 dB
        report = mxdit.report_of(pipe.transformer)  # pyright: ignore[reportAttributeAccessIssue]
        assert len(report.quantized) == 40 and report.bytes_after < report.bytes_before
