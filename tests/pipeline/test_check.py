"""``mxq check`` and ``--engine`` on folders: of mxq, exported by hand in other formats, damaged."""

import json
import shutil

import numpy as np
import pytest
from checkpoints import edit_config, plan_of
from safetensors.numpy import load_file, save_file
from tiny import save_tiny
from typer.testing import CliRunner

import mxq
from mxq.artifacts import Allocation
from mxq.cli import app
from mxq.storage import load_artifact
from mxq.workspace import Workspace

FEW = {"calibration": "demo", "samples": 6, "seqlen": 16, "quantizer": "rtn"}


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def checked(folder, *options, engine="vllm"):
    """Status and findings of ``mxq check --json``: identifiers of errors and of warnings."""
    done = run("check", folder, "--engine", engine, "--json", *options)
    assert done.exit_code in (0, 1), done.output
    document = json.loads(done.stdout)
    errors = {f["rule"] for f in document["findings"] if f["severity"] == "error"}
    assert done.exit_code == (1 if errors else 0)
    assert document["errors"] == len(errors)
    assert document["was_run_in_the_engine"] is False
    return errors, {f["rule"] for f in document["findings"]} - errors


def fails(*arguments):
    done = run(*arguments)
    assert done.exit_code == 1, done.output
    assert "Traceback" not in done.output
    assert done.stdout == ""
    return " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    # Wide enough that two ranks get groups of 32.
    return save_tiny(tmp_path_factory.mktemp("model"), moe_intermediate_size=64)


@pytest.fixture(scope="module")
def result(model, tmp_path_factory):
    """A run for vLLM on two ranks."""
    return mxq.quantize(
        model,
        output=tmp_path_factory.mktemp("run") / "out",
        bits=4.4,
        engine="vllm",
        tensor_parallel=2,
        sensitivity="output_mse",
        **FEW,
    )


@pytest.fixture(scope="module")
def free(model, tmp_path_factory):
    """A run for no engine, its inputs rotated."""
    return mxq.quantize(
        model,
        output=tmp_path_factory.mktemp("run") / "out",
        bits=4.0,
        rotation="on",
        guard=False,
        sensitivity="output_mse",
        schemes="w2a16_g32_asym,w4a16_g32_asym,w8a16_g32_sym",
        **FEW,
    )


def test_a_run_for_an_engine_writes_a_checkpoint_that_keeps_its_rules(result):
    assert checked(result.folder, "--tp", 2)[0] == set()
    assert checked(result.folder / "work", "--tp", 2)[0] == set()
    for written in result.plans.values():
        assert written.rotated_layers == ()
        assert (written.engine, written.tensor_parallel) == ("vllm", 2)
    assert plan_of(result.folder)["rotated"] == []
    settings = Workspace(result.folder / "work").settings().measure
    assert settings.rotation == "off"
    # The shared expert has 32 inputs, 16 on a rank: only whole rows serve it everywhere.
    assert {str(scheme) for scheme in settings.schemes} == {"w4a16_grow_asym"}


def test_the_report_says_what_the_rules_cost(result):
    report = json.loads((result.folder / "mxq_report.json").read_text())
    chosen = result.plans["plan"]
    assert report["plan"]["engine"] == "vllm"
    assert report["plan"]["engine_cost"] == chosen.engine_cost >= 0
    assert report["plan"]["predicted_loss_without_engine"] == chosen.unrestricted_loss


def test_a_run_for_no_engine_reports_none(free):
    report = json.loads((free.folder / "mxq_report.json").read_text())
    assert "engine" not in report["plan"]
    assert free.plans["plan"].engine is None


def test_a_free_run_breaks_rules_and_the_table_says_how_to_mend_it(free):
    errors, warnings = checked(free.folder)
    assert {"no-rotation", "expert-formats"} <= errors
    assert "own-format" in warnings
    shown = run("check", free.folder, "--engine", "vllm")
    assert shown.exit_code == 1
    text = " ".join(shown.stdout.replace("│", " ").split())
    for words in (
        "vLLM 0.33.0",
        "error",
        "no-rotation",
        "Remedy: --rotation off when measuring",
        "Not checked, for want of an exported configuration: ignored, expert-names, grouped, "
        "targets-match.",
        "Nothing was run in vLLM. The rules are those of 0.33.0",
    ):
        assert words in text


def test_allocate_refuses_a_rotated_work_folder_for_an_engine(free):
    message = fails("allocate", free.folder / "work", "--bits", 5, "--engine", "vllm")
    assert "layers 0, 1 were measured rotated, which vLLM does not read" in message
    assert "mxq measure --rotation off" in message


def test_allocate_for_another_engine_shows_the_price_and_keeps_its_rules(model, tmp_path):
    work, schemes = tmp_path / "work", "w4a16_g32_sym,w8a16_g32_sym,w4a16_g32_asym"
    line = ("measure", model, "--work", work, "--schemes", schemes, "--rotation", "off")
    text = ("--calibration", "demo", "--samples", 6, "--seqlen", 16, "--quantizer", "rtn")
    done = run(*line, *text, "--sensitivity", "output_mse")
    assert done.exit_code == 0, done.output
    shown = run("allocate", work, "--bits", 6, "--engine", "transformers")
    assert shown.exit_code == 0, shown.output
    solved = Workspace(work).allocation()
    assert f"The rules of transformers cost {solved.engine_cost:.6g}" in shown.stdout
    assert checked(work, engine="transformers")[0] == set()
    inside = run("allocate", work, "--bits", 6).stdout
    assert "The rules of" not in inside
    assert checked(work, engine="transformers")[0] != set()
    assert load_artifact(work / "allocation.json", Allocation).engine is None


def test_another_engine_is_another_run(result, model, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(result.folder, output)
    again = {"bits": 4.4, "engine": "vllm", "sensitivity": "output_mse", **FEW}
    assert mxq.quantize(model, output=output, tensor_parallel=2, **again).written == result.written
    with pytest.raises(ValueError, match=r"another run, .*tensor_parallel: 2 -> 1"):
        mxq.quantize(model, output=output, **again, schemes="w4a16_grow_asym")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "tgi"], "engine 'tgi' is unknown; choose one of vllm, sglang"),
        (["--tp", "2"], "--tp needs --engine"),
        (["--engine", "vllm", "--tp", "0"], "--tp is 0; it must be at least 1"),
        (["--engine", "trtllm", "--tp", "2"], "no rule of trtllm about tensor parallelism"),
        (["--engine", "vllm", "--rotation", "on"], "--rotation on does not go with --engine vllm"),
        (
            ["--engine", "vllm", "--schemes", "w3a16_g32_asym,w4a16_g32_asym"],
            "vLLM 0.33.0 takes w3a16_g32_asym for no block of this model; leave them out",
        ),
        (["--engine", "vllm", "--schemes", "w3a16_g32_asym"], "takes none of w3a16_g32_asym for"),
        (
            ["--engine", "vllm", "--tp", "5"],
            "takes no scheme on 5 ranks: they do not divide",
        ),
        (["--engine", "sglang", "--bits", "3"], "but the cheapest plan needs 4."),
        (
            ["--engine", "vllm", "--schemes", "w4a16_g32_sym;down=w8a16_g32_sym"],
            "no scheme in common",  # vLLM has one format for all experts of a layer
        ),
    ],
)
def test_a_request_that_the_engine_cannot_meet_is_refused_before_anything(
    options, message, model, tmp_path
):
    line = ("quantize", model, "--output", tmp_path / "out", "--calibration", "demo")
    bits = () if "--bits" in options else ("--bits", 5)
    assert message in fails(*line, *bits, *options)
    assert not (tmp_path / "out").exists()


# A folder of compressed-tensors, written by hand

HIDDEN, WIDTH, SITE = 128, 128, "model.layers.0.mlp.experts"
ATTENTION = "model.layers.0.self_attn"


def packed(name, n, k, bits=4):
    """Tensors of a packed linear; the values do not matter here."""
    return {
        f"{name}.weight_packed": np.zeros((n, -(-k * bits // 32)), np.int32),
        f"{name}.weight_scale": np.ones((n, k // 128), np.float16),
        f"{name}.weight_shape": np.array([n, k], np.int64),
    }


def dense(name, n=4, k=HIDDEN):
    return {f"{name}.weight": np.ones((n, k), np.float16)}


@pytest.fixture
def exported(tmp_path):
    """Two experts, attention of which v_proj is unquantized, a router and a head."""
    tensors = {f"{SITE[:-8]}.norm.weight": np.ones(HIDDEN, np.float16)}
    for expert in (0, 1):
        for name in ("gate_proj", "up_proj", "down_proj"):
            tensors |= packed(f"{SITE}.{expert}.{name}", HIDDEN, WIDTH)
    for name in ("q_proj", "k_proj", "v_proj"):
        tensors |= packed(f"{ATTENTION}.{name}", HIDDEN, HIDDEN, 8)
    tensors |= dense("model.layers.0.mlp.gate") | dense("lm_head") | dense("model.embed_tokens")
    save_file(tensors, tmp_path / "model.safetensors")
    weights = {
        "num_bits": 8, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128,
        "actorder": None,
    }  # fmt: skip
    groups = {
        "group_0": {"targets": ["re:.*self_attn.*_proj$"], "weights": weights},
        "group_1": {"targets": ["re:.*mlp.experts.*"], "weights": {**weights, "num_bits": 4}},
    }
    config = {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "ignore": ["lm_head", "re:.*mlp\\.gate$"], "config_groups": groups,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    return tmp_path


def edit(folder, change):
    edit_config(folder, lambda config: change(config["quantization_config"]))


@pytest.mark.parametrize("engine", ["vllm", "sglang", "transformers"])
def test_an_exported_folder_that_keeps_the_rules_passes(exported, engine):
    assert checked(exported, engine=engine) == (set(), set())


def set_group(place, **changes):
    return lambda config: config["config_groups"][f"group_{place}"]["weights"].update(changes)


def repack(folder, part, bits, *, zeros=False):
    """Give the packed linears whose name has that part other bits, and zero points."""
    tensors = load_file(folder / "model.safetensors")
    for key in [key for key in tensors if part in key and key.endswith(".weight_packed")]:
        name = key.removesuffix(".weight_packed")
        tensors |= packed(name, *tensors[f"{name}.weight_shape"].tolist(), bits)
        if zeros:
            tensors[f"{name}.weight_zero_point"] = np.zeros((1, 1), np.int32)
    save_file(tensors, folder / "model.safetensors")


def set_targets(place, *targets):
    return lambda config: config["config_groups"][f"group_{place}"].update(targets=list(targets))


@pytest.mark.parametrize(
    ("change", "engine", "rules"),
    [
        (lambda c: c.update(ignore=["lm_head"]), "vllm", set()),  # no target is of the router
        (lambda c: c.update(ignore=[]), "vllm", set()),
        (set_targets(0, "Linear"), "vllm", set()),  # what is not quantized is ignored
        (set_group(1, actorder="group"), "vllm", {"activation-order"}),
        (set_group(1, actorder="static"), "vllm", set()),
        (set_targets(0, "re:.*self_attn.[qk]_proj$"), "vllm", {"grouped"}),
        (
            lambda c: c["ignore"].append("re:.*v_proj$"),
            "vllm",
            {"grouped"},
        ),
        (set_targets(1, "Linear"), "transformers", set()),
        (set_targets(0, f"{ATTENTION}.q_proj", "re:.*self_attn.*"), "transformers", set()),
        (set_targets(1, "re:.*mlp.e.perts.*"), "transformers", {"group-of-experts"}),
        (lambda c: None, "trtllm", {"formats", "one-group"}),
    ],
)
def test_a_configuration_that_breaks_a_rule_is_found(exported, change, engine, rules):
    edit(exported, change)
    assert checked(exported, engine=engine)[0] == rules


def test_a_router_that_a_target_claims_and_nothing_ignores_is_found(exported):
    edit(exported, set_targets(1, "Linear"))
    assert checked(exported)[0] == set()
    edit(exported, lambda config: config.update(ignore=["lm_head"]))
    done = run("check", exported, "--engine", "vllm", "--json")
    (finding,) = (f for f in json.loads(done.stdout)["findings"] if f["severity"] == "error")
    assert (finding["rule"], finding["names"]) == ("ignored", ["model.layers.0.mlp.gate"])


def test_formats_that_an_engine_does_not_take_are_found(exported):
    repack(exported, "experts", 3, zeros=True)
    edit(exported, set_group(1, num_bits=3, symmetric=False))
    assert checked(exported)[0] == {"expert-formats"}
    repack(exported, "experts", 4)
    edit(exported, set_group(1, num_bits=4, symmetric=True))
    repack(exported, "self_attn", 8, zeros=True)
    edit(exported, set_group(0, symmetric=False))
    assert checked(exported, engine="sglang")[0] == {"linear-formats"}


def test_one_expert_of_another_format_is_found(exported):
    repack(exported, "experts.1.", 8)
    other = {**plan_of(exported)["config_groups"]["group_0"], "targets": ["re:.*experts.1.*"]}
    edit(exported, lambda c: c.update(config_groups={"group_2": other, **c["config_groups"]}))
    assert checked(exported)[0] == {"experts-alike"}
    assert "experts-alike-in-the-model" in checked(exported, engine="transformers")[0]


def test_a_part_of_a_fused_linear_that_stays_unquantized_is_found(exported, tmp_path):
    tensors = load_file(exported / "model.safetensors")
    name = f"{ATTENTION}.v_proj"
    kept = {key: value for key, value in tensors.items() if not key.startswith(name)}
    save_file(kept | dense(name, HIDDEN), exported / "model.safetensors")
    edit(exported, lambda config: config["ignore"].append(name))
    assert checked(exported)[0] == {"fused-linears-alike"}


def test_a_target_that_matches_nothing_is_a_warning(exported):
    edit(exported, set_targets(0, "re:.*self_attn.*", "re:.*linear_attn.*"))
    assert checked(exported) == (set(), {"targets-match"})


def test_ranks_that_cut_a_group_are_found(exported):
    assert "tensor-parallel-experts" in checked(exported, "--tp", 2)[0]


def test_a_folder_of_gptq_is_checked_by_its_own_rules(tmp_path):
    tensors = {}
    for name in ("q_proj", "k_proj", "v_proj"):
        tensors[f"{ATTENTION}.{name}.qweight"] = np.zeros((HIDDEN // 8, HIDDEN), np.int32)
        tensors[f"{ATTENTION}.{name}.scales"] = np.ones((HIDDEN // 128, HIDDEN), np.float16)
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    assert checked(tmp_path) == (set(), set())
    edit(tmp_path, lambda c: c.update(desc_act=True))
    assert checked(tmp_path)[0] == {"activation-order"}
    scales = [key for key in tensors if key.endswith("scales")]
    zeros = {k.replace("scales", "qzeros"): np.zeros((1, HIDDEN // 8), np.int32) for k in scales}
    save_file(zeros | tensors, tmp_path / "model.safetensors")
    edit(tmp_path, lambda c: c.update(desc_act=False, sym=False))
    assert checked(tmp_path)[0] == {"gptq-formats"}
    halves = {key: np.ones((HIDDEN // 64, HIDDEN), np.float16) for key in scales}
    save_file({**tensors, **halves}, tmp_path / "model.safetensors")
    edit(tmp_path, lambda c: c.update(sym=True, dynamic={"+:.*[.][qkv]_proj": {"group_size": 64}}))
    assert checked(tmp_path)[0] == {"gptq-fused-names"}
    edit(tmp_path, lambda c: c.update(dynamic={"+:.*[qkv]+_proj": {"group_size": 64}}))
    assert checked(tmp_path) == (set(), set())
    edit(tmp_path, lambda c: c.update(dynamic={"-:.*v_proj": {}, "+:.*": {"group_size": 64}}))
    assert "gptq-packed" in checked(tmp_path)[0]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"num_bits": 8}, "words in a row"),
        ({"group_size": 64}, "1 scale for 128 inputs, expected 2"),
        ({"symmetric": False}, "no zero points"),
    ],
    ids=["bits", "groups", "zeros"],
)
def test_files_that_are_not_what_the_configuration_says_are_named(exported, change, found):
    edit(exported, lambda c: [g["weights"].update(change) for g in c["config_groups"].values()])
    done = run("check", exported, "--engine", "vllm")
    assert done.exit_code == 1
    message = " ".join(done.stderr.split())
    assert found in message
    assert "files and configuration are not of one export" in message


def test_floats_in_words_of_integers_are_no_known_format(exported):
    edit(exported, set_group(0, type="float"))
    assert "unknown-formats" in checked(exported)[1]


def test_a_plain_linear_that_gptq_does_not_skip_is_pointed_at(tmp_path):
    tensors = {f"{ATTENTION}.o_proj.weight": np.zeros((HIDDEN, HIDDEN), np.float16)}
    tensors[f"{ATTENTION}.q_proj.qweight"] = np.zeros((HIDDEN // 8, HIDDEN), np.int32)
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    assert checked(tmp_path) == (set(), {"gptq-ignored"})
    edit(tmp_path, lambda c: c.update(dynamic={"-:.*o_proj": {}}))
    assert checked(tmp_path) == (set(), set())


# What cannot be checked


def test_damaged_and_foreign_folders_are_refused_in_words(exported, tmp_path_factory, model):
    empty = tmp_path_factory.mktemp("empty")
    check = ("--engine", "vllm")
    assert "is neither a checkpoint" in fails("check", empty, *check)
    assert "quant_method 'None'" in fails("check", model, *check)
    assert "choose one of vllm" in fails("check", exported, "--engine", "x")
    (empty / "config.json").write_text("{")
    assert "is not JSON" in fails("check", empty, *check)
    edit(exported, lambda config: config.update(config_groups=[]))
    assert "config_groups is '[]', expected an object" in fails("check", exported, *check)
    edit(exported, lambda config: config.update(quant_method="awq"))
    assert "quant_method 'awq'" in fails("check", exported, *check)
    edit(exported, lambda config: config.update(quant_method="gptq"))
    assert "lacks bits or group_size" in fails("check", exported, *check)
    edit(exported, lambda config: config.update(bits=4, group_size=128))
    assert "is no module of the GPTQ format: it has a weight_packed" in fails(
        "check", exported, *check
    )


def test_weights_that_are_cut_off_are_refused(exported):
    path = exported / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    assert "is not a whole safetensors file" in fails("check", exported, "--engine", "vllm")


def test_a_checkpoint_without_a_planned_weight_is_refused(result, tmp_path):
    folder = shutil.copytree(result.folder, tmp_path / "out")
    edit(folder, lambda plan: plan["linears"].update({"model.layers.9.up": 0}))
    message = fails("check", folder, "--engine", "vllm")
    assert "its files hold no weight of model.layers.9.up" in message


def test_a_work_folder_without_a_plan_says_which_command_is_missing(result, tmp_path):
    work = shutil.copytree(result.folder / "work", tmp_path / "work")
    (work / "allocation.json").unlink()
    assert "allocation.json does not exist; run" in fails("check", work, "--engine", "vllm")
