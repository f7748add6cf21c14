"""A server of tiny models, and Debian's Chromium at its page."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

import tiny
from desk import PATIENCE, Watched, opened
from serving import KEY, Process


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.fail("these tests need Chromium: `apt-get install chromium`, or name one in $CHROMIUM", pytrace=False)
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        # In a container there is no sandbox, and nothing here is a stranger's.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {task: tiny.save(root / f"tiny-{task}", task) for task in ("t2v", "i2v")}


@pytest.fixture(scope="session")
def server(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    root = tmp_path_factory.mktemp("server")
    (root / "keys").write_text(KEY)
    args = ("--method", "none,mxfp4", "--api-key-file", str(root / "keys"))
    found = Process(root / "data", *models.values(), args=args)
    found.client.headers["authorization"] = f"Bearer {KEY}"
    yield found.ready()
    found.kill()


@pytest.fixture
def watched(browser: Browser, server: Process) -> Iterator[Watched]:
    with opened(browser, server) as found:
        yield found


@pytest.fixture
def page(watched: Watched) -> Page:
    return watched.page
