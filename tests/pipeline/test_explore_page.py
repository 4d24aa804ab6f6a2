"""The page of ``mxq explore`` in headless Chromium: what a user moves, and what then changes.

Skipped where playwright or Debian's chromium is not installed.
"""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread

import pytest
from exploring import random_table, save_work

from mxq.engines import ENGINES
from mxq.explore.question import Setting
from mxq.explore.run import open_site
from mxq.explore.server import LocalServer, Site
from mxq.search import allocate

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-background-networking "
    "--disable-component-update --disable-sync"
)
TABLE = random_table()
HOSTILE = "<img src=x onerror=alert(1)>"

pytestmark = pytest.mark.skipif(not CHROMIUM.is_file(), reason=f"{CHROMIUM} is not installed")


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    save_work(folder, TABLE, model=HOSTILE)
    return open_site(Setting(folder))


@contextmanager
def opened(chromium, site, *, address="", **options):
    """The page of a site, its first plan drawn; no error and no request elsewhere until the end."""
    with LocalServer(site) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        page = chromium.new_page(**options)
        complaints, outside = [], []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda made: outside.append(made.url))
        try:
            page.goto(server.url + address)
            yield page
        finally:
            page.close()
            server.shutdown()
            thread.join()
        assert complaints == []
        assert {url for url in outside if not url.startswith((server.url, "data:"))} == set()


def shows(page, place, text):
    """Wait until an element has this text."""
    sync_api.expect(page.locator(place)).to_contain_text(text, timeout=10_000)


def shown_loss(page):
    return page.locator("#loss").inner_text()


def command(bits, *rules):
    return " ".join([f"--bits {bits}", *rules, "--solver lagrangian"])


def data_of(page, chart):
    """Traces of a chart as plotly has drawn them; typed arrays as lists."""
    return page.evaluate("id => document.getElementById(id).data.map(trace => ({...trace}))", chart)


def test_moving_the_slider_shows_the_plan_of_that_budget(chromium, site):
    with opened(chromium, site, address="#bits=3.3") as page:
        shows(page, "#command", command("3.3"))
        before = data_of(page, "map")[0]["z"], data_of(page, "bars")[0]["x"]
        page.locator("#slider").fill("5.5")
        shows(page, "#command", command("5.5"))
        plan = allocate(TABLE, bits=5.5, solver="lagrangian")
        assert float(shown_loss(page)) == pytest.approx(plan.predicted_loss, rel=1e-3)
        assert page.locator("#bits").input_value() == "5.50"
        after = data_of(page, "map")[0]["z"], data_of(page, "bars")[0]["x"]
        assert before[0] != after[0]
        assert before[1] != after[1]


def test_the_map_holds_the_bits_of_every_expert(chromium, site):
    with opened(chromium, site, address="#bits=3.3") as page:
        shows(page, "#command", command("3.3"))
        page.locator("#view").select_option("experts, gate")
        plan = allocate(TABLE, bits=3.3, solver="lagrangian")
        drawn = data_of(page, "map")[0]
        for layer in range(3):
            for expert in range(5):
                scheme = plan.schemes[f"layers.{layer}.experts.{expert}.gate"]
                bits = scheme.storage_bits(128, 256) / (128 * 256)
                assert 2 ** drawn["z"][layer][expert] == pytest.approx(bits)
                assert f"gate {scheme}" in drawn["hovertext"][layer][expert]
        page.locator("#sort").check()
        # Tokens are 10 + expert, so the last expert comes first.
        assert "expert 4: 14 tokens" in data_of(page, "map")[0]["hovertext"][0][0]


def test_rules_are_solved_and_compared_with_the_plan_without_them(chromium, site):
    with opened(chromium, site, address="#bits=3.3") as page:
        shows(page, "#free-about", "no rule is set")
        page.locator("#granularity").select_option("layer")
        page.locator("#tie-gate-up").check()
        shows(page, "#command", command("3.3", "--granularity layer --tie-gate-up"))
        free = allocate(TABLE, bits=3.3, solver="lagrangian").predicted_loss
        shows(page, "#free", f"{free:.4g}"[:5])
        shows(page, "#free-about", "this plan loses")
        page.locator("#engine").select_option("vllm")
        shows(page, "#message", "the cheapest plan needs 4.1562")
        page.locator("#bits").fill("6")
        shows(page, "#command", "--engine vllm")
        page.locator("#tp").fill("2")
        # Halves of 128 inputs hold no group of 128, so only bf16 is left.
        shows(page, "#message", "inside the rules of vllm: 6 bits per weight were asked for")
        page.locator("#tp").fill("")
        page.locator("#engine").select_option("")
        page.locator("#floor-bits").fill("3")
        shows(page, "#command", "--floor-bits 3")
        shows(page, "#uniform-about", "not compared under a floor")


def test_engines_that_read_no_rotated_inputs_cannot_be_chosen_and_the_page_says_why(
    chromium, site, tmp_path
):
    save_work(tmp_path, replace(TABLE, rotated_layers=(0, 2)))
    disabled = "() => [...document.querySelectorAll('#engine :disabled')].map(o => o.value)"
    with opened(chromium, open_site(Setting(tmp_path)), address="#bits=3.3") as page:
        shows(page, "#command", command("3.3"))
        assert page.evaluate(disabled) == list(ENGINES)
        why = "the inputs of layers 0, 2 were measured rotated"
        assert why in page.locator("#engine option[value=vllm]").get_attribute("title")
        summary = page.locator("#refused summary")
        assert summary.inner_text() == f"No plan for {', '.join(ENGINES)}: why"
        summary.click()
        assert page.locator("#refused li").count() == len(ENGINES)
        shows(page, "#refused", why)
    with opened(chromium, site, address="#bits=3.3") as page:
        shows(page, "#command", command("3.3"))
        assert page.evaluate(disabled) == []
        assert page.locator("#refused").is_hidden()


def test_bars_are_labelled_with_the_share_that_they_show(chromium, site):
    with opened(chromium, site, address="#bits=3.3") as page:
        shows(page, "#command", command("3.3"))
        plan = allocate(TABLE, bits=3.3, solver="lagrangian")
        weights = {str(scheme): 0 for scheme in TABLE.schemes}
        for block in TABLE.blocks:
            weights[str(plan.schemes[block.name])] += block.out_features * block.in_features
        drawn = data_of(page, "bars")[0]
        for scheme, share, label in zip(drawn["y"], drawn["x"], drawn["text"], strict=True):
            expected = 100 * weights[scheme] / sum(weights.values())
            assert share == pytest.approx(expected)
            assert label == (f"{expected:.1f} %" if expected else "")


def test_the_curve_is_filled_and_a_click_on_it_goes_there(chromium, site):
    with opened(chromium, site, address="#bits=3.3") as page:
        shows(page, "#filling", "click a point")
        curve, uniform, now = data_of(page, "curve")
        assert len(curve["x"]) > 15
        assert list(curve["y"]) == sorted(curve["y"], reverse=True)
        assert len(uniform["x"]) == 4  # of five schemes bf16 loses nothing: not on this axis
        assert now["x"] == [pytest.approx(allocate(TABLE, bits=3.3).bits_per_weight)]
        page.evaluate(
            "place => document.getElementById('curve').emit('plotly_click', "
            "{points: [{customdata: document.getElementById('curve').data[0].customdata[place]}]})",
            5,
        )
        shows(page, "#command", command(f"{curve['customdata'][5]:g}"))


def test_the_keyboard_moves_everything(chromium, site):
    with opened(chromium, site, address="#bits=3.3", color_scheme="dark") as page:
        shows(page, "#command", command("3.3"))
        page.keyboard.press("]")
        shows(page, "#command", command("3.35"))
        page.locator("#slider").press("ArrowRight")
        shows(page, "#command", command("3.36"))
        page.keyboard.press("g")
        shows(page, "#command", "--granularity expert")
        page.keyboard.press("m")
        assert page.locator("#view").input_value() == "experts, gate"
        page.locator("#bits").fill("4,5")  # "g" and "t" are letters while one types
        page.locator("#bits").press("t")
        shows(page, "#message", '"4.5t" is not a number')
        assert page.locator("html").get_attribute("data-theme") == "dark"


def test_light_and_dark_follow_the_system_and_the_button(chromium, site):
    colour = "() => getComputedStyle(document.body).backgroundColor"
    with opened(chromium, site, color_scheme="dark") as page:
        shows(page, "#command", "mxq allocate")
        dark = page.evaluate(colour)
        page.locator("#theme").click()
        light = page.evaluate(colour)
        font = page.evaluate("() => document.getElementById('map').layout.font.color")
        assert (dark, light, font) == ("rgb(16, 19, 23)", "rgb(245, 246, 248)", "#16191d")


def test_what_cannot_be_is_said_and_the_page_goes_on(chromium, site):
    with opened(chromium, site, address="#bits=3.3") as page:
        shows(page, "#command", command("3.3"))
        page.locator("#bits").fill("2.1")
        shows(page, "#message", "the cheapest plan needs 2.14062")
        page.locator("#bits").fill("three")
        shows(page, "#message", '"three" is not a number')
        assert page.locator("#bits").get_attribute("aria-invalid") == "true"
        page.locator("#bits").fill("3.4")
        shows(page, "#command", command("3.4"))
        sync_api.expect(page.locator("#message")).to_have_text("")


def test_names_of_a_model_are_text(chromium, site):
    with opened(chromium, site) as page:
        shows(page, "#model", HOSTILE)
        assert page.locator("img").count() == 0


def test_only_the_newest_of_many_moves_is_asked_and_drawn(chromium, site):
    asked, may_answer = [], Event()

    def solve(query):
        asked.append(query)
        may_answer.wait(20)
        return site.solve(query)

    with opened(chromium, Site(site.resources, solve), address="#bits=3.3") as page:
        while not asked:
            page.wait_for_timeout(20)
        for bits in ("4", "4.5", "5", "5.5"):
            page.locator("#slider").fill(bits)
            page.wait_for_timeout(100)  # longer than the page waits for the slider to rest
        may_answer.set()
        shows(page, "#command", command("5.5"))
        assert asked[0] == "bits=3.3"
        assert asked[1] == "bits=5.5"
        assert not {"bits=4", "bits=4.5", "bits=5"} & set(asked)
