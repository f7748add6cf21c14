"""A key is asked for and used, and the API is documented without one."""

from __future__ import annotations

import json
from pathlib import Path

from playwright.sync_api import Browser, expect

from desk import card, made, opened
from serving import KEY, Process, ended


def enter(page, key: str = KEY) -> None:
    page.locator("#key-value").fill(key)
    page.get_by_role("button", name="Use this key").click()


def test_a_key_is_asked_for_and_used(browser: Browser, server: Process):
    with opened(browser, server, key=False) as watched:
        page = watched.page
        expect(page.locator("#key-value")).to_be_focused()
        expect(page.locator("#content")).to_be_hidden()
        enter(page, "a-key-that-is-wrong")
        expect(page.locator("#key-error")).to_have_text("a valid API key is needed")
        watched.forgive("status of 401")
        enter(page)
        expect(page.locator("#key")).to_be_hidden()
        result = made(page, "with a key")
        video = result.locator("video").element_handle()
        page.wait_for_function("v => v.readyState >= 2 && v.videoWidth === 16", arg=video)
        with page.expect_download() as download:
            result.get_by_role("button", name="Download").click()
        assert Path(download.value.path()).read_bytes()[4:8] == b"ftyp"
        page.reload()  # the tab knows it still
        expect(card(page, "with a key")).to_have_count(1)
        expect(page.locator("#key")).to_be_hidden()
        with opened(browser, server, key=False) as other:  # and no other does
            expect(other.page.locator("#key")).to_be_visible()
            expect(card(other.page, "with a key")).to_have_count(0)
            other.forgive("status of 401")


def test_the_api_is_documented_and_can_be_tried(browser: Browser, server: Process):
    """Swagger UI runs under the page's own policy, needs no key, and takes one."""
    with opened(browser, server, "/docs", key=False) as watched:
        page = watched.page
        described = server.client.get("/openapi.json", headers={"authorization": ""}).json()
        operations = sum(len(methods) for methods in described["paths"].values())
        expect(page.locator(".opblock")).to_have_count(operations)
        expect(page.locator(".errors-wrapper")).to_have_count(0)
        models = page.locator(".opblock").filter(has_text="/v1/models")
        models.locator(".opblock-summary-control").click()
        models.get_by_role("button", name="Try it out").click()
        models.get_by_role("button", name="Execute").click()
        expect(models.locator(".live-responses-table tbody .response-col_status")).to_contain_text("401")
        watched.forgive("status of 401")
        page.get_by_role("button", name="Authorize").click()
        page.get_by_label("auth-bearer-value").fill(KEY)
        page.get_by_role("button", name="Apply credentials").click()
        page.get_by_role("button", name="Close").click()
        models.get_by_role("button", name="Execute").click()
        expect(models.locator(".live-responses-table tbody .response-col_status")).to_contain_text("200")
        create = page.locator(".opblock-post").filter(has_text="/v1/videos").first
        create.locator(".opblock-summary-control").click()
        create.get_by_role("button", name="Try it out").click()
        create.locator("textarea").fill(json.dumps({"prompt": "as JSON", "size": "16x16", "num_frames": 5}))
        create.get_by_role("button", name="Execute").click()
        expect(create.locator(".live-responses-table tbody .response-col_status")).to_contain_text("200")
        create.get_by_label("Request content type").select_option("multipart/form-data")
        for name, value in {"prompt": "as a form", "size": "16x16", "num_frames": "5"}.items():
            create.locator(f"tr[data-property-name={name}] input[type=text]").fill(value)
        expect(create.locator("tr[data-property-name=input_reference] input[type=file]")).to_have_count(1)
        with page.expect_response("**/v1/videos") as answer:
            create.get_by_role("button", name="Execute").click()
        assert answer.value.status == 200, answer.value.text()
        expect(page.locator(".errors-wrapper")).to_have_count(0)
    jobs = server.client.get("/v1/videos?limit=2").json()["data"]
    assert [job["prompt"] for job in jobs] == ["as a form", "as JSON"]
    for job in jobs:
        server.client.post(f"/v1/videos/{job['id']}/cancel")
        ended(server.client, job["id"])


def test_the_page_brings_its_key_to_the_documentation(browser: Browser, server: Process):
    with opened(browser, server, key=False) as watched:
        page = watched.page
        enter(page)
        watched.forgive("status of 401")
        page.get_by_role("link", name="API").click()
        models = page.locator(".opblock").filter(has_text="/v1/models")
        models.locator(".opblock-summary-control").click()
        models.get_by_role("button", name="Try it out").click()
        models.get_by_role("button", name="Execute").click()
        expect(models.locator(".live-responses-table tbody .response-col_status")).to_contain_text("200")
