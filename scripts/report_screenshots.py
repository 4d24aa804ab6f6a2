"""The pictures of docs/report.md: the page of the embedded model in Chromium, light and dark.

    python scripts/report_screenshots.py [--work FOLDER]

Quantizes the embedded model, writes its page and takes pictures of parts of it into docs/images.
Needs the dev extra and the system's Chromium; a minute on two cores.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

import mxq
from mxq.report.write import write_report

IMAGES = Path(__file__).parents[1] / "docs" / "images"
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
LARGEST_BYTES = 300_000
PICTURES = {"top": "header", "bits": "#bits", "experts": "#experts"}
"""What is at the upper edge of each picture."""


def main() -> None:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="keep the checkpoint and its page here")
    folder = parser.parse_args().work
    with tempfile.TemporaryDirectory() as temporary:
        out = (folder or Path(temporary)) / "demo-3bit"
        mxq.quantize("demo", bits=3, output=out, device="h200", tokens=64)
        take_pictures(write_report(out))


def take_pictures(file: Path) -> None:
    """Pictures of a page in both themes, as wide as a laptop.

    Raises:
        ValueError: If there is no Chromium, or a picture is too large for the repository.
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise ValueError("no chromium on PATH; install the package chromium")
    IMAGES.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        for scheme in ("light", "dark"):
            page = browser.new_page(
                viewport={"width": 1280, "height": 860}, color_scheme=scheme, offline=True
            )
            page.goto(file.resolve().as_uri())
            page.wait_for_selector("html[data-drawn]")
            page.add_style_tag(content="html { scroll-behavior: auto !important; }")
            for name, selector in PICTURES.items():
                take(page, selector, IMAGES / f"report-{name}-{scheme}.png")
        browser.close()


def take(page: Page, selector: str, path: Path) -> None:
    """A picture with that part of the page at its upper edge, in the bits with a cell pointed at.

    Raises:
        ValueError: If it is too large.
    """
    page.mouse.move(0, 0)
    page.evaluate(
        "(where) => scrollTo(0, document.querySelector(where).getBoundingClientRect().top"
        " + scrollY - 70)",
        selector,
    )
    if selector == "#bits":
        cells = page.locator("#experts-bits .hm image").last.bounding_box()
        assert cells is not None
        page.mouse.move(cells["x"] + cells["width"] * 0.44, cells["y"] + cells["height"] * 0.17)
        page.wait_for_selector("#experts-bits .hovertext")
    page.screenshot(path=path)
    if path.stat().st_size > LARGEST_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, expected {LARGEST_BYTES}")


if __name__ == "__main__":
    main()
