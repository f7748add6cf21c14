"""Metrics, statistics, the judge and the adapters: values with known answers, and what is refused."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

import tiny
from mxdit.errors import InputError
from mxdit.evals.metrics import networks as adapters
from mxdit.evals.metrics import video_metrics
from mxdit.evals.metrics.definitions import DEFINITIONS, PSNR_CEILING
from mxdit.evals.metrics.judge import ASKED, judge_for
from mxdit.evals.metrics.statistics import difference, interval
from mxdit.evals.metrics.video_metrics import VIDEO_METRICS, psnr_db, unavailable
from mxdit.evals.metrics.video_metrics import video_metrics as measure
from mxdit.generation import directory

rng = np.random.default_rng(0)
REFERENCE = rng.integers(40, 200, (5, 64, 64, 3)).astype(np.uint8)
NOISY = (REFERENCE + rng.integers(-20, 21, REFERENCE.shape)).astype(np.uint8)


def test_equal_clips_are_perfect():
    values = measure(REFERENCE, REFERENCE, 8)
    assert set(values) == set(VIDEO_METRICS) - set(unavailable())
    assert values["psnr_db"] == PSNR_CEILING and values["flicker"] == 0 and values["flicker_ratio"] == 1
    assert values["ssim"] == pytest.approx(1, abs=1e-6) and values["ms_ssim"] == pytest.approx(1, abs=1e-6)
    assert values["flip"] == pytest.approx(0, abs=1e-6)


def test_more_noise_is_worse_by_every_metric():
    mild = (REFERENCE + rng.integers(-3, 4, REFERENCE.shape)).astype(np.uint8)
    near, far = measure(REFERENCE, mild, 8), measure(REFERENCE, NOISY, 8)
    for name in near:
        if DEFINITIONS[name].better:
            assert (near[name] > far[name]) == (DEFINITIONS[name].better == "higher"), name


def test_psnr_is_over_all_pixels_of_the_clip():
    shifted = REFERENCE.copy()
    shifted[0] += 10  # one of five frames
    assert psnr_db(REFERENCE, shifted) == pytest.approx(10 * math.log10(255**2 / (100 / 5)))


def test_ssim_and_flip_of_known_differences():
    """Of two gray levels a and b SSIM is (2ab + C1) / (a^2 + b^2 + C1), C1 = 2.55^2; FLIP of black and white is nearly 1."""
    dark, light = (np.full((2, 32, 32, 3), level, dtype=np.uint8) for level in (60, 90))
    c1 = 2.55**2
    assert measure(dark, light, 8, ["ssim"])["ssim"] == pytest.approx(
        (2 * 60 * 90 + c1) / (60**2 + 90**2 + c1), abs=1e-4
    )
    black, white = (np.full((1, 32, 32, 3), level, dtype=np.uint8) for level in (0, 255))
    assert measure(black, white, 8, ["flip"])["flip"] > 0.95


def test_flicker_ratio_is_of_the_clip_to_the_reference():
    base = np.full((4, 16, 16, 3), 100, dtype=np.uint8)
    slow, fast = base.copy(), base.copy()
    slow[1::2] += 5
    fast[1::2] += 20
    assert measure(slow, fast, 8, ["flicker_ratio"])["flicker_ratio"] == pytest.approx(4)


def test_an_error_that_stands_still_does_not_flicker():
    still = REFERENCE + 10
    assert measure(REFERENCE, still, 8, ["flicker"])["flicker"] == 0
    jumping = REFERENCE.copy()
    jumping[1::2] += 10
    assert measure(REFERENCE, jumping, 8, ["flicker"])["flicker"] == 10


def test_what_a_clip_does_not_have_is_left_out():
    assert measure(REFERENCE[:1], NOISY[:1], 8, ["flicker", "flicker_ratio", "psnr_db"]).keys() == {"psnr_db"}
    frozen = np.repeat(REFERENCE[:1], 5, 0)
    assert measure(frozen, NOISY, 8, ["flicker_ratio"]) == {}


@pytest.mark.parametrize("side", [11, 16, 22, 44, 64, 99, 176])
def test_ms_ssim_has_as_many_scales_as_fit(side):
    frame = np.tile(np.arange(side, dtype=np.uint8), (2, side, 1))[..., None].repeat(3, -1)
    assert measure(frame, frame, 8, ["ms_ssim"])["ms_ssim"] == pytest.approx(1, abs=1e-5)
    assert 0 < measure(frame, frame // 2 * 2, 8, ["ms_ssim"])["ms_ssim"] < 1


def test_frames_compared_together_or_one_by_one_are_the_same(monkeypatch):
    together = measure(REFERENCE, NOISY, 8, ["ssim", "ms_ssim"])
    monkeypatch.setattr(video_metrics, "BATCH", 1)
    assert measure(REFERENCE, NOISY, 8, ["ssim", "ms_ssim"]) == pytest.approx(together, rel=1e-5)


@pytest.mark.skipif("cvvdp_jod" in unavailable(), reason=unavailable().get("cvvdp_jod", ""))
def test_colorvideovdp_finds_no_difference_between_equal_clips():
    assert measure(REFERENCE, REFERENCE, 8, ["cvvdp_jod"])["cvvdp_jod"] == pytest.approx(10)


def test_a_metric_without_its_package_says_so(monkeypatch):
    monkeypatch.setitem(video_metrics.PACKAGES, "ssim", ("no_such_package", "eval"))
    video_metrics._package.cache_clear()
    try:
        assert "no_such_package" in unavailable()["ssim"] and "mxdit[eval]" in unavailable()["ssim"]
        assert "ssim" not in measure(REFERENCE, NOISY, 8, None if "cvvdp_jod" in unavailable() else ["psnr_db"])
        with pytest.raises(InputError, match="ssim is not available"):
            measure(REFERENCE, NOISY, 8, ["ssim"])
    finally:
        video_metrics._package.cache_clear()


@pytest.mark.parametrize(
    ("reference", "clip", "names", "message"),
    [
        (REFERENCE, NOISY[:2], None, "no pair"),
        (REFERENCE, NOISY.astype(float), None, "no pair"),
        (REFERENCE[:, :8], NOISY[:, :8], None, "sides of 11"),
        (REFERENCE[..., :1], NOISY[..., :1], None, "not a clip"),
        (REFERENCE, NOISY, ["vmaf"], "no such video metric"),
    ],
)
def test_what_cannot_be_measured_is_refused(reference, clip, names, message):
    with pytest.raises(InputError, match=message):
        measure(reference, clip, 8, names)


def test_every_definition_is_complete():
    for name, metric in DEFINITIONS.items():
        assert all(value or key in ("unit", "better") for key, value in asdict(metric).items()), name
        assert metric.level in ("layer", "model", "trajectory", "video", "meaning"), name
        assert metric.better in ("higher", "lower", None) and metric.definition.endswith("."), name
    assert set(VIDEO_METRICS) | set(ASKED) <= set(DEFINITIONS)


def test_the_interval_covers_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(3).normal(5, 2, (200, 40))
    hits = sum(found["lo"] <= 5 <= found["hi"] for found in (interval(list(row), resamples=500) for row in draws))
    assert 180 <= hits <= 198


def test_intervals_of_one_value_of_equal_ones_and_of_groups():
    assert interval([3.5]) == {"mean": 3.5, "lo": None, "hi": None, "n": 1}
    assert interval([1.0, 2.0] * 5, groups=list("aabbccddee")) == {"mean": 1.5, "lo": None, "hi": None, "n": 10}
    assert interval([1.0] * 6)["lo"] == 1.0  # six of one sign happen by chance in 3 % of the cases
    found = interval([0.1] * 30)
    assert found["lo"] <= found["mean"] <= found["hi"] and found["hi"] - found["lo"] < 1e-12
    values = [float(i // 2) for i in range(40)]  # two seeds a prompt, alike
    single, grouped = interval(values), interval(values, groups=[i // 2 for i in range(40)])
    assert grouped["hi"] - grouped["lo"] > 1.2 * (single["hi"] - single["lo"]) and grouped["mean"] == single["mean"]


def test_a_paired_difference_sees_what_unpaired_means_do_not():
    hard = np.random.default_rng(1).normal(30, 5, 40)
    gap = difference(list(hard), list(hard - 0.2))
    assert difference([1.0], [0.5])["lo"] is None
    assert 0 < gap["lo"] <= 0.2 <= gap["hi"] + 1e-9 and gap["hi"] < 0.21
    for bad in ([], [math.inf], [math.nan]):
        with pytest.raises(InputError, match="no mean"):
            interval(bad)
    with pytest.raises(InputError, match="differ in number"):
        difference([1.0], [1.0, 2.0])


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_the_judge_asks_for_held_out_captions_and_reads_their_clips(task):
    digits = pytest.importorskip("mxdit_models.digits")
    judge = judge_for(directory.open_model(directory.bundled(task)), task)
    assert judge is not None
    samples = judge.samples(6)
    assert [sample.prompt for sample in samples] == [spec.caption for spec in digits.heldout_specs()[:6]]
    assert judge.samples(3)[2].image == samples[2].image  # whatever the number asked for
    assert all((sample.image is None) == (task == "t2v") for sample in samples)
    with pytest.raises(InputError, match="held-out"):
        judge.samples(10_000)


@pytest.mark.slow
def test_the_judge_reads_real_clips_and_notices_a_wrong_one():
    digits = pytest.importorskip("mxdit_models.digits")
    judge = judge_for(directory.open_model(directory.bundled("i2v")), "i2v")
    assert judge is not None
    samples = judge.samples(8)
    clips = digits.render(list(digits.heldout_specs()[:8]), np.random.default_rng(1), "test", spread=digits.NEAR)
    clips = ((clips + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()
    scores = [judge.read(sample, clip)[0] for sample, clip in zip(samples, clips, strict=True)]
    for key in ASKED:
        assert sum(score[key] for score in scores) >= 7, key
    backwards, read = judge.read(samples[0], clips[0][::-1].copy())
    assert backwards["direction"] == 0 and backwards["color"] == 1
    assert read["direction"] != samples[0].asked["direction"] and read["color"] == samples[0].asked["color"]
    exact = clips[0].copy()
    exact[0] = np.asarray(samples[0].image)
    assert judge.read(samples[0], exact)[0]["first_frame_psnr_db"] == PSNR_CEILING
    assert isinstance(samples[0].image, Image.Image)


def test_other_models_have_no_judge(tmp_path):
    assert judge_for(directory.open_model(tiny.save(tmp_path)), "t2v") is None


@pytest.mark.parametrize("name", list(adapters.ADAPTERS))
def test_an_adapter_says_what_it_lacks(name, tmp_path):
    adapter = adapters.ADAPTERS[name]
    for weights in (None, tmp_path):
        reason = adapter.why_not(weights)
        assert reason is not None and all(file in reason for file in adapter.files)
        with pytest.raises(InputError, match="cannot be computed"):
            adapters.measure(name, weights, [], 8)


def test_the_frechet_distance_of_known_gaussians():
    a = np.random.default_rng(0).normal(size=(4000, 3))
    assert adapters.frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert adapters.frechet(a, a + 2) == pytest.approx(12)
    assert adapters.frechet(a, 3 * a - 2 * a.mean(0)) == pytest.approx(4 * np.trace(np.cov(a, rowvar=False)))
