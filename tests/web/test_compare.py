"""Two results side by side: on one clock, with their difference."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from desk import card, made, opened

FPS, FRAMES = 8, 17
FIELDS = {"fps": FPS, "num_frames": FRAMES, "size": "32x32", "seed": 7}
TIMES = "() => [...document.querySelectorAll('#compare video')].map((v) => v.currentTime)"
# The brightest channel of the difference, and whether anything is drawn.
DRAWN = """() => {
  const canvas = document.querySelector('#compare canvas');
  const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  let most = 0, opaque = true;
  for (let n = 0; n < data.length; n += 4) {
    most = Math.max(most, data[n], data[n + 1], data[n + 2]);
    opaque &&= data[n + 3] === 255;
  }
  return { most, opaque };
}"""


@pytest.fixture(scope="module")
def results(browser: Browser, server) -> list[str]:
    """Prompts of: a video, the same once more, and the same in another mode."""
    prompts = ["pair one", "pair two", "pair three"]
    with opened(browser, server) as watched:
        watched.page.get_by_text("Advanced").click()
        for prompt, model in zip(prompts, ("tiny-t2v", "tiny-t2v", "tiny-t2v:mxfp4"), strict=True):
            made(watched.page, prompt, model, **FIELDS)
    return prompts


def compare(page: Page, *prompts: str) -> Locator:
    for prompt in prompts:
        card(page, prompt).get_by_label("Compare").check()
    page.get_by_role("button", name="Compare").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("button", name="Pause")).to_be_visible()
    return dialog


def test_both_are_in_step(page: Page, results):
    dialog = compare(page, results[0], results[2])
    page.wait_for_function(f"() => ({TIMES})().every((time) => time > 0.3)")
    # While they play the second may be a frame behind for an instant, and is brought back.
    page.wait_for_function(f"() => {{ const [a, b] = ({TIMES})(); return a > 0.5 && Math.abs(a - b) < 1 / {FPS}; }}")
    dialog.get_by_role("button", name="Pause").click()
    page.wait_for_function(f"() => {{ const [a, b] = ({TIMES})(); return Math.abs(a - b) < 0.5 / {FPS}; }}")
    slider = dialog.get_by_label("Frame", exact=True)
    for frame in (0, 12, FRAMES - 1, 3):
        slider.fill(str(frame))
        expect(dialog).to_contain_text(f"Frame {frame + 1} of {FRAMES}")
        page.wait_for_function(f"() => ({TIMES})().every((time) => Math.floor(time * {FPS}) === {frame})")
    dialog.get_by_role("button", name="One frame on").click()
    expect(dialog).to_contain_text(f"Frame 5 of {FRAMES}")
    page.wait_for_function(f"() => ({TIMES})().every((time) => Math.floor(time * {FPS}) === 4)")
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    expect(page.locator("#compare video")).to_have_count(0)  # its "close" comes after it is hidden
    expect(page.locator("#compare-chosen")).to_be_focused()


def test_at_the_end_both_begin_again(page: Page, results):
    compare(page, results[0], results[2])
    page.wait_for_function(f"() => Math.max(...({TIMES})()) > {(FRAMES - 2) / FPS}")
    page.wait_for_function(
        f"() => {{ const [a, b] = ({TIMES})(); return a > 0.1 && a < 1 && Math.abs(a - b) < 1 / {FPS}; }}"
    )


def test_the_difference_is_drawn(page: Page, results):
    dialog = compare(page, results[0], results[2])
    page.wait_for_function(f"() => ({DRAWN})().most > 0")
    psnr = re.search(r"PSNR (\d+\.\d\d) dB", dialog.inner_text())
    assert psnr and 5 < float(psnr[1]) < 60
    dialog.get_by_role("button", name="Close").click()


def test_the_difference_of_equals_is_black(page: Page, server, results):
    """The second is given the file of the first: two runs may differ in a last bit."""
    ids = {job["prompt"]: job["id"] for job in server.client.get("/v1/videos?limit=100").json()["data"]}
    same = server.client.get(f"/v1/videos/{ids[results[0]]}/content").content
    page.route(f"**/{ids[results[1]]}/content", lambda route: route.fulfill(body=same, content_type="video/mp4"))
    page.reload()
    dialog = compare(page, *results[:2])
    expect(dialog).to_contain_text("PSNR ∞ dB, equal")
    assert page.evaluate(DRAWN) == {"most": 0, "opaque": True}


def test_a_third_takes_the_place_of_the_first(page: Page, results):
    for prompt in results:
        card(page, prompt).get_by_label("Compare").check()
    expect(card(page, results[0]).get_by_label("Compare")).not_to_be_checked()
    expect(page.locator("#chosen-text")).to_have_text("Two are chosen.")
    page.get_by_role("button", name="Clear").click()
    assert page.locator("#gallery input:checked").count() == 0
    expect(page.locator("#gallery-title")).to_be_focused()
