"""A server that is started again under a page that stays. The last one: it ends the server of the others."""

from __future__ import annotations

import shutil
from pathlib import Path

from playwright.sync_api import Browser, expect

from desk import ask, card, made, opened, row
from serving import Process


def test_the_page_finds_a_server_that_was_started_again(browser: Browser, server: Process, models, request, tmp_path):
    """With another model, and without keys."""
    other = shutil.copytree(models["t2v"], tmp_path / "other")
    data, port = Path(server.process.args[server.process.args.index("--data") + 1]), server.client.base_url.port
    with opened(browser, server) as watched:
        page = watched.page
        done = made(page, "before it")
        expect(done.get_by_label("Mode to make it again with").locator("option")).to_have_text(["MXFP4"])
        ask(page, "goes on", num_inference_steps=300)
        expect(row(page, "goes on")).to_contain_text("step")
        page.locator("#prompt").fill("half a thought")
        server.kill()
        expect(page.locator("#trouble")).to_have_text("The server does not answer. Trying again.")
        again = Process(data, models["t2v"], other, args=("--method", "none,mxfp4,mxfp8"), port=port).ready()
        request.addfinalizer(again.kill)  # after the page is gone
        expect(page.locator("#trouble")).to_be_hidden()
        expect(page.locator("#model option")).to_have_count(6)
        expect(page.locator("#model")).to_have_value("tiny-t2v")  # it stays chosen
        expect(page.locator("#prompt")).to_have_value("half a thought")
        expect(done.get_by_label("Mode to make it again with").locator("option")).to_have_text(["MXFP4", "MXFP8"])
        expect(card(page, "goes on").get_by_role("button", name="Download")).to_be_visible()
        # A model shows its linears once it is loaded, and a form that is being filled stays as it is.
        page.locator("#model").select_option("other:mxfp4")
        expect(page.locator("#linears")).to_have_text("Loaded with its first job.")
        ask(page, "after it", "other:mxfp4")
        page.locator("#size").fill("17x16")
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#size-error")).to_be_visible()
        watched.forgive("status of 400")
        linears = "Linears of each transformer: 6 unquantized, 20 mxfp4 w4a4."
        expect(page.locator("#linears")).to_have_text(linears)
        expect(card(page, "after it").get_by_role("button", name="Download")).to_be_visible()
        expect(page.locator("#size")).to_have_value("17x16")
        expect(page.locator("#size-error")).to_be_visible()
        expect(page.locator("#model")).to_have_value("other:mxfp4")
        watched.forgive("ERR_CONNECTION_REFUSED")
        for text in ("ERR_INCOMPLETE_CHUNKED_ENCODING", "ERR_CONNECTION_RESET"):  # of what was under way
            watched.wrong[:] = [one for one in watched.wrong if text not in one]
