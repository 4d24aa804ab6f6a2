"""Facts of a finished checkpoint, and what the card, the terminal and the page make of them."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from itertools import pairwise
from math import log10
from pathlib import Path

import pytest
import torch
import yaml
from reports import MADE_FROM, make_facts
from rich.console import Console
from safetensors.torch import load_file
from tiny import save_tiny, token_ids
from typer.testing import CliRunner

import mxq
from mxq import pipeline
from mxq.artifacts import MeasuredLayers, Provenance, SensitivityTable
from mxq.checkpoint.pack import plan_digest
from mxq.cli import app
from mxq.config import (
    AllocateOptions,
    CalibrationOptions,
    MeasureOptions,
    ModelOptions,
    QuantizeOptions,
    parse_menu,
)
from mxq.profiling.activation import ActivationStats
from mxq.publish import RunRecord
from mxq.report.card import model_card
from mxq.report.comparison import HEADS, comparison, legend
from mxq.report.curve import loss_curve
from mxq.report.facts import gather
from mxq.report.figure_parts import log_axis
from mxq.report.origin import Origin, command
from mxq.report.page import _bound
from mxq.report.times import step_times
from mxq.report.words import (
    coverage,
    few_tokens,
    headlines,
    kept_choices,
    plan_name,
    provenance,
    warnings,
)
from mxq.report_tables import bits_maps
from mxq.scheme import parse_schemes
from mxq.storage import load_artifact, save_artifact
from mxq.workspace import Workspace

MENU = "w2a16_g32_asym,w3a16_g32_asym,w4a16_g32_asym,w8a16_g32_asym"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def line(model, tmp_path_factory):
    """A run of the command line but for the folder that it writes."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("".join(f"The clock struck {number} times. " for number in range(60)))
    return [
        *("quantize", str(model), "--bits", "3.5", "--schemes", MENU, "--samples", "6"),
        *("--calibration", f"file:{text}", "--seqlen", "16", "--rotation", "off"),
        *("--device", "h200", "--tokens", "64", "--quantizer", "rtn"),
    ]


@pytest.fixture(scope="module")
def finished(line, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "out"
    run(*line, "--output", folder)
    return folder


@pytest.fixture
def out(finished, tmp_path):
    """A copy of a finished checkpoint with its work folder, to change."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def run(*arguments, status=0):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == status, done.output
    return " ".join((done.stdout if status == 0 else done.stderr).split())


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# Facts


def test_the_facts_of_a_checkpoint_are_those_of_its_run(finished, model):
    facts = gather(finished)
    table = load_artifact(finished / "work" / "sensitivity.json", SensitivityTable)
    assert facts.notes == ()
    assert [cell.name for cell in facts.cells] == [block.name for block in table.blocks]
    assert sum(cell.loss for cell in facts.cells) == pytest.approx(facts.plan.predicted_loss)
    # Blocks of one size, so the mean over blocks is the mean over weights.
    assert {block.out_features * block.in_features for block in table.blocks} == {64 * 32}
    mean = sum(cell.bits for cell in facts.cells) / len(facts.cells)
    assert mean == pytest.approx(facts.plan.bits_per_weight)
    assert facts.name == "tiny"
    held = (model / "model.safetensors").stat().st_size
    header = int.from_bytes((model / "model.safetensors").read_bytes()[:8], "little") + 8
    assert facts.origin.original_bytes == held - header
    assert sum(facts.origin.kept.values()) > 0


def test_without_the_work_folder_the_bits_stay_and_the_rest_is_said_to_be_missing(out):
    before = gather(out)
    shutil.rmtree(out / "work")
    facts = gather(out)
    assert (facts.table, facts.profile) == (None, None)
    [note] = facts.notes
    assert f"There is no work folder at {out / 'work'}" in note
    assert "--work" in note
    places = {(cell.name, cell.layer, cell.expert, cell.site, cell.column) for cell in facts.cells}
    assert places == {(c.name, c.layer, c.expert, c.site, c.column) for c in before.cells}
    assert all(cell.bits == cell.scheme.w_bits for cell in facts.cells)
    assert "the work folder" in step_times(facts)
    assert loss_curve(facts) is None


def test_a_work_folder_elsewhere_is_given_by_name(out, tmp_path):
    (out / "work").rename(tmp_path / "elsewhere")
    assert gather(out, tmp_path / "elsewhere").table is not None


def test_a_work_folder_of_another_plan_is_left_out_with_the_reason(out):
    work = Workspace(out / "work")
    table = work.sensitivity()
    other = tuple(tuple(2 * loss for loss in row) for row in table.loss)
    fields = {name: getattr(table, name) for name in table.__slots__}
    work.save("sensitivity", SensitivityTable(**{**fields, "loss": other}))
    facts = gather(out)
    assert facts.table is None
    assert "was solved on another measurement" in facts.notes[0]


def test_losses_of_single_layers_count_if_they_are_those_of_this_plan(out):
    plan = gather(out).plan
    for digest, is_shown in ((plan_digest(plan), True), ("another", False)):
        found = MeasuredLayers(64, (0.1, 0.2), digest, Provenance("", ""))
        save_artifact(out / "work" / "layer_losses.json", found)
        assert (gather(out).layers is not None) is is_shown
        assert (gather(out, measured_layers=found).layers is not None) is is_shown


def test_a_folder_of_something_else_is_refused(tmp_path):
    for command_name in ("inspect", "report"):
        message = run(command_name, tmp_path, status=1)
        assert "error: " in message
        assert "Traceback" not in message
    assert "is no finished checkpoint of mxq" in run("report", tmp_path, status=1)


def test_results_of_another_run_are_refused(out):
    found = json.loads((out / "mxq_report.json").read_text())
    del found["uniform"]
    (out / "mxq_report.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match="put together from different runs"):
        gather(out)


# The command


DEMO = Origin(
    model=ModelOptions("demo"),
    calibration=CalibrationOptions("demo"),
    measure=MeasureOptions(),
    allocate=AllocateOptions(bits=3),
    guard=True,
    hub_id=None,
    auto_class="",
    original_bytes=1,
    kept={},
)

ASKED = {
    "a hub id and bits that are no round number": (ModelOptions("org/name"), {"bits": 3.34}),
    "a size and a revision": (
        ModelOptions("org/name", revision="v1", scope="all"),
        {"size_bytes": 5_583_457_485},
    ),
    "a forced plan": (ModelOptions("org/name"), {"plan": "uniform:w4a16_g128_sym"}),
    "names with spaces, quotes and dashes": (
        ModelOptions("a folder/it's", keep=("-x.*", "b c$")),
        {"bits": 4, "tie_gate_up": True, "floor_bits": 2.5, "granularity": "expert"},
    ),
    "a device and a latency": (
        ModelOptions("org/name"),
        {"bits": 2.5, "device": "h200", "tokens": 64, "max_latency_us": 1000 * 0.7},
    ),
    "an engine on two ranks": (
        ModelOptions("org/name"),
        {"bits": 4.5, "engine": "vllm", "tensor_parallel": 2},
    ),
    "MxMoE's objective": (
        ModelOptions("org/name"),
        {"bits": 5, "objective": "mxmoe", "r": 1.0, "solver": "lagrangian"},
    ),
}


@pytest.mark.parametrize(("model_options", "asked"), ASKED.values(), ids=ASKED.keys())
@pytest.mark.parametrize("guard", [True, False])
def test_the_command_gives_the_same_options_again(model_options, asked, guard, monkeypatch):
    schemes = () if "plan" in asked else parse_schemes(MENU)
    origin = replace(
        DEMO,
        model=model_options,
        calibration=CalibrationOptions("file:a=x y.txt", samples=7, seqlen=8, seed=9),
        measure=MeasureOptions(schemes, "layer_out", "rtn"),
        allocate=AllocateOptions(**asked),
        guard=guard,
    )
    program, *arguments = shlex.split(command(origin))
    assert program == "mxq"
    found = options_of(arguments, monkeypatch)
    assert found.model == origin.model
    assert found.calibration == origin.calibration
    assert found.measure == origin.measure
    fields = {name: getattr(found.allocate, name) for name in found.allocate.__slots__}
    assert AllocateOptions(**{**fields, "profiles": None}) == origin.allocate
    assert found.output.guard is guard
    assert found.output.output == Path("OUT")


def options_of(arguments, monkeypatch) -> QuantizeOptions:
    """What the command line makes of these arguments."""
    seen = []

    def catch(options, **others):
        seen.append(options)
        raise ValueError("seen")

    monkeypatch.setattr(pipeline, "run_quantize", catch)
    assert "seen" in run(*arguments, status=1)
    return seen[0]


def test_the_command_has_the_candidates_of_projections():
    menu = "w2a16_g32_asym,w4a16_g32_asym;down=w4a16_g32_asym,w8a16_g32_asym;o_proj=fp8"
    schemes, by_projection = parse_menu(menu)
    origin = replace(DEMO, measure=MeasureOptions(schemes, by_projection=by_projection))
    assert shlex.split(command(origin))[-4:] == ["--calibration", "demo", "--output", "OUT"]
    assert f"--schemes '{menu}'" in command(origin)


def test_no_command_has_a_solver_of_the_callers_own():
    allocate = AllocateOptions(bits=3, solver="own")
    assert command(DEMO) is not None
    assert command(replace(DEMO, allocate=allocate)) is None


def test_what_each_layer_loses_is_measured_for_the_page(out):
    run("report", out, "--measure-layers", "--memory", "1MB")
    found = load_artifact(out / "work" / "layer_losses.json", MeasuredLayers)
    facts = gather(out)
    assert facts.layers == found
    assert len(found.kl) == 2
    assert min(found.kl) > 0
    # Errors of the layers add up to about that of the whole, which has other tokens.
    assert 0.2 < sum(found.kl) / facts.written.kl < 5
    before = (out / "work" / "layer_losses.json").stat().st_mtime_ns
    run("report", out, "--measure-layers")
    assert (out / "work" / "layer_losses.json").stat().st_mtime_ns == before


def test_layers_are_not_measured_against_another_model(out, tmp_path):
    other = save_tiny(tmp_path / "other", seed=1)
    mxq.quantize(
        other, output=tmp_path / "theirs", bits=4, calibration="demo", samples=8, seqlen=16
    )
    message = run("report", out, "--measure-layers", "--work", tmp_path / "theirs/work", status=1)
    assert "holds no checkpoint of" in message
    assert not (tmp_path / "theirs/work/layer_losses.json").exists()


def test_the_command_of_a_run_is_the_one_that_was_given(line, finished, monkeypatch):
    _, *arguments = shlex.split(command(gather(finished).origin))
    given = options_of([*line, "--output", "OUT"], monkeypatch)
    assert options_of(arguments, monkeypatch) == given


def test_a_plan_that_was_solved_again_and_packed_has_its_own_command(out, tmp_path):
    run("allocate", out / "work", "--bits", "5", "--granularity", "layer")
    run("pack", out / "work", "--output", tmp_path / "packed")
    facts = gather(tmp_path / "packed", out / "work")
    told = command(facts.origin)
    assert "--bits 5 --granularity layer" in told
    assert told.endswith("--no-guard --output OUT")
    assert "--device" not in told
    assert facts.notes == ()


def test_options_of_another_plan_are_not_taken_for_those_of_this_one(out, tmp_path):
    before = (out / "work" / "allocation.json").read_bytes()
    run("allocate", out / "work", "--bits", "5")
    (out / "work" / "allocation.json").write_bytes(before)
    run("pack", out / "work", "--output", tmp_path / "packed")
    assert command(gather(tmp_path / "packed", out / "work").origin) is None


def test_no_command_is_made_up_for_data_of_a_python_caller(model, tmp_path):
    mxq.quantize(
        model, output=tmp_path / "out", bits=4, calibration=token_ids(9, 16), schemes=MENU,
        quantizer="rtn", rotation="off",
    )  # fmt: skip
    assert command(gather(tmp_path / "out").origin) is None
    assert "No command makes it again" in (tmp_path / "out" / "README.md").read_text()


# The card


def test_the_card_has_front_matter_and_the_facts(finished):
    text = (finished / "README.md").read_text()
    facts = gather(finished)
    _, front, body = text.split("---\n", 2)
    fields = yaml.safe_load(front)
    assert fields["library_name"] == "transformers"
    assert fields["pipeline_tag"] == "text-generation"
    assert {"mxq", "moe", "qwen2_moe"} <= set(fields["tags"])
    assert not {"license", "base_model"} & fields.keys()  # a folder is no name on the hub
    assert command(facts.origin) in body
    assert f"{facts.written.kl:.5f}" in body
    assert "from transformers import AutoModelForCausalLM, AutoTokenizer" in body
    assert str(finished) not in text


def test_the_example_of_the_card_generates(finished, monkeypatch, capsys):
    names = run_example((finished / "README.md").read_text(), finished, monkeypatch)
    assert names["model"].config.model_type == "qwen2_moe"
    said = capsys.readouterr().out
    assert said.startswith("The ")
    assert len(said) > len("The \n")


def test_the_example_of_a_checkpoint_without_a_tokenizer_generates(out, monkeypatch, capsys):
    for path in out.glob("*token*"):
        path.unlink()
    names = run_example(model_card(gather(out)), out, monkeypatch)
    assert "tokenizer" not in names
    found = json.loads(capsys.readouterr().out)
    assert found[:3] == [1, 2, 3]
    assert len(found) > 3


def run_example(card, folder, monkeypatch):
    """Names that the example of a card leaves when it is run in its folder."""
    [snippet] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(folder)
    names = {}
    exec(compile(snippet, "README.md", "exec"), names)
    return names


def test_the_uniform_plan_over_the_budget_is_beside_the_others(finished):
    table = load_artifact(finished / "work" / "sensitivity.json", SensitivityTable)
    sizes = [(block.out_features, block.in_features) for block in table.blocks]
    weights = sum(rows * columns for rows, columns in sizes)
    bits, place = min(
        (sum(scheme.storage_bits(*size) for size in sizes) / weights, place)
        for place, scheme in enumerate(table.schemes)
        if sum(scheme.storage_bits(*size) for size in sizes) > 3.5 * weights
    )
    name, loss = f"uniform {table.schemes[place]} +", sum(row[place] for row in table.loss)
    row = (name, "", f"{bits:.3f}", "", f"{loss:.4g}", "", "", "")
    assert comparison(gather(finished))[1] == row
    assert f"| {' | '.join(row)} |" in (finished / "README.md").read_text()
    assert name in run("inspect", finished)


def test_a_checkpoint_of_before_has_no_plan_over_the_budget(out):
    path = out / "mxq_run.json"
    save_artifact(path, replace(load_artifact(path, RunRecord), above=None))
    assert not [row for row in comparison(gather(out)) if row[0].endswith("+")]


def test_kept_choices_are_told_where_the_run_has_counted_them(out):
    record = load_artifact(out / "mxq_run.json", RunRecord)
    [told] = kept_choices(record.packs[record.written].expert_choices)
    assert "(mean of 2 layers; least in layer 1: " in told
    assert told in (out / "README.md").read_text()
    assert told in run("inspect", out)
    unknown = {name: replace(pack, expert_choices=()) for name, pack in record.packs.items()}
    save_artifact(out / "mxq_run.json", replace(record, packs=unknown))
    assert "Routers keep" not in run("inspect", out)
    assert "Routers keep" not in model_card(gather(out))


def test_nobody_asked_for_the_bits_of_a_uniform_plan():
    facts = make_facts(bits=3.2)
    asked = {row[0]: row[1] for row in comparison(facts)}
    assert asked == {"original": "", "mixed plan *": "3.200", "uniform w3a16_g128_asym": ""}
    assert headlines(facts)[0].remark.startswith("3.200 asked, of ")
    uniform = replace(facts.plan, description="uniform w3a16_g128_asym, inside the rules of vLLM")
    assert headlines(replace(facts, plan=uniform))[0].remark.startswith("of ")
    assert plan_name(uniform.description) == "uniform w3a16_g128_asym"


def test_every_column_is_explained_with_the_tokens_it_was_measured_on(finished):
    meanings = {name: said for names, said in legend("nats") for name in names.split(", ")}
    assert set(HEADS[1:]) < meanings.keys()
    assert all("on the held-out tokens" in meanings[name] for name in ("KL", "perplexity", "top-1"))
    assert "on the calibration tokens" in meanings["predicted"]
    inspected, card = run("inspect", finished), (finished / "README.md").read_text()
    for shown in (inspected, " ".join(card.replace("\\", "").split())):
        for _, said in legend("nats per token"):
            assert " ".join(said.split()[:4]) in shown


def test_counts_of_tokens_are_those_of_the_files(finished):
    ids = load_file(finished / "work" / "calibration.safetensors")
    profile = load_artifact(finished / "work" / "profile.json", ActivationStats)
    both, heldout = sum(part.numel() for part in ids.values()), ids["heldout"]
    told = dict(provenance(gather(finished)))["calibration tokens"]
    assert told == f"{both:,}, the held-out ones among them; {profile.total_tokens:,} profiled"
    # Seven of eight samples are not held out; the first token of a sample is not predicted.
    assert profile.total_tokens == 7 * 16
    assert gather(finished).written.heldout_tokens == heldout.numel() - len(heldout)


def test_what_nobody_asked_for_is_no_row(finished):
    facts = gather(finished)
    rows = dict(provenance(facts))
    assert {"model", "plan", "quantizer", "versions"} <= rows.keys()
    assert not {"revision", "keep", "engine"} & rows.keys()
    assert not {"", "none", "None", "[]"} & set(rows.values())
    settings = {**facts.record.provenance.settings, "engine": "vllm", "keep": ["a", "b"]}
    record = replace(facts.record, provenance=replace(MADE_FROM, settings=settings))
    asked = dict(provenance(replace(facts, record=record)))
    assert (asked["engine"], asked["keep"]) == ("vllm", "a, b")


def test_one_of_a_thing_is_in_the_singular():
    facts = make_facts(layers=1, experts=1)
    said = " ".join((*coverage(facts), *warnings(facts), *few_tokens(1)))
    for words in ("in 1 layer, those of 1 expert among", "1 tensor, router", "1 held-out token "):
        assert words in said
    assert not re.search(r"\b1 (linear |held-out |fitting )?[a-z]+s\b", said)


def test_neighbours_of_a_plan_for_an_engine_keep_its_rules():
    facts = make_facts(bits=4.4)
    allocate = replace(facts.origin.allocate, engine="vllm", bits=4.4)
    free = loss_curve(facts).neighbours
    curve = loss_curve(replace(facts, origin=replace(facts.origin, allocate=allocate)))
    assert "inside the rules of vLLM" in curve.rule
    assert sum(point.loss for point in curve.neighbours[-3:]) > sum(p.loss for p in free[-3:])


def test_what_is_said_of_the_bound_is_about_plans_under_the_same_rules():
    facts = make_facts()
    assert f"under the same rules has a predicted loss below {facts.plan.bound:.4g}" in _bound(
        facts
    )
    forced = replace(facts.plan, description="uniform w4a16_g128_sym")
    assert _bound(replace(facts, plan=forced)) == ""
    by_layer = replace(facts.origin.allocate, objective="mxmoe", r=1.0)
    assert _bound(replace(facts, origin=replace(facts.origin, allocate=by_layer))) == ""


def test_a_page_of_a_plan_that_loses_nothing_is_written(tmp_path):
    model = save_tiny(tmp_path / "model", dtype=torch.bfloat16)
    mxq.quantize(
        model, output=tmp_path / "out", bits=16, schemes="bf16", calibration=token_ids(9, 16)
    )
    run("report", tmp_path / "out")
    assert "All predicted losses are 0." in (tmp_path / "out" / "report.html").read_text()


def test_the_card_says_what_the_rules_of_an_engine_cost():
    facts = make_facts()
    free = facts.plan.predicted_loss / 1.25
    plan = replace(facts.plan, engine="vllm", unrestricted_loss=free)
    cost = f"{facts.plan.predicted_loss - free:.6g}"
    assert f"The rules of vllm cost {cost} nats per token (+25.0%)" in model_card(
        replace(facts, plan=plan)
    )
    assert "The rules of" not in model_card(facts)


def test_a_model_of_the_hub_is_the_base_model_of_the_card():
    fields = yaml.safe_load(model_card(make_facts(name='org/it\'s "x": y')).split("---\n")[1])
    assert fields["base_model"] == 'org/it\'s "x": y'
    assert fields["base_model_relation"] == "quantized"


def test_names_in_a_card_are_no_markup():
    card = model_card(make_facts(name="a|b](http://x) <script> `c\n# d"))
    body = card.split("---\n", 2)[2]
    prose = re.sub(r"(`{3,})bash\n.*?\n\1\n", "", body, flags=re.DOTALL)
    assert r"a\|b\](http://x) \<script\> \`c # d" in prose
    assert not re.search(r"(?<!\\)<script", prose)
    rows = [row for row in prose.splitlines() if row.startswith("| model ")]
    assert len(re.findall(r"(?<!\\)\|", rows[0])) == 3


def test_a_finished_run_leaves_an_edited_card_and_a_page_alone(line, out):
    (out / "README.md").write_text("mine")
    run("report", out)
    before = files_of(out)
    assert {"report.html", "README.md"} <= before.keys()
    run(*line, "--output", out, "--work", out / "work")
    assert files_of(out) == before


def test_what_described_another_checkpoint_goes_with_it(line, out):
    run("report", out)
    old = files_of(out)
    line = [*line, "--output", out, "--work", out / "work", "--overwrite", "--no-guard"]
    line[line.index("3.5")] = "5"
    run(*line)
    new = files_of(out)
    assert "report.html" not in new
    assert new["README.md"] != old["README.md"]
    assert "--bits 5" in new["README.md"].decode()
    assert load_artifact(out / "mxq_origin.json", Origin).allocate.bits == 5


# The terminal and the page


def test_inspect_shows_the_facts(out):
    shown = run("inspect", out)
    facts = gather(out)
    assert f"{facts.plan.bits_per_weight:.4f} bits per weight" in shown
    assert "Bits of routed experts" in shown
    assert "Measured on 15 held-out tokens only: differences between the plans" in shown
    assert command(facts.origin).split()[-4] in shown


def test_the_maps_of_the_terminal_are_the_bits_of_the_plan():
    facts = make_facts(layers=2, experts=3)
    shown = [printed(table) for table in bits_maps(facts, 100)]
    rows = [
        "".join(
            str(cell.scheme.w_bits)
            for cell in facts.cells
            if cell.layer == 1 and cell.column == f"experts.{name}"
        )
        for name in ("gate", "up", "down")
    ]
    [line] = [text for text in shown[0].splitlines() if text.split()[1:2] == ["1"]]
    assert [word for word in line.split() if word.isdigit()] == ["1", *rows]
    queries = [cell for cell in facts.cells if cell.column == "self_attn.q_proj"]
    assert "".join(str(cell.scheme.w_bits) for cell in queries) in shown[1]


def test_maps_of_many_experts_fit_the_terminal():
    for table in bits_maps(make_facts(layers=100, experts=128), 80):
        text = printed(table, width=80)
        assert "the mean of" in text
        assert "…" not in text


def printed(table, width=100):
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_report_writes_one_file_beside_the_checkpoint(out):
    before = files_of(out)
    assert "Written to" in run("report", out)
    after = files_of(out)
    assert after.keys() - before.keys() == {"report.html"}
    assert all(after[name] == before[name] for name in before)
    run("report", out)  # its own page is replaced
    assert not re.findall(rb"(?:src|href)=[\"']?https?:", after["report.html"])


def test_report_does_not_replace_a_file_of_another_kind(out, tmp_path):
    mine = tmp_path / "mine.html"
    mine.write_text("mine")
    assert "no page of mxq report" in run("report", out, "-o", mine, status=1)
    assert "config.json is there and no page" in run(
        "report", out, "-o", out / "config.json", status=1
    )
    assert "is a folder; give a file" in run("report", out, "-o", tmp_path, status=1)
    assert mine.read_text() == "mine"


def test_times_of_the_parts_add_up_to_the_time_of_the_plan(finished):
    facts = gather(finished)
    times = step_times(facts)
    assert times.total_us == pytest.approx(facts.plan.predicted_latency_us)
    assert {layer for layer, _ in times.us} == {0, 1}
    assert "H200" in times.source
    assert not [note for note in times.notes if "prices have changed" in note]


def test_the_curve_passes_through_the_plan_and_names_the_uniform_ones(finished):
    facts = gather(finished)
    curve = loss_curve(facts)
    assert curve.plan.loss == facts.plan.predicted_loss
    assert [point.label for point in curve.uniform] == MENU.split(",")
    line = sorted([*curve.neighbours, curve.plan], key=lambda point: point.block_bytes)
    assert len(curve.neighbours) >= 6
    assert all(a.loss >= b.loss for a, b in pairwise(line))


@pytest.mark.parametrize("low", [1e-9, 1.05e-4, 0.37, 8.9])
@pytest.mark.parametrize("ratio", [1.74, 3, 10, 150, 1e6])
def test_a_logarithmic_axis_has_ticks_to_read_values_by(low, ratio):
    axis = log_axis([log10(low), log10(low * ratio)])
    values = axis["tickvals"]
    assert 3 <= len(values) <= 9
    assert all(low <= value * 1.0001 and value <= low * ratio * 1.0001 for value in values)
    assert [float(text) for text in axis["ticktext"]] == pytest.approx(values)


def test_little_text_and_cold_experts_are_warned_of(finished):
    found = " ".join(warnings(gather(finished)))
    assert "Measured on 15 held-out tokens only" in found
    assert "got fewer than 64 fitting tokens" in found
