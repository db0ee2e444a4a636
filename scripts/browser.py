"""The server's page in headless Chromium, as people use it: ``python -m scripts.browser URL [--shots FOLDER]``.

Keys alone ask a question; the answer streams in, with what it cost. A PDF is attached and asked about, the picture of
what was kept appears, Stop stops, a new chat is empty. Dark mode changes the colours, a phone's width needs no sideways
scrolling, and nothing is written to the browser's console. Ends with status 1 at the first thing that is not so.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, expect, sync_playwright

QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
PHONE = {"width": 380, "height": 740}
SLOW_MS = 240_000  # an answer to a long prompt, on a busy machine


def chromium() -> str | None:
    """Where a Chromium or Chrome is."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def ask(page: Page, text: str) -> None:
    """Type ``text`` and press Enter; wait until the answer is whole."""
    before = page.locator(".facts").count()
    page.locator("#text").focus()
    page.keyboard.type(text)
    page.keyboard.press("Enter")
    expect(page.locator(".facts")).to_have_count(before + 1, timeout=SLOW_MS)


def orchard(browser: Any, path: Path) -> None:
    """A PDF of some 5,300 tokens, printed by the browser itself: shorter prompts are not cut."""
    rows = "".join(
        f"<p>Row {row} of the orchard was planted in {1900 + row % 100} and has {20 + row * 7 % 60} trees.</p>"
        for row in range(220)
    )
    page = browser.new_page()
    # A heading of its own: what the library keeps of a document that was read before is not cut again.
    page.set_content(f"<h1>Orchard report of {time.ctime()}</h1>{rows}")
    page.pdf(path=path)
    page.close()


def check(url: str, shots: Path) -> None:
    """Every step, or an AssertionError."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(QUIET))
        context = browser.new_context(color_scheme="light", viewport={"width": 1100, "height": 800})
        page, said = context.new_page(), []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(url)
        expect(page.locator("#model")).to_contain_text("memory", timeout=SLOW_MS)
        assert page.evaluate("document.activeElement.id") == "text", "a visitor can type at once"

        ask(page, "Name three colours.")
        assert page.locator(".assistant").last.inner_text().strip()
        assert "first token" in page.locator(".facts summary").last.inner_text()

        with tempfile.TemporaryDirectory() as folder:
            pdf = Path(folder) / "orchard.pdf"
            orchard(browser, pdf)
            page.locator("#file").set_input_files(pdf)
            expect(page.locator("#attached")).to_contain_text("attached: orchard.pdf", timeout=SLOW_MS)
            ask(page, "How many trees has row 77 of the orchard?")
            broken = Path(folder) / "broken.pdf"
            broken.write_bytes(b"%PDF-1.7\nnothing")
            page.locator("#file").set_input_files(broken)
            expect(page.locator("#attached")).to_contain_text("broken.pdf:", timeout=SLOW_MS)
        facts = page.locator(".facts").last
        facts.locator("summary").focus()
        page.keyboard.press("Enter")
        expect(facts.locator("[role=img]")).to_be_visible()
        assert facts.locator("[role=img] i").count() > 20, "a cell for each block"
        page.screenshot(path=shots / "light.png")

        light = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.emulate_media(color_scheme="dark")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light, "dark mode has other colours"
        page.set_viewport_size(PHONE)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "a phone scrolls down only"
        page.screenshot(path=shots / "phone.png")

        page.locator("#text").fill("Count from one to three hundred, in words.")
        page.keyboard.press("Enter")
        expect(page.locator("#send")).to_have_text("Stop")
        time.sleep(1)
        page.keyboard.press("Escape")
        expect(page.locator("#send")).to_have_text("Send", timeout=10_000)
        page.locator("#new").click()
        assert page.locator(".turn").count() == 0
        refused = [line for line in said if "400" in line]  # the browser tells of the broken file's refusal
        assert len(said) == len(refused) == 1, said
        browser.close()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--shots", type=Path, help="where pictures of the page go")
    options = parser.parse_args()
    if chromium() is None:
        sys.exit("no chromium in the path: install Chromium or Chrome")
    with tempfile.TemporaryDirectory() as folder:
        shots = options.shots or Path(folder)
        shots.mkdir(parents=True, exist_ok=True)
        check(options.url, shots)
    print("the page works")


if __name__ == "__main__":
    main()
