"""The page in a browser, and what users do at it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from playwright.sync_api import Browser, Locator, Page, expect

from serving import KEY, Process

FIELDS = {"size": "16x16", "num_frames": 5, "num_inference_steps": 4}  # the tiny models have no room for their defaults
LONG = {
    "size": "256x256",
    "num_frames": 17,
    "num_inference_steps": 1000,
}  # does not end before a test is through with it
PATIENCE = 60_000  # milliseconds that a machine under load may take for what a page waits for
TOLD = "addEventListener('securitypolicyviolation', (e) => console.error(`policy: ${e.violatedDirective} ${e.blockedURI}`))"
GIVEN = f"if (location.protocol === 'http:') sessionStorage.setItem('mxdit-key', '{KEY}')"


@dataclass
class Watched:
    """A page, and what went wrong on it: errors in its console, breaches of its policy, requests to other hosts."""

    page: Page
    wrong: list[str] = field(default_factory=list)

    def forgive(self, text: str) -> None:
        """Take back what a test provokes. It has to be there."""
        kept = [one for one in self.wrong if text not in one]
        assert len(kept) < len(self.wrong), f"{text!r} is not among {self.wrong}"
        self.wrong[:] = kept


@contextmanager
def opened(
    browser: Browser, server: Process, path: str = "/", *, key: bool = True, **options: Any
) -> Iterator[Watched]:
    """A page of a server in a browser that has seen nothing yet, but for the `key`; watched to its end."""
    context = browser.new_context(base_url=str(server.client.base_url), **options)
    context.set_default_timeout(PATIENCE)
    context.add_init_script(TOLD)
    if key:
        context.add_init_script(GIVEN)
    watched = Watched(context.new_page())
    page, wrong, own = watched.page, watched.wrong, str(server.client.base_url)
    page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda it: None if it.url.startswith((own, "blob:", "data:")) else wrong.append(it.url))
    try:
        page.goto(path)
        yield watched
        page.evaluate("0")  # what was said before is here now
    finally:
        context.close()
    assert watched.wrong == []


def ask(page: Page, prompt: str, model: str = "tiny-t2v", **fields: Any) -> None:
    """Fill the form, and send it."""
    page.locator("#model").select_option(model)
    page.locator("#prompt").fill(prompt)
    for name, value in (FIELDS | fields).items():
        page.locator(f"#{name}").fill(str(value))
    page.get_by_role("button", name="Generate").click()


def row(page: Page, prompt: str) -> Locator:
    """A job in the queue."""
    return page.locator("#queue > li").filter(has_text=prompt)


def card(page: Page, prompt: str, mode: str = "") -> Locator:
    """A result."""
    return page.locator("#gallery > li").filter(has_text=prompt).filter(has=page.locator(".hint", has_text=mode))


def made(page: Page, prompt: str, model: str = "tiny-t2v", **fields: Any) -> Locator:
    """The result of a request that is made now."""
    before = card(page, prompt).count()
    ask(page, prompt, model, **fields)
    expect(card(page, prompt).filter(has=page.get_by_role("button", name="Download"))).to_have_count(before + 1)
    return card(page, prompt).first
