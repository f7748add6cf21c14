"""The page of a server in front of an engine that says little: no defaults, no task, no steps."""

from __future__ import annotations

import io

from PIL import Image
from playwright.sync_api import Browser, expect

from desk import card, opened, row
from engines import FakeEngine
from serving import Process, ended


def test_an_engine_that_says_little(browser: Browser, tmp_path):
    frame = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(frame, "PNG")
    engine = FakeEngine(takes=600.0).start()
    server = Process(tmp_path / "data", args=("--engine", engine.address)).ready()
    try:
        with opened(browser, server, key=False) as watched:
            page = watched.page
            expect(page.locator("#model")).to_contain_text("wan")
            expect(page.locator("#linears")).to_contain_text("does not say")
            for name in ("prompt", "size", "num_frames", "guidance_scale_2", "input_reference"):
                expect(page.locator(f"#{name}")).to_be_enabled()
                assert not page.locator(f"#{name}").get_attribute("placeholder")
            page.get_by_role("button", name="Generate").click()  # the browser asks for the prompt, which has no default
            expect(page.locator("#prompt")).to_be_focused()
            assert page.locator("#queue > li").count() == 0
            page.locator("#prompt").fill("it is far away")
            given = {"name": "a.png", "mimeType": "image/png", "buffer": frame.getvalue()}
            page.locator("#input_reference").set_input_files(given)
            page.get_by_role("button", name="Generate").click()
            running = row(page, "it is far away")
            expect(running).to_contain_text("runs")
            bar = running.get_by_role("progressbar")
            assert bar.evaluate("bar => [bar.position, bar.max]") == [-1, 100]  # nobody knows how far it is
            assert engine.forms[0]["input_reference"] == frame.getvalue()
            page.locator("#prompt").fill("it is to end")
            page.get_by_role("button", name="Generate").click()
            expect(row(page, "it is to end")).to_contain_text("next")
            engine.takes = 0.1
            running.get_by_role("button", name="Cancel").click()
            expect(card(page, "it is far away")).to_contain_text("Cancelled")
            done = card(page, "it is to end")
            expect(done).to_contain_text("16x16")  # what the file is
            video = done.locator("video").element_handle()
            page.wait_for_function("v => v.readyState >= 2", arg=video)
            (job,) = [job for job in server.client.get("/v1/videos").json()["data"] if job["prompt"] == "it is to end"]
            assert ended(server.client, job["id"])["parameters"]["num_frames"] == 5
    finally:
        server.kill()
        engine.kill()
