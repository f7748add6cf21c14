"""The report of an evaluation: what it says, what it shows, and that it needs nothing from elsewhere."""

from __future__ import annotations

import copy
import re
from dataclasses import asdict
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mxdit.evals.metrics.definitions import DEFINITIONS
from mxdit.evals.metrics.statistics import interval
from mxdit.evals.pages import figures, sheets
from mxdit.evals.pages.reading import best, number, reading, rows_of
from mxdit.evals.pages.report import write_report

pytestmark = pytest.mark.slow

STEPS, BLOCKS, FRAMES, SIDE = 8, 4, 9, 64
# name, method, activation, rule, how, same_as, MiB, PSNR, velocity error, SQNR
MODES = (
    ("bf16", None, None, None, "float", None, 30.0, 0.0, 0.0, 0.0),
    ("mxfp8 online", "mxfp8", "mxfp8", "ocp", "online", None, 15.9, 38.0, 0.008, 31.0),
    ("mxfp8 offline", "mxfp8", "mxfp8", "ocp", "offline", "mxfp8 online", 15.9, 38.0, 0.008, 31.0),
    ("mxfp4 uos online", "mxfp4", "mxfp4", "uos", "online", None, 8.4, 29.5, 0.05, 17.0),
    ("mxfp4 ocp online", "mxfp4", "mxfp4", "ocp", "online", None, 8.4, 27.5, 0.06, 16.0),
    ("mxfp4_dualscale online", "mxfp4_dualscale", "mxfp4", None, "online", None, 8.9, 29.6, 0.05, 17.5),
)
KINDS = (
    "attn1.to_q",
    "attn1.to_k",
    "attn1.to_v",
    "attn1.to_out.0",
    "attn2.to_q",
    "attn2.to_k",
    "ffn.net.0.proj",
    "ffn.net.2",
)
VIDEO = ("psnr_db", "ssim", "ms_ssim", "cvvdp_jod", "flip", "flicker", "flicker_ratio")
MEANING = ("digit", "color", "direction", "background")


def clip(index: int, noise: float = 0.0) -> np.ndarray:
    """A square that moves over a gradient, with noise: (FRAMES, SIDE, SIDE, 3) uint8."""
    rng = np.random.default_rng((index, round(100 * noise)))
    frames = np.empty((FRAMES, SIDE, SIDE, 3))
    frames[:] = np.linspace(40, 120, SIDE)[:, None]
    for i in range(FRAMES):
        frames[i, 20:40, 4 + 4 * i : 20 + 4 * i] = (200, 60 + 20 * index % 150, 90)
    return (frames + rng.normal(0, 1, frames.shape) * noise).clip(0, 255).astype(np.uint8)


def fake(prompts: int = 8, seeds: int = 2) -> dict[str, Any]:
    """Results as an evaluation writes them, of numbers like those of the bundled model."""
    names = [f"a red {i} moving left <quickly> on a blue & gray background" for i in range(prompts)]
    modes = []
    for order, (name, method, activation, rule, how, same_as, mib, psnr, error, sqnr) in enumerate(MODES):
        rng = np.random.default_rng(0 if same_as else order)
        samples: list[dict[str, Any]] = []
        for index in range(prompts * seeds):
            hard = np.sin(index) * 2
            sample: dict[str, Any] = {"index": index, "prompt": names[index % prompts], "seed": index // prompts}
            sample["group"] = str(index % prompts)
            if method:
                level = psnr + hard + rng.normal() * 0.4
                quality = 1 - 10 ** (-level / 20)
                sample |= dict(
                    zip(VIDEO, (level, quality, quality, 10 - error * 5, error, error * 40, 1 - error), strict=True)
                )
                sample |= {"latent_error": error * 3, "latent_cosine": 1 - error**2}
                sample |= {"velocity_error": error, "velocity_cosine": 1 - error**2} if index < 4 else {}
            right = index % 11 != 3
            asked = {"digit": 7, "color": "red", "direction": "left", "background": "blue"}
            sample |= dict.fromkeys(MEANING, 1.0) | {"digit": float(right)}
            sample["meaning"] = {"asked": asked, "read": asked | ({} if right else {"digit": 1})}
            samples.append(sample)
        steps, layers = [], []
        for step in range(STEPS):
            expert = "transformer" if step < 3 else "transformer_2"
            steps.append({"step": step, "timestep": 1000 - 100 * step, "expert": expert})
            if method:
                grown = error * (1 + step / 3) * (0.5 if expert == "transformer" else 1)
                spread = grown * (1 + rng.normal(size=4) / 10)
                steps[-1] |= {"velocity_error": interval(spread), "latent_error": interval(spread * 2)}
        for expert in ("transformer", "transformer_2") if method else ():
            for block in range(BLOCKS):
                for kind in KINDS:
                    level = sqnr + rng.normal() - 4 * (kind == "ffn.net.2")
                    layers.append(
                        {
                            "expert": expert,
                            "path": f"blocks.{block}.{kind}",
                            "shape": [256, 256],
                            "sqnr_db": level,
                            "n": 256,
                        }
                    )
        layers.sort(key=lambda layer: layer["sqnr_db"])
        summary = {
            key: interval([s[key] for s in samples if key in s], groups=[s["prompt"] for s in samples if key in s])
            for key in DEFINITIONS
            if any(key in sample for sample in samples)
        }
        if layers:
            summary["sqnr_db"] = interval([layer["sqnr_db"] for layer in layers]) | {"lo": None, "hi": None}
        modes.append(
            {
                "name": name, "method": method, "activation": activation, "rule": rule, "how": how, "same_as": same_as,
                "weights_bytes": int(mib * 2**20), "layers_quantized": 80 if method else 0, "layers_kept": 8 if method else 88,
                "seconds": 12.5, "summary": summary, "steps": steps, "layers": layers, "samples": samples,
            }
        )  # fmt: skip
    shown = {key for mode in modes for key in mode["summary"]}
    return {
        "schema": 1,
        "model": {"path": "models/t2v", "name": "mini-T2V", "task": "t2v", "boundary_ratio": 0.875},
        "settings": {
            "prompts": names, "seeds": list(range(seeds)), "steps": STEPS, "guidance": 3.0, "guidance_2": 3.0,
            "height": SIDE, "width": SIDE, "frames": FRAMES, "fps": 8, "samples": prompts * seeds, "groups": prompts,
            "probe_samples": 4,
        },
        "environment": {"device": "cpu", "threads": 2, "packages": {"torch": "2.13.0", "cvvdp": None}, "dtype": "torch.bfloat16"},
        "metrics": {name: asdict(metric) for name, metric in DEFINITIONS.items() if name in shown},
        "modes": modes,
        "seconds": 321.0,
    }  # fmt: skip


def fake_clips(mode: str, index: int) -> np.ndarray:
    return clip(index, {"bf16": 0.0, "mxfp8 online": 2.0}.get(mode, 12.0))


class Page(HTMLParser):
    """Every address that a page loads from, its text, and whether its tags close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.words, self.open = "", []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for key, value in attrs if key in ("src", "href", "poster", "srcset")]
        if tag == "img":
            assert dict(attrs).get("alt"), "an image without a description"
        if tag not in ("img", "meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return fake()


@pytest.fixture(scope="module")
def out(results, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(results, fake_clips, folder)
    return folder


def test_the_page_is_whole_and_asks_for_nothing_from_elsewhere(out):
    text = (out / "report.html").read_text()
    page = Page(text)
    assert not page.open
    assert page.sources and all(source.startswith(("data:", "#")) for source in page.sources)
    assert not re.search(r"@import|url\(|<script|<link", text)
    for kind in ("data:video/mp4", "data:image/png", "data:image/svg+xml"):
        assert any(source.startswith(kind) for source in page.sources), kind


def test_every_number_has_its_definition_unit_and_n(out, results):
    text = (out / "report.html").read_text()
    page = Page(text)
    for about in results["metrics"].values():
        assert about["definition"] in page.words and about["source"] in page.words
    for n in (4, 16, len(results["modes"][1]["layers"])):  # of velocity, of videos, of linears
        assert f'<td class="">{n}</td>' in text


def test_markdown_says_the_same_and_its_pictures_lie_beside_it(out):
    text = (out / "report.md").read_text()
    files = re.findall(r"\]\(([^)]+)\)", text)
    assert files and all((out / name).stat().st_size > 100 for name in files)
    for name in files:
        if name.endswith(".png"):
            Image.open(out / name).verify()
    assert "mxfp4 uos online is worse than" not in text
    tables = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert tables
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_prompts_are_escaped(out):
    text = (out / "report.html").read_text()
    assert "<quickly>" not in text and "&lt;quickly&gt;" in text


def test_modes_that_compute_the_same_are_one_row(results):
    rows = rows_of(results)
    assert [row.label for row in rows][:2] == ["bf16", "mxfp8 online = offline"] and len(rows) == len(MODES) - 1
    assert best(rows, "psnr_db", results["metrics"]["psnr_db"]) == {1}
    assert best(rows, "flip", results["metrics"]["flip"]) == {1}
    for alike in ("flicker_ratio", "color"):  # neither way is better; all are alike
        assert best(rows, alike, results["metrics"][alike]) == set()


def test_a_mode_worse_than_a_cheaper_one_is_said(results):
    worse = copy.deepcopy(results)
    said = " ".join(reading(worse, rows_of(worse)))
    assert "**mxfp4 ocp online is worse than mxfp4 uos online**, which costs the same" in said
    assert "mxfp4_dualscale online is not measurably better than mxfp4 uos online" in said
    for sample in worse["modes"][1]["samples"]:
        sample["psnr_db"] = 20.0
    said = " ".join(reading(worse, rows_of(worse)))
    assert "**mxfp8 online = offline is worse than mxfp4 uos online**, which costs less (8.4 MiB against 15.9)" in said


def test_a_few_prompts_allow_no_verdict():
    few = fake(prompts=2, seeds=4)
    said = " ".join(reading(few, rows_of(few)))
    assert "Closest to BF16: mxfp8 online = offline" in said and "worse" not in said and "measurabl" not in said
    assert not re.search(r"\(\S+ to \S+\)", said)


def test_what_was_not_compared_is_not_judged(results):
    bare = copy.deepcopy(results)
    for name in ("psnr_db", "cvvdp_jod", *MEANING):
        bare["metrics"].pop(name)
        for mode in bare["modes"]:
            mode["summary"].pop(name, None)
            for sample in mode["samples"]:
                sample.pop(name, None)
    assert "worse" not in " ".join(reading(bare, rows_of(bare)))


def test_the_cost_of_a_mode_is_its_widest_activation_s(results):
    mixed = copy.deepcopy(results)
    mixed["modes"][1]["activation"] = "mxfp4, mxfp8"
    assert rows_of(mixed)[1].cost[1] == 8 and rows_of(mixed)[0].cost[1] == 16


def test_a_change_of_what_clips_show_is_said(results):
    changed = copy.deepcopy(results)
    for sample in changed["modes"][3]["samples"]:
        sample["digit"] = 0.0
    said = " ".join(reading(changed, rows_of(changed)))
    assert "what the clips show changes measurably for mxfp4 uos online: Digit right -" in said


def test_a_model_without_a_judge_or_a_second_expert_has_a_report_too(results, tmp_path):
    plain = copy.deepcopy(results)
    plain["model"]["boundary_ratio"] = plain["settings"]["guidance_2"] = None
    plain["modes"] = [mode for mode in plain["modes"] if mode["name"] in ("bf16", "mxfp4 uos online")]
    for name in (*MEANING, "cvvdp_jod", "velocity_error", "velocity_cosine", "sqnr_db"):
        plain["metrics"].pop(name)
        for mode in plain["modes"]:
            mode["summary"].pop(name, None)
            mode["layers"] = []
            for row in (*mode["samples"], *mode["steps"]):
                row.pop(name, None)
                row.pop("meaning", None)
    for mode in plain["modes"]:
        for step in mode["steps"]:
            step["expert"] = "transformer"
    write_report(plain, fake_clips, tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert not Page(text).open and "judge" not in text and "worse than" not in text


def test_a_figure_gives_the_same_bytes_again(results):
    rows = rows_of(results)
    first, again = (figures.rendered(figures.steps(rows)) for _ in range(2))
    assert first == again
    assert figures.steps(rows[:1]) is None and figures.layers(rows[:1]) is None


def test_difference_maps_are_black_where_nothing_differs_and_their_factor_fits():
    reference = clip(0)
    assert not sheets.difference_map(reference[0], reference[0], 4).sum() > 4 * SIDE * SIDE
    lighter = reference.copy()
    lighter[:, :10] += 30
    shown = sheets.difference_map(reference[0], lighter[0], 8)
    assert shown[:10].mean() > 10 * max(shown[10:].mean(), 1)
    assert sheets.amplification([(reference, lighter)]) == 8
    assert sheets.amplification([(reference, reference)]) == 16
    assert sheets.amplification([(reference, 255 - reference)]) == 1


def test_numbers_are_shown_as_their_units_ask():
    assert number(0.9375, "share") == "93.8 %" and number(31.234, "dB") == "31.23"
    assert number(0.01234, "") == "0.0123" and number(0.999987, "", "latent_cosine") == "0.99999"
    assert number(0.5, "dB", sign=True) == "+0.50"
