"""A calibration's page: sound, self-contained, and with what users typed as text."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from mxdit.calibrate.page import page

pytestmark = pytest.mark.slow

VOID = ("meta", "img")
PROMPT = 'a <script>alert(1)</script> & "seven" moving </figcaption> left'


class Page(HTMLParser):
    """What is in a document; an AssertionError for a tag that is not closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.targets: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.targets += [value or "" for name, value in attrs if name in ("src", "href", "poster", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def report(**more: Any) -> dict[str, Any]:
    trials = [{"step": "online", "error": 0.02, "kept": True, "note": ""}]
    linear = {"online": 0.02, "error": 0.01, "kept_in_bf16": False, "trials": trials}
    return {
        "settings": {"recipe": {"method": "mxfp4", "steps": ["gptq"]}, "prompts": {"fit": 2, "held": 4}},
        "accepted": False,
        "guards": [{"what": "clips", "online": "1", "calibrated": "2", "passed": False, "why": "must rise"}],
        "steps": {
            "transformer": [
                {"step": "online", "tried": 1, "why_not": "2 no better on held-out inputs", "kept": 1, "sqnr_db": 17.0}
            ]
        },
        "linears": {"transformer": {"blocks.0.to_q": linear}},
        "kept": {"transformer": []},
        "w4a8": {"transformer": []},
        "plan": {"parameters_in_bf16": 0.1, "bytes": 2**20, "predicted_error": 0.5},
        "curve": [],
        "curve_of": "parameters",
        "gains_by_step": {},
        "activation_steps": {},
        **more,
    }


def made(**more: Any) -> str:
    frames = np.random.default_rng(0).integers(0, 256, (3, 5, 16, 16, 3), dtype=np.uint8)
    labelled = list(zip(("float", "online", "calibrated"), frames, strict=True))
    return page(report(**more), [(PROMPT, labelled)], 8)


def test_it_is_sound_and_asks_for_nothing_from_elsewhere():
    found = Page(made())
    assert all(target.startswith(("#s", "data:")) for target in found.targets)
    kinds = [target.partition(";")[0] for target in found.targets if target.startswith("data:")]
    assert kinds == ["data:image/svg+xml", "data:image/png", "data:video/mp4"]
    for target in found.targets:
        data = base64.b64decode(target.partition(",")[2])
        if "svg" in target[:20]:
            assert Page(data.decode().partition("<svg")[2].join(["<svg", ""])).tags[0] == "svg"
            assert not re.search(rb'href="(?!#)', data)
        elif "png" in target[:20]:
            Image.open(io.BytesIO(data)).load()
        elif "mp4" in target[:20]:
            with av.open(io.BytesIO(data), mode="r") as video:
                assert len(list(video.decode(video=0))) == 5


def test_what_users_typed_is_text():
    found = Page(made())
    assert "script" not in found.tags and found.text.count(PROMPT) == 2  # under the sheet and under the clips


@pytest.mark.parametrize(("unit", "said"), [("parameters", "in BF16, %"), ("bytes", "MiB"), ("time", "time of the")])
def test_a_curve_says_what_is_paid(unit, said):
    text = made(curve=[(0.0, 1.0), (1.0, 0.0)], curve_of=unit, w4a8={"transformer": ["blocks.0.to_q"]})
    pictures = [base64.b64decode(part.partition('"')[0]).decode() for part in text.split("image/svg+xml;base64,")[1:]]
    assert any(said in svg for svg in pictures) and "with MXFP8 activations" in text and "1.0 MiB" in text


@pytest.mark.parametrize(
    ("more", "said", "unsaid"),
    [
        ({"curve": [(0.0, 1.0), (1.0, 0.0)]}, "of the error.", "chosen steps"),
        ({"gains_by_step": {"0": 0.1, "1": 0.2}}, "chosen steps in orange.", "What a budget leaves"),
    ],
)
def test_a_caption_is_of_what_there_is(more, said, unsaid):
    text = made(**more)
    assert said in text and unsaid not in text


def test_a_model_of_one_transformer_has_no_high_noise_expert():
    svg = base64.b64decode(made().partition("image/svg+xml;base64,")[2].partition('"')[0]).decode()
    assert ">transformer<" in svg and "noise" not in svg
