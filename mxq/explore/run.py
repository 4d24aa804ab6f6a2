"""From a work folder to a served page."""

import webbrowser
from collections.abc import Callable, Mapping
from threading import Thread

from mxq.artifacts import SensitivityTable
from mxq.config import AllocateOptions
from mxq.explore.facts import plan_facts, table_facts
from mxq.explore.page import page_resources
from mxq.explore.question import Setting, parse_question
from mxq.explore.server import LocalServer, Site
from mxq.explore.session import Restricted, Session
from mxq.for_engine import inside
from mxq.latency import load_pricing
from mxq.pinning import pins_of
from mxq.search.problem import InfeasibleError
from mxq.workspace import Workspace


def run_explore(
    setting: Setting, *, port: int, opens_browser: bool, announce: Callable[[str], None]
) -> None:
    """Serve the page until the user interrupts; ``announce`` is told its address.

    Raises:
        ValueError: If the folder holds no measurement, plotly is absent, or the port is taken.
    """
    with LocalServer(open_site(setting), port) as server:
        announce(server.url)
        if opens_browser:
            Thread(target=_show, args=(server.url,), daemon=True).start()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


def open_site(setting: Setting) -> Site:
    """The page of a work folder, and the session that answers it.

    Raises:
        ValueError: If the folder holds no measurement, or plotly is absent.
    """
    work = Workspace(setting.work)
    session = _session(work, setting)
    start = work.allocation().asked_bits if work.path("allocation").is_file() else None
    model = work.settings().model.model
    facts = table_facts(session, setting, model=model, start_bits=start)

    def solve(query: str) -> Mapping[str, object]:
        return solved(session, setting, parse_question(query, setting))

    return Site(page_resources(facts), solve)


def solved(session: Session, setting: Setting, options: AllocateOptions) -> Mapping[str, object]:
    """The plan for the page, or why there is none: that is an answer too."""
    try:
        return plan_facts(session, setting, options, session.solve(options))
    except InfeasibleError as error:
        rules = "" if options.engine is None else f"inside the rules of {options.engine}: "
        return {"impossible": f"{rules}{error}"}
    except (ValueError, RuntimeError) as error:
        return {"impossible": str(error)}


def within_rules(table: SensitivityTable, options: AllocateOptions) -> Restricted:
    """What the engine of the options takes.

    Raises:
        ValueError: If it takes nothing for some block, or the inputs are rotated.
    """
    found = inside(table, options)
    return ((table,), ()) if found is None else (found.tables, found.restriction.ties)


def _session(work: Workspace, setting: Setting) -> Session:
    if (setting.device is None) != (setting.tokens is None):
        raise ValueError("--device and --tokens go together: a latency is of both")
    table = work.sensitivity()
    pins = pins_of(work, table, AllocateOptions(bits=16))
    if setting.device is None:
        return Session(table, restrict=within_rules, pins=pins)
    cost = load_pricing(setting.device, setting.profiles).cost
    return Session(table, cost_model=cost, tokens=setting.tokens, restrict=within_rules, pins=pins)


def _show(url: str) -> None:
    """Open a browser with windows, if there is one: one of the terminal would take it over."""
    try:
        browser = webbrowser.get()
    except webbrowser.Error:
        return
    if type(browser) is not webbrowser.GenericBrowser:
        browser.open(url)
