"""A first frame, as files come to a page: chosen, dropped, pasted."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from desk import ask, card

MODEL = "tiny-i2v"


def picture(path: Path) -> Path:
    pixels = np.random.default_rng(len(path.name)).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def choose(page: Page, file: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.locator("#input_reference").click()
    chooser.value.set_files(file)


def drop(page: Page, file: Path) -> None:
    """As the system does it: over the page, and let go."""
    page.locator("#drop").scroll_into_view_if_needed()
    box = page.locator("#drop").bounding_box()
    assert box is not None
    place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
    devtools = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver"):
        devtools.send("Input.dispatchDragEvent", {"type": kind, **place, "data": data})
    expect(page.locator("#drop")).to_have_class("drop over")
    devtools.send("Input.dispatchDragEvent", {"type": "drop", **place, "data": data})
    expect(page.locator("#drop")).to_have_class("drop")


def paste(page: Page, file: Path) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate(
        """async (text) => {
          const bytes = Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
          const image = new Blob([bytes], { type: "image/png" });
          await navigator.clipboard.write([new ClipboardItem({ "image/png": image })]);
        }""",
        base64.b64encode(file.read_bytes()).decode(),
    )
    page.locator("#prompt").focus()
    page.keyboard.press("Control+V")


@pytest.mark.parametrize("give", [choose, drop, paste])
def test_the_job_runs_with_the_frame_that_was_given(page: Page, server, tmp_path, give: Callable[[Page, Path], None]):
    file, prompt = picture(tmp_path / f"{give.__name__}.png"), f"to {give.__name__}"
    page.locator("#model").select_option(MODEL)
    give(page, file)
    page.wait_for_function("() => document.getElementById('first-frame-image').naturalWidth === 16")
    ask(page, prompt, MODEL)
    result = card(page, prompt)
    expect(result.get_by_role("button", name="Download")).to_be_visible()
    (job,) = (one for one in server.client.get("/v1/videos").json()["data"] if one["prompt"] == prompt)
    sent = server.client.get(f"/v1/videos/{job['id']}/input").content
    assert np.array_equal(pixels(sent), pixels(file.read_bytes()))  # the clipboard writes the file anew
    # The same frame goes with the same request in another mode.
    result.get_by_role("button", name="Again").click()
    expect(card(page, prompt, "MXFP4").get_by_role("button", name="Download")).to_be_visible()
    again = server.client.get("/v1/videos?limit=1").json()["data"][0]
    assert again["model"] == f"{MODEL}:mxfp4"
    assert server.client.get(f"/v1/videos/{again['id']}/input").content == sent


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_without_a_frame_nothing_is_sent(page: Page):
    ask(page, "no frame", MODEL)
    expect(page.locator("#input_reference-error")).to_have_text("This model needs a first frame.")
    expect(page.locator("#input_reference")).to_be_focused()
    expect(page.locator("#queue-empty")).to_be_visible()
    page.locator("#model").select_option("tiny-t2v")
    expect(page.locator("#input_reference")).to_be_hidden()


def test_what_is_no_image_is_refused_and_a_frame_can_be_taken_away(watched, tmp_path):
    page, text = watched.page, tmp_path / "text.txt"
    text.write_text("no image")
    page.locator("#model").select_option(MODEL)
    drop(page, text)
    expect(page.locator("#input_reference-error")).to_have_text("Not a PNG, JPEG or WebP image.")
    false = tmp_path / "false.png"
    false.write_text("no image")
    choose(page, false)
    ask(page, "no image", MODEL)
    expect(page.locator("#input_reference-error")).to_contain_text("not a readable image")
    watched.forgive("status of 400")
    choose(page, picture(tmp_path / "true.png"))
    expect(page.locator("#input_reference-error")).to_be_hidden()
    expect(page.locator("#first-frame-name")).to_have_text("true.png")
    page.get_by_role("button", name="Remove").first.click()
    expect(page.locator("#first-frame")).to_be_hidden()
    expect(page.locator("#input_reference")).to_be_focused()
