"""A Chromium or Chrome of this machine, which plays H.264 as users' browsers do, and pages in it."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.exit("there is no Chromium or Chrome here: apt-get install chromium, then `make browser`", returncode=1)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


Opener = Callable[..., Any]


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Opener]:
    """Opens a page from the disk, and at the end says what the browser had to complain about."""
    complaints: list[str] = []
    contexts: list[Any] = []

    def open_(path: Path, painted: bool = True, **options: Any) -> Any:
        context = chromium.new_context(**({"viewport": {"width": 1280, "height": 800}} | options))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
        page.on(
            "request",
            lambda request: None
            if request.url.startswith(("file:", "data:", "blob:"))
            else complaints.append(f"request: {request.url}"),
        )
        page.goto(path.absolute().as_uri())
        page.complaints = complaints
        if painted:
            page.wait_for_function(
                "document.documentElement.dataset.painted === '0' && !document.querySelector('video').seeking"
            )
        return page

    yield open_
    for context in contexts:
        context.close()
    assert complaints == []
