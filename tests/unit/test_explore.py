"""``mxq explore``: plans of a session, what may be asked, the server, and the command itself."""

import http.client
import itertools
import json
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from math import inf
from pathlib import Path
from threading import Thread

import pytest
from exploring import SCHEMES, random_table, save_profile, save_work
from typer.testing import CliRunner

from mxq.cli import app
from mxq.config import AllocateOptions
from mxq.engines import ENGINES
from mxq.explore.facts import table_facts
from mxq.explore.page import page_text, plotly_script
from mxq.explore.question import Setting, allocate_command, parse_question
from mxq.explore.run import open_site, within_rules
from mxq.explore.server import LocalServer, Resource, Site
from mxq.explore.session import Session
from mxq.latency import load_pricing
from mxq.scheme import parse_schemes
from mxq.search import InfeasibleError, allocate, best_uniform

TABLE = random_table()
WEIGHTS = 3 * (128 * 128 + 15 * 128 * 256)
HERE = Setting(Path("work"))
H200 = load_pricing("h200").cost

RULES = [
    "",
    "&granularity=expert",
    "&granularity=projection",
    "&granularity=layer",
    "&tie-gate-up=1",
    "&floor-bits=2.5",
    "&granularity=layer&tie-gate-up=1&floor-bits=2.3",
]


def ask(query, setting=HERE):
    return parse_question(query, setting)


def limits(options):
    """The same question for ``allocate``."""
    names = ("bits", "granularity", "tie_gate_up", "floor_bits", "max_latency_us")
    return {name: getattr(options, name) for name in names}


def test_a_session_gives_the_plan_of_allocate_for_every_question():
    session = Session(TABLE, solver_seconds=60)
    # Twice, because what is kept for the first time round must not change the second.
    for bits, rules in itertools.product((2.75, 3.3, 5, 2.75), RULES):
        options = ask(f"bits={bits}{rules}")
        expected = allocate(TABLE, **limits(options), solver="lagrangian")
        assert session.solve(options).plan == expected


@pytest.mark.parametrize("rules", RULES)
def test_the_optimum_of_another_solver_lies_between_bound_and_loss(rules):
    options = ask(f"bits=3.3{rules}")
    plan = Session(TABLE, solver_seconds=60).solve(options).plan
    best = allocate(TABLE, **limits(options), solver="pulp", gap=0).predicted_loss
    # Both sums are of the same 48 numbers, so they agree to rounding.
    assert plan.bound <= best * (1 + 1e-12)
    assert best <= plan.predicted_loss * (1 + 1e-12)
    assert plan.predicted_loss - plan.bound <= 1e-4 * plan.predicted_loss


def test_a_latency_limit_holds_and_is_that_of_allocate():
    setting = Setting(Path("work"), "h200", 16)
    session = Session(TABLE, cost_model=H200, tokens=16, solver_seconds=60)
    fastest, slowest = (
        session.solve(ask(f"bits={bits}", setting)).plan.predicted_latency_us for bits in (2.2, 16)
    )
    options = ask(f"bits=16&max-latency={(fastest + slowest) / 2000:.6f}", setting)
    plan = session.solve(options).plan
    assert fastest <= plan.predicted_latency_us <= options.max_latency_us < slowest
    assert plan == allocate(
        TABLE, **limits(options), solver="lagrangian", cost_model=H200, tokens=16
    )


def test_the_uniform_plan_beside_is_the_best_one_that_fits():
    session = Session(TABLE)
    beside = session.solve(ask("bits=4.2")).uniform
    assert beside == best_uniform(TABLE, storage_bits=4.2 * WEIGHTS)
    # w2 in groups of 128 takes 2 + (16 + 2) / 128 = 2.1406 bits, w4 4 + (16 + 4) / 128 = 4.1563.
    assert (beside.bits_per_weight, set(beside.schemes.values())) == (4.15625, {SCHEMES[2]})
    assert session.solve(ask("bits=2.2")).uniform.bits_per_weight == 2.140625
    assert session.solve(ask("bits=4.2&floor-bits=2.5")).uniform is None


def without(*schemes):
    """The table in which some schemes, by number, are not to be had."""
    rows = [[inf if s in schemes else x for s, x in enumerate(row)] for row in TABLE.loss]
    return replace(TABLE, loss=tuple(map(tuple, rows)))


def test_an_engine_that_takes_one_of_two_menus_gets_the_better_plan_inside_its_ties():
    # Menus: 2 and 8 bits, or 3 and 4 bits. All down projections share a scheme.
    tables = without(1, 2, 4), without(0, 3, 4)
    ties = [tuple("down" if b.projection == "down" else None for b in TABLE.blocks)]
    session = Session(TABLE, restrict=lambda table, options: (tables, ties), solver_seconds=60)
    for bits in (2.3, 3.3, 4.5):  # the first is less than any plan of 3 and 4 bits
        found = session.solve(ask(f"bits={bits}&granularity=expert&tie-gate-up=1"))
        plans = []
        for table in tables:
            with suppress(InfeasibleError):
                limited = {"bits": bits, "granularity": "expert", "tie_gate_up": True}
                plans.append(allocate(table, **limited, ties=ties, solver="lagrangian"))
        assert found.plan == min(plans, key=lambda plan: plan.predicted_loss)
        down = {s for name, s in found.plan.schemes.items() if name.endswith(".down")}
        assert len(down) == 1
        assert SCHEMES[4] not in found.plan.schemes.values()
    assert found.uniform.bits_per_weight == 4.15625
    with pytest.raises(InfeasibleError, match=r"the cheapest plan needs 3\.1484"):
        session.solve(ask("bits=2"))


def test_a_solver_that_is_out_of_time_says_what_it_has_not_proven():
    # No time at all: the first plan and the bound of the prices, valid but apart.
    plan = Session(TABLE, solver_seconds=0).solve(ask("bits=3.3&granularity=layer")).plan
    best = allocate(TABLE, bits=3.3, granularity="layer", gap=0).predicted_loss
    assert not plan.proven
    assert plan.bound < best * (1 + 1e-12)
    assert plan.predicted_loss >= best * (1 - 1e-12)


def test_no_plan_says_why():
    with pytest.raises(InfeasibleError, match=r"the cheapest plan needs 2\.14062"):
        Session(TABLE).solve(ask("bits=2"))


def test_limits_that_contradict_each_other_are_named_but_not_all_of_them():
    # Nothing stores just 2.2 bits in every layer, and 2.2 is all there is.
    with pytest.raises((ValueError, RuntimeError)) as error:
        Session(TABLE, solver_seconds=0).solve(ask("bits=2.2&floor-bits=2.2"))
    assert "'storage bits of layer 1' (at least 1.1" in str(error.value)
    assert "and 1 more" in str(error.value)


def test_a_question_has_the_names_and_units_of_the_command_line():
    setting = Setting(Path("w"), "h200", 64)
    query = "bits=3.25&granularity=layer&tie-gate-up=1&floor-bits=2.5&max-latency=0.61"
    assert ask(query, setting) == AllocateOptions(
        bits=3.25,
        granularity="layer",
        tie_gate_up=True,
        floor_bits=2.5,
        max_latency_us=1000 * 0.61,
        solver="lagrangian",
        device="h200",
        tokens=64,
    )


BAD_QUERIES = {
    "": "bits is missing",
    "bits": "not of the form name=value",
    "bits=": "bits is ''; expected a number",
    "bits=nan": "bits is 'nan'; expected a number",
    "bits=inf": "bits is 'inf'; expected a number",
    "bits=1e1": "bits is '1e1'; expected a number",
    "bits=-3": "bits is '-3'; expected a number",
    "bits=3.1234567": "at most 6 decimals",
    "bits=0": "--bits 0 is not between 0 and 16",
    "bits=17": "--bits 17 is not between 0 and 16",
    "bits=3&bits=4": "bits is given 2 times",
    "bits=3&colour=red": "no parameter 'colour'; there are bits, granularity",
    "bits=3&granularity=row": "granularity 'row' is unknown; choose one of block",
    "bits=3&tie-gate-up=yes": "tie-gate-up is 'yes'; expected 0 or 1",
    "bits=3&floor-bits=4": "--floor-bits 4 is above --bits 3",
    "bits=3&engine=cuda": "cuda",
    "bits=3&engine=vllm&tp=0": "tp is '0'; expected a number from 1 on",
    "bits=3&tp=2": "--tp needs --engine",
    "bits=3&max-latency=1": "--max-latency needs --device and --tokens",
    "&".join(["bits=3"] * 30): "not of the form",
}


@pytest.mark.parametrize("query", BAD_QUERIES)
def test_a_bad_question_says_what_is_wrong(query):
    with pytest.raises(ValueError, match=re.escape(BAD_QUERIES[query])):
        ask(query)


@pytest.mark.parametrize(
    ("bits", "rules"),
    [
        (3.123456, "&granularity=projection"),
        (3.123456, "&tie-gate-up=1"),
        (3.123456, "&floor-bits=3.1"),
        (3.123456, "&max-latency={middle}"),
        (6.123456, "&engine=vllm"),
        (6.123456, "&engine=sglang"),
    ],
)
def test_the_command_gives_the_plan_that_was_shown(tmp_path, bits, rules):
    work = save_work(tmp_path / "a work folder", TABLE)
    setting = Setting(work.folder, "h200", 16)
    session = Session(TABLE, cost_model=H200, tokens=16, restrict=within_rules, solver_seconds=60)
    ends = [session.solve(ask(f"bits={end}", setting)).plan for end in (2.2, bits)]
    middle_ms = sum(plan.predicted_latency_us for plan in ends) / 2000
    options = ask(f"bits={bits}{rules}".format(middle=f"{middle_ms:.6f}"), setting)
    shown = session.solve(options).plan
    assert shown.schemes != ends[1].schemes  # the rule decides something
    words = shlex.split(allocate_command(options, setting))
    assert words[0] == "mxq"
    done = CliRunner().invoke(app, words[1:])
    assert done.exit_code == 0, done.output
    written = work.allocation()
    assert written.schemes == shown.schemes
    assert (written.engine, written.tensor_parallel) == (options.engine, options.tensor_parallel)


def test_the_command_says_over_how_many_ranks():
    options = ask("bits=6&engine=vllm&tp=4")
    assert (options.engine, options.tensor_parallel) == ("vllm", 4)
    assert "--engine vllm --tp 4 " in allocate_command(options, HERE)


def test_facts_of_a_plan_add_up(tmp_path):
    save_work(tmp_path, TABLE)
    site = open_site(Setting(tmp_path))
    facts, plan = facts_of(site), site.solve("bits=3.3")
    shapes = [facts["shapes"][shape] for shape in facts["blocks"]["shape"]]
    bits = sum(shape["bits"][s] for shape, s in zip(shapes, plan["choice"], strict=True))
    assert (sum(shape["weights"] for shape in shapes), facts["weights"]) == (WEIGHTS, WEIGHTS)
    assert bits == pytest.approx(plan["bits"] * WEIGHTS) == 8 * plan["bytes"]
    assert sum(plan["losses"]) == pytest.approx(plan["loss"], rel=5e-3)  # three digits each
    assert [u["scheme"] for u in facts["uniforms"]] == [str(scheme) for scheme in SCHEMES]
    assert facts["blocks"]["projection"][:3] == ["self_attn.o_proj", "gate", "up"]
    assert facts["bits"] == {"least": 2.15, "most": 16.0, "start": 4.0}  # 2.1406 rounded up


def test_engines_are_refused_where_inputs_are_rotated_and_only_there(tmp_path):
    save_work(tmp_path / "plain", TABLE)
    save_work(tmp_path / "rotated", replace(TABLE, rotated_layers=(1,)))
    plain, rotated = (
        {engine["name"]: engine["refusal"] for engine in facts_of(site)["engines"]}
        for site in map(open_site, map(Setting, (tmp_path / "plain", tmp_path / "rotated")))
    )
    assert plain == dict.fromkeys(ENGINES)
    assert set(rotated) == set(ENGINES)
    for name, refusal in rotated.items():
        assert refusal.startswith("the inputs of layers 1 were measured rotated")
        assert f"mxq quantize --engine {name}" in refusal


def test_an_engine_that_takes_no_scheme_of_the_table_is_refused():
    menu = parse_schemes("w2a16_g128_asym,w3a16_g128_asym")
    two = {name: tuple(row[:2] for row in getattr(TABLE, name)) for name in ("loss", "quantizer")}
    offered = replace(TABLE, schemes=menu, **two)
    asymmetric = Session(offered, restrict=within_rules)
    refusal = asymmetric.refusal(AllocateOptions(bits=16, engine="trtllm"))
    assert refusal is not None
    assert "w2a16_g128_asym" in refusal
    assert asymmetric.refusal(AllocateOptions(bits=16)) is None


def test_the_page_opens_with_the_budget_of_the_plan_in_the_folder(tmp_path):
    work = save_work(tmp_path, TABLE)
    work.save("allocation", allocate(TABLE, bits=3.4567))
    assert facts_of(open_site(Setting(tmp_path)))["bits"]["start"] == 3.46


def test_text_of_a_model_cannot_leave_its_place_in_the_page():
    model = "</script><script>alert(1)</script><!--"
    facts = table_facts(Session(TABLE), HERE, model=model, start_bits=None)
    text = page_text(facts)
    assert "<script>alert" not in text
    assert json.loads(facts_text(text))["model"] == model


def test_without_plotly_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ValueError, match=re.escape("pip install 'mxq[report]'")):
        plotly_script()


def facts_text(page):
    return page.partition('id="facts">')[2].partition("</script>")[0]


def facts_of(site):
    return json.loads(facts_text(site.resources["/"].body.decode()))


@contextmanager
def serving(site):
    with LocalServer(site) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    save_work(folder, TABLE)
    with serving(open_site(Setting(folder))) as server:
        yield server


def request(server, target, *, method="GET", headers=(), host=None):
    """Status, headers and body of one request whose lines are sent as they are."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.putrequest(method, target, skip_host=True)
    for name in [f"127.0.0.1:{server.server_port}"] if host is None else host:
        connection.putheader("Host", name)
    for name, text in headers:
        connection.putheader(name, text)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, answer.headers, body


def test_the_page_and_its_parts_are_served_with_their_types(server):
    kinds = {"/": "text/html", "/explore.js": "text/javascript", "/explore.css": "text/css"}
    for path, kind in {**kinds, "/plotly.js": "text/javascript"}.items():
        status, headers, body = request(server, path)
        assert (status, headers["Content-Type"].split(";")[0]) == (200, kind)
        assert len(body) > 1000
        assert "default-src 'none'" in headers["Content-Security-Policy"]
    page = request(server, "/")[2].decode()
    named = set(re.findall(r'(?:src|href)="(/[^"]*)"', page))
    assert named == {"/explore.css", "/explore.js", "/plotly.js"}


def test_an_answer_is_the_plan(server):
    status, headers, body = request(server, "/solve?bits=3.3&granularity=layer")
    expected = allocate(TABLE, bits=3.3, granularity="layer", solver="lagrangian")
    answer = json.loads(body)
    assert (status, headers["Content-Type"]) == (200, "application/json")
    assert (answer["loss"], answer["bits"]) == (expected.predicted_loss, expected.bits_per_weight)
    assert [SCHEMES[s] for s in answer["choice"]] == list(expected.schemes.values())


def test_a_bad_request_is_answered_with_one_message(server):
    status, headers, body = request(server, "/solve?bits=3&granularity=%3Cb%3E")
    assert (status, headers["Content-Type"]) == (400, "application/json")
    assert json.loads(body)["error"].startswith("granularity '<b>' is unknown; choose one of")


def test_no_plan_is_an_answer_that_says_why(server):
    status, _, body = request(server, "/solve?bits=2")
    assert status == 200
    assert "the cheapest plan needs 2.14062" in json.loads(body)["impossible"]


@pytest.mark.parametrize(
    "host",
    [["evil.example"], ["evil.example:{port}"], ["127.0.0.1"], ["127.0.0.1:1"], [""], []],
    ids=repr,
)
@pytest.mark.parametrize("target", ["/", "/solve?bits=3.3", "/explore.js"])
def test_another_name_for_this_address_is_refused(server, host, target):
    names = [name.format(port=server.server_port) for name in host]
    status, _, body = request(server, target, host=names)
    assert status == 403
    assert json.loads(body) == {"error": f"this page is at {server.url} only"}


def test_two_host_headers_are_refused_though_one_is_right(server):
    names = [f"127.0.0.1:{server.server_port}", "evil.example"]
    assert request(server, "/", host=names)[0] == 403


def test_localhost_is_a_name_of_this_machine(server):
    assert request(server, "/", host=[f"localhost:{server.server_port}"])[0] == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_questions_of_other_sites_are_refused(server, site):
    headers = [("Sec-Fetch-Site", site)]
    assert request(server, "/solve?bits=3.3", headers=headers)[0] == 403
    assert request(server, "/solve?bits=3.3", headers=[("Sec-Fetch-Site", "same-origin")])[0] == 200


@pytest.mark.parametrize(
    "target",
    [
        "/../pyproject.toml",
        "/../../../../../../../../etc/passwd",
        "/%2e%2e/%2e%2e/facts.py",
        "/..%2ffacts.py",
        "//etc/passwd",
        "/static/explore.js",
        "/page.html",
        "/explore.js/",
        "/explore.js%00",
        "/[",
        "/solve/?bits=3.3",
        "file:///etc/passwd",
    ],
)
def test_only_the_names_of_the_page_are_served(server, target):
    status, _, body = request(server, target)
    assert status == 404
    assert json.loads(body)["error"].startswith("nothing is here")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS"])
def test_nothing_but_get_is_answered(server, method):
    assert request(server, "/solve?bits=3.3", method=method)[0] == 501


def test_requests_at_the_same_time_get_each_its_own_answer(server):
    queries = [
        f"/solve?bits={bits}&granularity={granularity}"
        for bits in (2.5, 3, 3.5, 4.5)
        for granularity in ("block", "layer", "projection")
    ]
    alone = [json.loads(request(server, query)[2]) for query in queries]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda query: json.loads(request(server, query)[2]), queries))
    for one, other in zip(alone, together, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_only_this_machine_is_listened_to(server):
    assert server.socket.getsockname()[0] == "127.0.0.1"
    assert server.url == f"http://127.0.0.1:{server.server_port}/"


def test_a_taken_port_is_named(server):
    site = Site({"/": Resource("text/plain", b"")}, lambda query: {})
    with pytest.raises(ValueError, match=f"port {server.server_port} of 127.0.0.1 cannot be used"):
        LocalServer(site, server.server_port)


def test_the_command_serves_until_it_is_interrupted_and_writes_nothing(tmp_path):
    save_profile(save_work(tmp_path, TABLE))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    command = [sys.executable, "-m", "mxq", "explore", str(tmp_path), "--no-browser"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = running.stdout.readline()
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)/", line)[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/solve?bits=3.3")
        assert "choice" in json.loads(connection.getresponse().read())
        connection.close()
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=30)
    finally:
        running.kill()
    assert (running.returncode, errors) == (0, "")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_without_a_measurement_is_refused_with_one_message(tmp_path):
    done = CliRunner().invoke(app, ["explore", str(tmp_path), "--no-browser"])
    assert done.exit_code == 1
    assert "sensitivity.json" in done.stderr
    assert done.stderr.count("error: ") == 1


def test_a_device_without_tokens_is_refused(tmp_path):
    save_work(tmp_path, TABLE)
    done = CliRunner().invoke(app, ["explore", str(tmp_path), "--device", "h200"])
    assert done.exit_code == 1
    assert "--device and --tokens go together" in done.stderr
