"""The mini model's data: what is held out is held out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mxdit_models import digits as data

pytestmark = pytest.mark.slow


def test_no_scan_is_in_two_splits():
    splits = [data.scans(name)[0].flatten(1) for name in ("train", "judge", "test")]
    assert sum(map(len, splits)) == 1797
    kept = [{tuple(row) for row in split.tolist()} for split in splits]
    assert not kept[0] & kept[1] and not kept[0] & kept[2] and not kept[1] & kept[2]


def test_held_out_captions_are_never_drawn():
    held = data.heldout_specs()
    assert len(held) == len(set(held)) >= 64 and {spec.digit for spec in held[:64]} == set(range(10))
    rng = np.random.default_rng(0)
    drawn = [data.sample_spec(rng, frozenset(held)) for _ in range(5000)]
    assert not set(drawn) & set(held)
    assert all(spec.color != spec.background for spec in [*held, *drawn])


@pytest.mark.parametrize("direction", ["left", "right", "up", "down"])
def test_a_clip_moves_as_its_caption_says_and_keeps_its_colors(direction):
    spec = data.Spec(0, "red", direction, "quickly", "blue")
    assert spec.caption == f"a red zero moving {direction} quickly on a blue background"
    clip = data.render([spec], np.random.default_rng(1))[0]
    assert clip.shape == (3, 17, 64, 64) and clip.abs().max() <= 1
    red = clip[0] > clip[2]  # (frames, height, width): the digit
    axis = torch.arange(64.0)
    x, y = ((red.sum(dim) * axis).sum(-1) / red.sum((1, 2)) for dim in (1, 2))
    moved = torch.stack([x[-1] - x[0], y[-1] - y[0]])
    wanted = torch.tensor(data.DIRECTIONS[direction]) * data.SPEEDS["quickly"]
    assert torch.allclose(moved, wanted, atol=4.0)
