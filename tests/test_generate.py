"""Requests take a model's own defaults; video and image files."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from mxdit.errors import InputError
from mxdit.generation import media
from mxdit.generation.directory import open_model
from mxdit.generation.request import make_request
from mxdit.models import SPECS

pytestmark = pytest.mark.slow


def directory(root: Path, task: str, *, layers: int, heads: int, boundary: float | None, ti2v: bool = False) -> Path:
    """The JSON files of a published model, without its weights."""
    index = {
        "_class_name": {"t2v": "WanPipeline", "i2v": "WanImageToVideoPipeline"}[task],
        "boundary_ratio": boundary,
        "expand_timesteps": ti2v,
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"] if boundary else [None, None],
    }
    config = {
        "_class_name": "WanTransformer3DModel",
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": 128,
        "patch_size": [1, 2, 2],
        "rope_max_seq_len": 1024,
    }
    vae = {"scale_factor_temporal": 4, "scale_factor_spatial": 16 if ti2v else 8}
    files = {"model_index.json": index, "transformer/config.json": config, "vae/config.json": vae}
    if boundary:
        files["transformer_2/config.json"] = config
    for name, value in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(value))
    return root


def test_t2v_a14b(tmp_path):
    model = open_model(directory(tmp_path, "t2v", layers=40, heads=40, boundary=0.875))
    request = make_request(model, "t2v", prompt="x")
    assert (request.height, request.width, request.frames, request.steps) == (480, 832, 81, 40)
    # Wan's own tuple is (low, high) = (3, 4); diffusers' first scale is the high-noise one.
    assert (request.guidance, request.guidance_2, request.flow_shift) == (4.0, 3.0, 12.0)
    assert model.preset("t2v").fps == 16
    # One scale given holds for both experts, as in diffusers.
    request = make_request(model, "t2v", prompt="x", guidance=6.0)
    assert (request.guidance, request.guidance_2) == (6.0, 6.0)


def test_i2v_a14b_takes_the_aspect_of_the_image(tmp_path):
    model = open_model(directory(tmp_path, "i2v", layers=40, heads=40, boundary=0.9))
    request = make_request(model, "i2v", prompt="x", image=Image.new("RGB", (1000, 2000)))
    assert (request.guidance, request.guidance_2, request.flow_shift) == (3.5, 3.5, 5.0)
    assert request.height % 16 == 0 and request.width % 16 == 0
    assert request.height / request.width == pytest.approx(2.0, rel=0.05)
    assert request.height * request.width <= 480 * 832
    assert request.image is not None and request.image.size == (request.width, request.height)


def test_ti2v_5b_makes_both(tmp_path):
    model = open_model(directory(tmp_path, "t2v", layers=30, heads=24, boundary=None, ti2v=True))
    assert model.tasks == ("t2v", "i2v") and model.geometry.multiple == 32
    request = make_request(model, "t2v", prompt="x")
    assert (request.height, request.width, request.frames, request.guidance_2) == (704, 1280, 121, None)
    assert make_request(model, "i2v", prompt="x", image=Image.new("RGB", (64, 64))).height == 928
    with pytest.raises(InputError, match="multiple of 32"):
        make_request(model, "t2v", prompt="x", size=(720, 1280))
    with pytest.raises(InputError, match="TI2V-5B takes no guidance scale 2"):
        make_request(model, "t2v", prompt="x", guidance_2=3.0)
    with pytest.raises(InputError, match="takes no boundary ratio for t2v"):
        make_request(model, "t2v", prompt="x", boundary_ratio=0.5)


def test_wan21_has_one_expert_and_keeps_its_scheduler(tmp_path):
    model = open_model(directory(tmp_path, "t2v", layers=40, heads=40, boundary=None))
    assert model.preset("t2v").name == "Wan" and make_request(model, "t2v", prompt="x").flow_shift is None


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_an_unknown_size_keeps_the_scheduler_as_it_is(spec):
    for task in {made.task for made in spec.pipelines.values()}:
        assert spec.preset(task, {}, 7).flow_shift is None
        fitting = [preset for preset in spec.presets if preset.task == task]
        assert [preset for preset in fitting if not preset.config] == fitting[-1:]


def test_mp4_holds_the_frames(tmp_path):
    ramp = np.linspace(0, 255, 9 * 32 * 48).reshape(9, 32, 48, 1).repeat(3, -1).astype(np.uint8)
    media.write_mp4(tmp_path / "ramp.mp4", ramp, 16)
    with av.open(str(tmp_path / "ramp.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == 16
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert decoded.shape == ramp.shape
    assert np.abs(decoded.astype(int) - ramp).mean() < 2.0


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "clip.mp4"
    target.write_bytes(b"old")
    with pytest.raises(InputError, match="could not be written"):
        media.write_mp4(target, np.zeros((2, 31, 33, 3), np.uint8), 16)  # odd sides do not fit yuv420p
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


def test_images_are_turned_and_cut_never_stretched(tmp_path):
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60] = 255  # the middle square is white
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    image = media.read_image(tmp_path / "wide.png")
    square = np.asarray(media.cover(image, 40, 40))
    assert square.shape == (40, 40, 3) and square.min() == 255
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held upright
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif)
    assert media.read_image(tmp_path / "turned.jpg").size == (40, 80)
    Image.new("RGBA", (4, 4)).save(tmp_path / "clear.png")
    assert media.read_image(tmp_path / "clear.png").mode == "RGB"
