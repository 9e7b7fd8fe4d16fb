"""A Chromium or Chrome of this machine, which plays H.264 as users' browsers do, and pages in it."""

import shutil
import time
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


def until(page: Any, condition: str, seconds: float = 10) -> None:
    """Wait; Playwright's own way is JavaScript made of text, which the page's policy does not let run."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(20)


def _is_complaint(said: Any) -> bool:
    # A page draws and never reads; only the tests do.
    return said.type in ("error", "warning") and "willReadFrequently" not in said.text


Opener = Callable[..., Any]


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Opener]:
    """Opens a page from the disk, and at the end says what the browser had to complain about."""
    complaints: list[str] = []
    contexts: list[Any] = []

    def open_(path: Path, painted: bool = True, script: str = "", **options: Any) -> Any:
        context = chromium.new_context(**({"viewport": {"width": 1280, "height": 800}} | options))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if _is_complaint(said) else None)
        page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
        page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith(("file:", "data:", "blob:"))
                else complaints.append(f"request: {request.url}")
            ),
        )
        page.add_init_script(script)
        page.goto(path.absolute().as_uri())
        page.complaints = complaints
        if painted:
            until(page, "document.documentElement.dataset.painted === '0' && !document.querySelector('video').seeking")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert complaints == []
