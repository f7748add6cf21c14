"""On a phone, and in the dark: everything can be reached and read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, expect

from desk import LONG, ask, card, made, opened, row

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "device_scale_factor": 3}
WORD = "a" * 300  # without a place to break
CONTRAST = 4.5  # WCAG 2.2, 1.4.3
# Texts whose contrast with what is behind them is too low, of those that are shown and not disabled; and how many there are.
READ = """(least) => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = ([r, g, b, a], under) => [r, g, b].map((c, n) => c * a + under[n] * (1 - a));
  const light = (color) => {
    const [r, g, b] = color.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const behind = (e) => {
    if (!e) return dark ? [18, 18, 18] : [255, 255, 255];
    const own = rgba(getComputedStyle(e).backgroundColor);
    return own[3] === 1 ? own.slice(0, 3) : over(own, behind(e.parentElement));
  };
  const low = [];
  let count = 0;
  const check = (e, color, text) => {
    const back = behind(e), [a, b] = [light(over(rgba(color), back)), light(back)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    count++;
    if (ratio < least) low.push(`${text.trim().slice(0, 40)}: ${ratio.toFixed(2)}`);
  };
  for (const e of document.body.querySelectorAll("*")) {
    if (!e.checkVisibility({ visibilityProperty: true }) || e.closest(":disabled, [aria-disabled], video, .unseen")) continue;
    const text = [...e.childNodes].filter((n) => n.nodeType === Node.TEXT_NODE).map((n) => n.data).join("");
    if (text.trim()) check(e, getComputedStyle(e).color, text);
    if (e.placeholder) check(e, getComputedStyle(e, "::placeholder").color, `placeholder ${e.placeholder}`);
    if (e.value && e.matches("input:not([type=range], [type=checkbox]), textarea")) check(e, getComputedStyle(e).color, e.value);
  }
  return { low, count };
}"""


@pytest.fixture(scope="module", autouse=True)
def results(browser: Browser, server) -> None:
    """Something of every kind: two results, a failed one, one that runs and one that waits."""
    with opened(browser, server) as watched:
        page = watched.page
        made(page, "look one")
        made(page, f"look two {WORD}", "tiny-t2v:mxfp4")


@contextmanager
def busy(page: Page) -> Iterator[None]:
    """One job is cancelled, one runs and one waits."""
    for prompt in ("look cancelled", "look running", f"look waiting {WORD}"):
        ask(page, prompt, **LONG)
        if prompt == "look cancelled":
            row(page, prompt).get_by_role("button", name="Cancel").click()
            expect(card(page, prompt).first).to_contain_text("Cancelled")
    expect(row(page, "look running")).to_contain_text("step")
    yield
    for prompt in ("look waiting", "look running"):
        row(page, prompt).get_by_role("button", name="Cancel").click()
        expect(row(page, prompt)).to_have_count(0)


def nothing_stands_over(page: Page) -> None:
    """Nothing has to be scrolled sideways: neither the page nor anything in it that holds text."""
    wide = """() => [document.documentElement, ...document.querySelectorAll("main, form, section, li, dialog, .chosen, figure")]
      .filter((e) => e.scrollWidth > e.clientWidth && e.clientWidth > 0 && getComputedStyle(e).overflowX !== "hidden")
      .map((e) => e.outerHTML.slice(0, 80))"""
    assert page.evaluate(wide) == []
    assert page.evaluate("() => document.documentElement.scrollWidth <= 390 && visualViewport.width <= 390")


def everything_can_be_pressed(scope) -> int:
    """Each can be scrolled to, and then nothing lies over it."""
    controls = scope.locator("button, input, select, textarea, summary, a").filter(visible=True)
    for control in controls.all():
        if control.is_enabled() and not control.get_attribute("aria-disabled"):
            control.click(trial=True, timeout=10_000)
    return controls.count()


def test_on_a_phone(browser: Browser, server):
    with opened(browser, server, **PHONE) as watched:
        page = watched.page
        page.get_by_text("Advanced").click()
        page.locator("#model").select_option("tiny-i2v")
        page.locator("#input_reference").set_input_files(
            {"name": f"{WORD}.png", "mimeType": "image/png", "buffer": page.screenshot()}
        )
        nothing_stands_over(page)
        assert everything_can_be_pressed(page.locator("#request")) >= 16
        with busy(page):
            ask(page, "too large", size="17x16")
            expect(page.locator("#size-error")).to_be_visible()
            watched.forgive("status of 400")
            for details in page.locator("#gallery details").all():
                details.locator("summary").click()
            for prompt in ("look one", "look two"):
                card(page, prompt).get_by_label("Compare").check()
            nothing_stands_over(page)
            assert everything_can_be_pressed(page.locator("header, form, .queue, .chosen")) >= 20
            for prompt in ("look one", "look two", "look cancelled"):
                assert everything_can_be_pressed(card(page, prompt).first) >= 4
            page.get_by_role("button", name="Compare").click()
            dialog = page.get_by_role("dialog")
            expect(dialog).to_contain_text("PSNR")
            nothing_stands_over(page)
            assert everything_can_be_pressed(dialog) == 5
            page.keyboard.press("Escape")
            card(page, "look two").get_by_role("button", name="Remove").click()
            nothing_stands_over(page)
            assert everything_can_be_pressed(page.get_by_role("dialog")) == 2
            page.get_by_role("button", name="Keep").click()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_read(browser: Browser, server, scheme):
    with opened(browser, server, color_scheme=scheme) as watched:
        page = watched.page

        def read(least: int) -> None:
            found = page.evaluate(READ, CONTRAST)
            assert found["low"] == [] and found["count"] >= least, found

        with busy(page):
            ask(page, "too large", size="17x16")
            expect(page.locator("#size-error")).to_be_visible()
            watched.forgive("status of 400")
            page.get_by_text("Advanced").click()
            for details in page.locator("#gallery details").all():
                details.locator("summary").click()
            for prompt in ("look one", "look two"):
                card(page, prompt).get_by_label("Compare").check()
            page.evaluate(
                "() => { const e = document.getElementById('trouble'); e.hidden = false; e.textContent = 'Trouble.'; }"
            )
            read(100)
            back = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
            assert (min(map(int, back[4:-1].split(","))) > 200) == (scheme == "light")
            page.get_by_role("button", name="Compare").click()
            expect(page.get_by_role("dialog")).to_contain_text("PSNR")
            read(100)
            page.keyboard.press("Escape")
