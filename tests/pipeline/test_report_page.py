"""The page of ``mxq report`` in headless Chromium: it draws, it answers, it prints, it is alone.

Without Chromium these tests are skipped; ``.ci/run`` installs it.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from reports import make_facts

from mxq.report import palette
from mxq.report.curve import loss_curve
from mxq.report.page import render_page
from mxq.report.times import step_times

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs the package chromium")


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@dataclass(frozen=True)
class Shown:
    """A drawn page, with what it said on the console and which addresses it asked for."""

    page: object
    said: list
    asked: list

    @property
    def points(self):
        """Numbers that each trace of each plot shows."""
        return self.page.evaluate(POINTS)

    @property
    def brightness(self):
        """Of the ground, 0 to 765."""
        rgb = self.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in rgb.removeprefix("rgb(").rstrip(")").split(","))

    @property
    def star(self):
        """The colour of the mark of this plan."""
        return self.page.evaluate(
            "document.getElementById('curve-plot')._fullData.at(-1).marker.color"
        )


@pytest.fixture(scope="module")
def show(browser, tmp_path_factory):
    """``show(scheme, **options)``: the page on facts of that kind, drawn once for all tests."""
    folder, shown = tmp_path_factory.mktemp("pages"), {}

    def draw(scheme="light", *, width=1280, **options):
        key = f"{scheme} {width} {sorted(options.items())}"
        if key not in shown:
            path = folder / f"{len(shown)}.html"
            facts = make_facts(**options)
            path.write_text(render_page(facts, loss_curve(facts, seconds=1), step_times(facts)))
            shown[key] = open_page(path, scheme, width)
        return shown[key]

    def open_page(path, scheme, width):
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True
        )
        found = Shown(context.new_page(), [], [])
        found.page.on("console", lambda message: found.said.append(message.text))
        found.page.on("pageerror", lambda error: found.said.append(str(error)))
        found.page.on("request", lambda request: found.asked.append(request.url))
        found.page.goto(path.as_uri())
        found.page.wait_for_selector("html[data-drawn]", timeout=60_000)
        return found

    return draw


FULL = {"device": "h200", "measured": True}
PLOTS = {
    "experts-bits", "linears-bits", "curve-plot", "layers-plot", "agreement-plot", "experts-plot",
    "time-plot", "choices-plot",
}  # fmt: skip

POINTS = """() => Object.fromEntries([...document.querySelectorAll('.plot')].map(
    (plot) => [plot.id, plot._fullData.map((trace) => (trace.z || [trace.y]).flat()
        .filter((value) => value !== null && Number.isFinite(value)).length)]))"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_plot_is_drawn_with_data(show, scheme):
    shown = show(scheme, **FULL)
    points = shown.points
    assert points.keys() == PLOTS
    assert all(count > 0 for counts in points.values() for count in counts), points
    assert points["experts-bits"] == [3 * 4] * 3
    assert points["choices-plot"] == [3, 3]  # of the plan that was written and the uniform one
    heights = "[...document.querySelectorAll('.plot .main-svg')].map((svg) => svg.clientHeight)"
    assert min(shown.page.evaluate(heights)) > 80
    assert shown.page.locator("#failure").is_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_says_nothing_on_the_console_and_loads_nothing_else(show, scheme):
    shown = show(scheme, **FULL)
    assert shown.said == []
    assert shown.asked == [shown.page.url]


def test_what_is_missing_is_said_and_leaves_no_empty_plot(show):
    shown = show(experts=0, name=HOSTILE)
    assert shown.points.keys() == {"linears-bits", "curve-plot", "layers-plot"}
    text = shown.page.inner_text("main")
    assert "This model has no routed experts." in text
    assert "No device was named when this plan was solved" in text
    assert "Single layers were not measured" in text


def test_names_from_a_model_are_shown_and_not_run(show):
    shown = show(experts=0, name=HOSTILE)
    assert shown.page.title().startswith(HOSTILE)
    assert HOSTILE in shown.page.inner_text("h1")
    assert shown.page.locator("img").count() == 0
    assert shown.said == []


def test_pointing_at_a_cell_tells_its_block(show):
    facts, page = make_facts(**FULL), show(**FULL).page
    page.locator("#experts-bits").scroll_into_view_if_needed()
    cell = page.locator("#experts-bits .hm image").first.bounding_box()
    # Layer 1 of three, expert 2 of four.
    page.mouse.move(cell["x"] + cell["width"] * 2.5 / 4, cell["y"] + cell["height"] / 2)
    page.wait_for_selector("#experts-bits .hoverlayer .hovertext")
    told = page.text_content("#experts-bits .hoverlayer")
    [block] = [found for found in facts.cells if found.name == "layers.1.experts.2.gate"]
    assert block.name in told
    assert str(block.scheme) in told
    assert "102 calibration tokens" in told
    assert f"predicted loss {block.loss:.3g}" in told


def test_the_theme_is_that_of_the_system_and_a_button_switches_it(show):
    light, dark = show("light", **FULL), show("dark", **FULL)
    assert light.brightness > 600 > 200 > dark.brightness
    assert (light.star, dark.star) == (palette.PLAN, palette.DARK_OF[palette.PLAN])
    for theme, star in (("light", light.star), ("dark", dark.star)):
        dark.page.click("#theme")
        dark.page.wait_for_selector(f"html[data-theme={theme}]")
        dark.page.wait_for_function(
            f"document.getElementById('curve-plot')._fullData.at(-1).marker.color === '{star}'"
        )
        assert (dark.brightness > 600) is (theme == "light")


def test_every_colour_of_a_figure_has_one_for_the_dark(show):
    found = r"[...new Set(JSON.stringify(figures).match(/#[0-9a-fA-F]{6}\b/g))]"
    used = set(show(**FULL).page.evaluate(found))
    assert used <= set(palette.DARK_OF)
    assert {palette.PLAN, palette.UNIFORM, *palette.BITS, *palette.LOAD} <= used
    assert not set(palette.DARK_OF) & set(palette.DARK_OF.values())


def test_a_dark_page_is_printed_light_and_dark_again_after(show):
    page = show("dark", **FULL).page
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.wait_for_selector("html[data-theme=light]")
    width = "document.getElementById('curve-plot')._fullLayout.width"
    assert page.evaluate(width) == 640
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.wait_for_selector("html[data-theme=dark]")
    page.wait_for_function(f"{width} > 640")
    assert page.pdf(format="A4").startswith(b"%PDF")


PHONE = {"width": 390, **FULL}

SIDEWAYS = """() => [...document.querySelectorAll('main *')]
    .filter((part) => !part.closest('.scroll > *')
        && part.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
    .map((part) => part.outerHTML.slice(0, 80))"""

OVERLAPS = """() => [...document.querySelectorAll('.plot')].flatMap((plot) =>
    [...plot.querySelectorAll('.xaxislayer-above')].flatMap((axis) => {
        const boxes = [...axis.querySelectorAll('g[class$=tick] text')]
            .map((text) => text.getBoundingClientRect()).sort((a, b) => a.left - b.left);
        return boxes.slice(1).filter((box, index) => box.left < boxes[index].right + 1)
            .map((box) => `${plot.id} at ${box.left}`);
    }))"""

LABELS = """(id) => [...document.querySelectorAll(`#${id} .xaxislayer-above g[class$=tick] text`)]
    .map((text) => text.textContent)"""


@pytest.mark.parametrize("experts", [8, 40, 64])
def test_on_a_phone_only_plots_and_tables_scroll_sideways_and_no_labels_overlap(show, experts):
    page = show(experts=experts, **PHONE).page
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate(SIDEWAYS) == []
    assert page.evaluate(OVERLAPS) == []
    widths = "[...document.querySelectorAll('.plot .main-svg')].map((svg) => svg.clientWidth)"
    assert set(page.evaluate(widths)) == {640}
    assert len(page.evaluate(LABELS, "experts-bits")) >= 8


def test_predicted_and_measured_losses_can_be_read_off_the_axes(show):
    page = show(**PHONE, experts=8).page
    assert len(page.evaluate(LABELS, "agreement-plot")) >= 3
    down = "document.querySelectorAll('#agreement-plot .ytick text').length"
    assert page.evaluate(down) >= 3


def test_every_column_of_the_page_is_explained(show):
    page = show(**FULL).page
    heads = page.locator("#measured th").all_inner_texts()[1:]
    terms = ", ".join(page.locator("#measured dt").all_inner_texts()).split(", ")
    assert len(heads) == 7
    assert set(heads) < set(terms)


def test_a_plan_of_36_thousand_blocks_is_a_small_page_that_is_drawn(show):
    shown = show(layers=94, experts=128)
    assert Path(shown.page.url.removeprefix("file://")).stat().st_size < 4_000_000
    assert shown.points["experts-bits"] == [94 * 128] * 3
    assert shown.said == []
