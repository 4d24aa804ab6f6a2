"""``mxq.quantize`` on a tiny model: budgets, own data and parts, the guard, what is reused."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import logits_of, save_tiny, token_ids
from transformers import AutoModelForCausalLM

import mxq
from mxq import finish, pipeline
from mxq.artifacts import Allocation
from mxq.config import AllocateOptions
from mxq.heldout import MeasuredLoss
from mxq.profiling.sensitivity import Sensitivity
from mxq.quantizers import quantize_rtn
from mxq.scheme import Scheme
from mxq.search.problem import Solution
from mxq.storage import load_artifact
from mxq.workspace import make_tokens

MENU = "w2a16_g32_asym,w3a16_g32_asym,w4a16_g32_asym,w8a16_g32_asym"
IDS = token_ids(9, 16, seed=7)
TEXTS = ["It was a bright cold day in April. " * 4, "The clocks were striking thirteen. " * 4]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def work(model, tmp_path_factory):
    """A work folder whose measurement the tests below share, with IDS and MENU."""
    folder = tmp_path_factory.mktemp("work")
    mxq.quantize(model, output=folder / "first", bits=4, work=folder / "work", **FAST)
    return folder / "work"


FAST = {"calibration": IDS, "schemes": MENU, "rotation": "off"}
"""Everything but the budget: nine samples, of which one is held out."""


@pytest.fixture
def quantized(model, work, tmp_path):
    """``quantized(**budget)``: the result of a run that starts from the shared measurement."""
    return lambda **options: mxq.quantize(
        model, output=tmp_path / "out", **{"work": work, **FAST, **options}
    )


def schemes_by_site(result, projection=None):
    found = {}
    for block in result.blocks:
        if projection is None or block.projection in projection:
            found.setdefault(block.site, set()).add(result.plans["plan"].schemes[block.name])
    return found


# Budgets


@pytest.mark.parametrize("bits", [2.8, 3.3, 4.7, 6.0])
def test_the_bits_of_the_plan_are_just_within_the_budget(quantized, bits):
    plan = quantized(bits=bits, guard=False).plans["plan"]
    assert plan.bits_per_weight <= bits
    # A step of one block from one scheme to the next is 1/30 bit here, and every step gains.
    assert plan.bits_per_weight > 0.98 * bits
    counted = sum(
        plan.schemes[block.name].storage_bits(block.out_features, block.in_features)
        for block in quantized(bits=bits, guard=False, overwrite=True).blocks
    )
    assert plan.storage_bits == counted


def test_the_size_of_the_checkpoint_is_just_within_the_size_asked_for(quantized):
    asked = 300_000
    result = quantized(size=asked, guard=False)
    files = [*result.folder.glob("*.safetensors"), *result.folder.glob("*.index.json")]
    written = sum(path.stat().st_size for path in files)
    # Entries of headers and index are counted at 300 bytes; in a model this small they are a tenth.
    assert 0.9 * asked < written <= asked


def test_a_size_is_given_in_units_too(quantized):
    result = quantized(size="300kB", guard=False)
    assert sum(path.stat().st_size for path in result.folder.glob("*.safetensors")) <= 300_000


def test_a_size_that_the_rest_of_the_model_exceeds_says_so(quantized, tmp_path):
    with pytest.raises(ValueError, match=r"--size is 9,000 bytes, but what stays in its type take"):
        quantized(size=9000)
    assert not (tmp_path / "out").exists()


def test_an_infeasible_budget_says_what_the_cheapest_plan_needs(quantized, tmp_path):
    # 2 bits, a 16-bit scale and a 2-bit zero for every 32 weights: 2 + 18/32.
    with pytest.raises(ValueError, match=r"1.5 bits per weight .* cheapest plan needs 2.5625 "):
        quantized(bits=1.5)
    assert not (tmp_path / "out").exists()


def test_a_forced_uniform_plan_is_what_is_written(quantized):
    result = quantized(plan="uniform:w3a16_g32_sym")
    assert set(result.plans["plan"].schemes.values()) == {Scheme.parse("w3a16_g32_sym")}
    assert list(result.plans) == ["plan"]
    assert result.plans["plan"].bits_per_weight == 3 + 16 / 32


def test_two_budgets_at_once_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match="give one of --bits, --size or --plan; found --bits and"):
        mxq.quantize(model, output=tmp_path, bits=3, size="1MB")


# Granularity


def test_layer_granularity_gives_one_scheme_to_a_site(quantized):
    result = quantized(bits=4, granularity="layer", guard=False)
    assert all(len(schemes) == 1 for schemes in schemes_by_site(result).values())
    assert len(set(result.plans["plan"].schemes.values())) > 1


def test_block_granularity_mixes_schemes_inside_a_site(quantized):
    result = quantized(bits=4, guard=False)
    assert max(len(schemes) for schemes in schemes_by_site(result).values()) > 1


def test_tied_gate_and_up_share_their_scheme(quantized):
    plan = quantized(bits=4, tie_gate_up=True, guard=False).plans["plan"].schemes
    gates = [name for name in plan if name.endswith(("gate", "gate_proj"))]
    assert len(gates) == 10
    for name in gates:
        assert plan[name] == plan[name.replace(".gate", ".up")], name


def test_untied_gate_and_up_differ_somewhere(quantized):
    plan = quantized(bits=4, guard=False).plans["plan"].schemes
    gates = [name for name in plan if name.endswith(("gate", "gate_proj"))]
    assert any(plan[name] != plan[name.replace(".gate", ".up")] for name in gates)


# Calibration and parts of the caller's own


CALIBRATIONS = {
    "texts": TEXTS,
    "rows of ids": IDS,
    "a stream of ids": IDS.flatten().tolist(),
    "domains": {"prose": TEXTS, "ids": IDS.flatten()},
}


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_calibration_can_be(name, model, tmp_path):
    options = {"samples": 4, "seqlen": 16, "schemes": "w4a16_g32_asym,w8a8_g32_sym", "bits": 5}
    result = mxq.quantize(
        model, output=tmp_path / "out", calibration=CALIBRATIONS[name], quantizer="rtn",
        sensitivity="output_mse", **options,
    )  # fmt: skip
    assert (result.folder / "config.json").is_file()
    domains = {"domains": {"prose", "ids"}}.get(name, {"own data"})
    assert set(result.profile.domains) - {"spare"} == domains


def test_a_quantizer_of_the_callers_own_is_given_one_matrix_at_a_time(model, tmp_path):
    seen = []

    def own(w_NK, scheme, hessian_KK):
        seen.append((tuple(w_NK.shape), tuple(hessian_KK.shape)))
        return quantize_rtn(w_NK, scheme, None)

    result = mxq.quantize(model, output=tmp_path / "out", bits=4, quantizer=own, **FAST)
    assert set(seen) == {((32, 64), (64, 64)), ((64, 32), (32, 32))}
    # A block is given to round to nearest on the inputs' moments where that measures better.
    counted = result.packs[result.written].quantizers
    assert set(counted) <= {"own", "rtn"}
    assert sum(counted.values()) == len(result.blocks)


def test_a_sensitivity_of_the_callers_own_decides_the_plan(model, tmp_path):
    def only_downs(probe, z_hat_TN, context):
        if not probe.block.endswith(("down", "down_proj")):
            return 0.0
        return float((z_hat_TN - probe.z_TN).square().sum())

    result = mxq.quantize(
        model,
        output=tmp_path / "out",
        bits=3.2,
        sensitivity=Sensitivity(only_downs, "whims"),
        **FAST,
    )
    plan = result.plans["plan"].schemes
    bits = {name.rsplit(".", 1)[1].removesuffix("_proj"): [] for name in plan}
    for name, scheme in plan.items():
        bits[name.rsplit(".", 1)[1].removesuffix("_proj")].append(scheme.w_bits)
    assert set(bits["gate"] + bits["up"]) == {2}
    assert min(bits["down"]) > 2
    assert result.unit == "whims"


def test_an_unknown_part_is_refused_with_the_menu(model, tmp_path):
    for option in ("quantizer", "sensitivity"):
        with pytest.raises(ValueError, match=f"{option} 'magic' is unknown; choose one of "):
            mxq.quantize(model, output=tmp_path / "out", bits=4, **{**FAST, option: "magic"})


def test_a_solver_of_the_callers_own_makes_the_plan_each_time(quantized):
    calls = []

    def dearest(problem, *, gap=0.0, time_limit_s=0.0):
        calls.append(problem)
        cost = np.where(np.isfinite(problem.loss), problem.budgets[0].cost, -np.inf)
        # As many blocks as the budget allows get their dearest scheme, the others the cheapest.
        choice = np.argmin(np.where(cost < 0, np.inf, cost), axis=1)
        for block in range(len(choice)):
            dear = choice.copy()
            dear[block] = np.argmax(cost[block])
            choice = dear if problem.is_feasible(dear) else choice
        return Solution(choice, problem.total_loss(choice), 0.0, proven=False)

    for run in range(2):
        plan = quantized(bits=4, solver=dearest, guard=False, overwrite=True).plans["plan"]
        assert len(calls) == run + 1
    assert {scheme.w_bits for scheme in plan.schemes.values()} == {2, 8}
    assert not plan.proven


@pytest.mark.parametrize(
    "schemes",
    [
        {"*": "w2a16_g32_asym,w3a16_g32_asym", "down": ["w4a16_g32_asym", "w8a16_g32_asym"]},
        "w2a16_g32_asym,w3a16_g32_asym; down = w4a16_g32_asym,w8a16_g32_asym",
    ],
    ids=["mapping", "text"],
)
def test_a_projection_has_candidates_of_its_own(quantized, tmp_path, schemes):
    result = quantized(bits=3.6, schemes=schemes, work=tmp_path / "work", guard=False)
    table = pipeline.Workspace(tmp_path / "work").sensitivity()
    for block, row in zip(table.blocks, table.loss, strict=True):
        offered = {s.w_bits for s, loss in zip(table.schemes, row, strict=True) if loss < np.inf}
        assert offered == ({4, 8} if block.projection == "down" else {2, 3}), block.name
    chosen = {(b.projection, result.plans["plan"].schemes[b.name].w_bits) for b in result.blocks}
    assert {("down", 4), ("gate", 2), ("gate", 3)} <= chosen


def test_candidates_of_a_projection_that_no_block_has_are_refused(quantized):
    with pytest.raises(ValueError, match=r"projection 'gate_up', which no block has; .* down, .*"):
        quantized(bits=4, schemes={"*": MENU, "gate_up": "w8a16_g32_asym"})


def test_ends_of_steps_go_to_the_log(quantized, tmp_path, caplog):
    caplog.set_level("INFO", logger="mxq")
    quantized(plan="uniform:w3a16_grow_sym", work=tmp_path / "work")
    said = {record.getMessage() for record in caplog.records}
    assert {"measure: forward, all 2 done", "pack plan: pack, all 2 done"} <= said


# The guard


@pytest.mark.parametrize("better", ["plan", "uniform"])
def test_the_guard_writes_the_plan_that_measured_better(quantized, monkeypatch, better):
    def measured(adapter, heldout, folders, progress, store):
        assert set(folders) == {"plan", "uniform"}
        return {
            name: MeasuredLoss(15, 1.0, 1.1, 0.1 if name == better else 0.2, 0.9)
            for name in folders
        }

    monkeypatch.setattr(finish, "measure_loss", measured)
    result = quantized(bits=4.6)
    assert result.written == better
    stored = load_artifact(result.folder / "mxq_plan.json", Allocation)
    assert stored == result.plans[better]
    in_files = json.loads((result.folder / "config.json").read_text())["quantization_config"]
    used = {str(scheme) for scheme in stored.schemes.values()}
    assert set(in_files["schemes"]) == used
    assert (len(used) == 1) is (better == "uniform")
    report = json.loads((result.folder / "mxq_report.json").read_text())
    assert {name: facts["written"] for name, facts in report.items()} == {
        "plan": better == "plan",
        "uniform": better == "uniform",
    }


@pytest.mark.parametrize("schemes", [MENU, "w4a8_g32_asym,w8a8_g32_sym"])
def test_the_measured_loss_is_that_of_the_checkpoint_in_the_folder(
    schemes, quantized, model, tmp_path
):
    work = tmp_path / "work"
    result = quantized(bits=5, schemes=schemes, work=work)
    kept = result.losses[result.written]
    held = pipeline.Workspace(work).tokens().heldout_ids
    p, q = (
        logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), held)
        .double()[:, :-1]
        .log_softmax(-1)
        for folder in (model, result.folder)
    )
    assert kept.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    labels = held[:, 1:, None]
    assert kept.nll == pytest.approx(float(-q.gather(-1, labels).mean()), rel=1e-5)
    assert kept.original_nll == pytest.approx(float(-p.gather(-1, labels).mean()), rel=1e-5)
    assert kept.tokens == labels.numel()


def test_nothing_but_the_result_is_left_in_the_folders(quantized, work):
    result = quantized(bits=4.6)
    assert sorted(path.name for path in work.iterdir()) == [
        "allocation.json",
        "calibration.safetensors",
        "plans.json",
        "profile.json",
        "sensitivity.json",
        "settings.json",
    ]
    names = {path.name for path in result.folder.iterdir()}
    assert {"config.json", "mxq_plan.json", "mxq_report.json", "tokenizer.json"} <= names
    assert not {name for name in names if name.startswith((".", "packed"))}


# The output folder


def test_a_folder_with_files_is_not_written_to(quantized, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty \(it holds notes.txt\); choose another"):
        quantized(bits=4)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_overwrite_replaces_a_checkpoint(quantized):
    first = quantized(bits=3, guard=False)
    before = (first.folder / "config.json").read_bytes()
    second = quantized(bits=6, guard=False, overwrite=True)
    assert (second.folder / "config.json").read_bytes() != before
    AutoModelForCausalLM.from_pretrained(second.folder)


# Resuming


@pytest.fixture
def no_measure(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("measured again")

    monkeypatch.setattr(pipeline, "measure", refuse)


def test_a_second_run_reuses_the_measurement(quantized, no_measure):
    assert quantized(bits=3).plans["plan"].bits_per_weight <= 3


@pytest.mark.parametrize(
    "change",
    [
        {"calibration": token_ids(9, 16, seed=8)},
        {"schemes": "w2a16_g32_asym,w4a16_g32_asym"},
        {"sensitivity": "output_mse"},
        {"quantizer": "rtn"},
        {"rotation": "on"},
        {"scope": "all"},
        {"keep": ["shared_expert.up_proj"]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_run_with_other_inputs_measures_again(change, quantized, no_measure):
    with pytest.raises(AssertionError, match="measured again"):
        quantized(bits=4, **change)


def test_a_refused_run_leaves_the_work_of_the_other_as_it_was(model, tmp_path):
    options = {"output": tmp_path / "out", "bits": 4, **FAST, "quantizer": "rtn"}
    mxq.quantize(model, **options)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"another run, made from other calibration text; choose"):
        mxq.quantize(model, **{**options, "calibration": token_ids(9, 16, seed=8)})
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before
    again = {**options, "calibration": token_ids(9, 16, seed=8), "overwrite": True}
    assert mxq.quantize(model, **again).profile.provenance.calibration_digest


def test_a_damaged_profile_of_a_finished_run_is_made_anew(model, tmp_path):
    options = {"output": tmp_path / "out", "bits": 4, **FAST, "quantizer": "rtn"}
    first = mxq.quantize(model, **options)
    (tmp_path / "out" / "work" / "profile.json").write_text("{")
    assert mxq.quantize(model, **options).losses == first.losses


def test_a_plan_is_not_solved_on_losses_of_other_text(model, tmp_path):
    mxq.quantize(model, output=tmp_path / "out", bits=4, **FAST, quantizer="rtn")
    work = pipeline.Workspace(tmp_path / "out" / "work")
    tokens = make_tokens(token_ids(9, 16, seed=8), token_ids(1, 16))
    work.save_tokens(tokens)
    with pytest.raises(ValueError, match="were measured on another model or other calibration"):
        pipeline.plan_again(work, AllocateOptions(bits=3))


def test_a_changed_model_is_measured_again(work, tmp_path, no_measure):
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(AssertionError, match="measured again"):
        mxq.quantize(other, output=tmp_path / "out", bits=4, work=work, **FAST)


# Damaged models


def test_a_weight_that_is_nan_is_named(tmp_path):
    model = save_tiny(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.experts.2.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers.0.experts.2.up: 1 of 2048 values are NaN"):
        mxq.quantize(model, output=tmp_path / "out", bits=4, **FAST)
    assert [path.name for path in (tmp_path / "out").glob("*") if path.name != "work"] == []


def test_the_models_own_folder_is_no_output_even_with_overwrite(tmp_path):
    folder = save_tiny(tmp_path / "model")
    before = (folder / "config.json").read_bytes()
    with pytest.raises(ValueError, match="the model's own folder; give another"):
        mxq.quantize(folder, output=folder, bits=4, overwrite=True, **FAST)
    assert (folder / "config.json").read_bytes() == before
