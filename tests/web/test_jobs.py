"""Jobs at the page: asked for, watched, cancelled, made again, removed; with a mouse and without one."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

from desk import LONG, ask, card, made, row
from serving import ended

WRONG = {"size": ("17x16", "multiple")}
HTML = '<img src=x onerror=alert(1)><b>bold</b><script>alert(2)</script> & "quotes"'


def test_a_job_moves_and_its_video_plays(page: Page):
    ask(page, "it moves", num_inference_steps=300)
    running = row(page, "it moves")
    expect(running).to_contain_text(re.compile(r"step \d+ of 300"))
    bar = running.get_by_role("progressbar").element_handle()
    page.wait_for_function("bar => bar.value > 0", arg=bar)
    first = bar.evaluate("bar => bar.value")
    page.wait_for_function("([bar, first]) => bar.value > first", arg=[bar, first])
    assert bar.evaluate("bar => bar.max") == 300
    done = card(page, "it moves")
    expect(done).to_have_count(1)
    expect(row(page, "it moves")).to_have_count(0)
    video = done.locator("video").element_handle()
    page.wait_for_function("v => v.readyState >= 2 && v.getVideoPlaybackQuality().totalVideoFrames > 2", arg=video)
    assert video.evaluate("v => [v.videoWidth, v.videoHeight, v.error]") == [16, 16, None]
    assert video.evaluate("v => v.duration") == pytest.approx(5 / 16, abs=0.02)
    expect(page.locator("#news")).to_contain_text("is ready")


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_stands_at_its_field(watched, name: str):
    page, (value, said) = watched.page, WRONG[name]
    ask(page, "it is wrong", **{name: value})
    error = page.locator(f"#{name}-error")
    expect(error).to_contain_text(said)
    expect(page.locator(f"#{name}")).to_be_focused()
    expect(page.locator(f"#{name}")).to_have_attribute("aria-invalid", "true")
    assert page.locator(".error:visible").count() == 1
    watched.forgive("status of 400")
    page.locator(f"#{name}").press("Backspace")
    expect(error).to_be_hidden()
    assert row(page, "it is wrong").count() == card(page, "it is wrong").count() == 0


def test_advanced_fields_are_there_where_the_model_has_them(watched, server):
    page = watched.page
    fps = page.locator("#fps")
    expect(fps).to_be_hidden()
    page.get_by_text("Advanced").click()
    own = server.client.get("/v1/models").json()["data"][0]["defaults"]
    for name in ("fps", "flow_shift", "boundary_ratio"):
        expect(page.locator(f"#{name}")).to_have_attribute("placeholder", f"{own[name]:g}")
    result = made(page, "with fields", fps=4, flow_shift=2.5, boundary_ratio=0.5)
    result.get_by_text("Parameters").click()
    assert re.search(r"Frames a second\s*4\s", result.inner_text())
    for name, value in (("Flow shift", "2.5"), ("Boundary", "0.5")):
        expect(result.locator(f"dt:text-is('{name}') + dd")).to_have_text(value)
    # What is wrong there is shown, though the part was closed: by the browser, and by the server.
    page.locator("#flow_shift").fill("0")
    page.get_by_text("Advanced").click()
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#flow_shift-error")).to_contain_text("greater than 0")
    watched.forgive("status of 400")
    page.locator("#fps").fill("0.5")
    page.get_by_text("Advanced").click()
    page.get_by_role("button", name="Generate").click()
    expect(fps).to_be_focused()


def test_fields_that_a_model_does_not_have_are_not_there(page: Page):
    """No model of ours is without them; the server's answer is changed on its way."""

    def without(route):
        answer = route.fetch()
        body = answer.json()
        body["data"][0]["takes"] = ["size"]
        body["data"][0]["defaults"]["flow_shift"] = None
        route.fulfill(response=answer, json=body)

    page.route("**/v1/models", without)
    page.reload()
    expect(page.locator("#model option")).to_have_count(4)
    expect(page.locator("#size")).to_be_visible()
    for name in ("num_frames", "negative_prompt", "guidance_scale", "guidance_scale_2"):
        expect(page.locator(f"#{name}")).to_be_hidden()
    expect(page.get_by_text("Advanced")).to_be_hidden()
    page.locator("#model").select_option("tiny-t2v:mxfp4")
    expect(page.get_by_text("Advanced")).to_be_visible()


def test_a_running_job_is_cancelled(page: Page, server):
    ask(page, "for nothing", **LONG)
    expect(row(page, "for nothing")).to_contain_text(re.compile(r"step \d+ of"))
    row(page, "for nothing").get_by_role("button", name="Cancel").click()
    expect(card(page, "for nothing")).to_contain_text("Cancelled")
    expect(row(page, "for nothing")).to_have_count(0)
    (job,) = (one for one in server.client.get("/v1/videos").json()["data"] if one["prompt"] == "for nothing")
    assert job["error"]["code"] == "cancelled" and 0 < job["step"] < job["steps"]


def test_again_with_another_mode(page: Page, server):
    result = made(page, "once more", seed=2**53 + 1)  # more digits than a double has
    assert result.get_by_label("Mode to make it again with").locator("option").all_inner_texts() == ["MXFP4"]
    result.get_by_role("button", name="Again").click()
    expect(card(page, "once more", "MXFP4")).to_have_count(1)
    first, second = (one for one in server.client.get("/v1/videos").json()["data"] if one["prompt"] == "once more")
    assert (first["model"], second["model"]) == ("tiny-t2v:mxfp4", "tiny-t2v")
    assert first["parameters"] == second["parameters"] and first["parameters"]["seed"] == 2**53 + 1


def test_a_result_is_removed_when_that_is_meant(page: Page, server):
    result = made(page, "to be removed")
    result.get_by_text("Parameters").click()
    id = result.locator("dt:text-is('Id') + dd").inner_text()
    result.get_by_role("button", name="Remove").click()
    expect(page.get_by_role("dialog")).to_contain_text("to be removed")
    page.get_by_role("button", name="Keep").click()
    assert server.client.get(f"/v1/videos/{id}").status_code == 200
    result.get_by_role("button", name="Remove").click()
    page.get_by_role("dialog").get_by_role("button", name="Remove").click()
    expect(card(page, "to be removed")).to_have_count(0)
    assert server.client.get(f"/v1/videos/{id}").status_code == 404
    page.reload()
    expect(page.locator("#model option")).to_have_count(4)
    expect(card(page, "to be removed")).to_have_count(0)


def test_html_in_a_prompt_is_text(page: Page):
    ran: list[str] = []
    page.on("dialog", lambda dialog: (ran.append(dialog.message), dialog.dismiss()))
    kinds = "() => ['img[src=x]', 'b', 'body script'].map((kind) => document.querySelectorAll(kind).length)"
    before = page.evaluate(kinds)
    ask(page, HTML, num_inference_steps=50)
    expect(row(page, "bold").locator(".prompt")).to_have_text(HTML)
    result = card(page, "bold")
    expect(result.locator(".prompt")).to_have_text(HTML)
    result.get_by_role("button", name="Remove").click()
    expect(page.locator("#confirm-text")).to_contain_text("<b>bold</b>")
    assert page.evaluate(kinds) == before and ran == []
    assert HTML in [video.get_attribute("aria-label") for video in result.locator("video").all()]


def test_by_keyboard_alone(page: Page, server):
    """Tab, text, arrows and Enter; where the focus is can be seen, and it is never lost."""

    def reach(wanted: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            where = page.evaluate(
                "() => { const e = document.activeElement, style = getComputedStyle(e);"
                " return { at: e.id || e.textContent, seen: e.matches(':focus-visible') && style.outlineStyle === 'solid'"
                " && parseFloat(style.outlineWidth) >= 2, body: e === document.body }; }"
            )
            assert where["seen"] or where["body"], where
            if where["at"] == wanted:
                return
        raise AssertionError(f"Tab does not come to {wanted}")

    expect(page.locator("#model option")).to_have_count(4)
    reach("model")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#model")).to_have_value("tiny-t2v:mxfp4")
    reach("prompt")
    page.keyboard.type("by keyboard")
    for name, value in LONG.items():
        reach(name)
        page.keyboard.type(str(value))
    reach("submit")
    page.keyboard.press("Enter")
    expect(row(page, "by keyboard")).to_contain_text("step")
    expect(page.locator("#submit")).to_be_focused()
    reach("Cancel")
    page.keyboard.press("Enter")
    expect(card(page, "by keyboard")).to_contain_text("Cancelled")
    expect(page.locator("#queue-title")).to_be_focused()  # its row is gone
    (job,) = (one for one in server.client.get("/v1/videos").json()["data"] if one["prompt"] == "by keyboard")
    assert ended(server.client, job["id"])["model"] == "tiny-t2v:mxfp4"
