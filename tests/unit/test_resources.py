"""What a run will need: counted by hand on a small model, and refused where it is not there."""

from dataclasses import replace
from pathlib import Path

import pytest
from tiny import save_tiny, token_ids

import mxq
from mxq import machine, resources
from mxq.choices import measure_settings
from mxq.config import CalibrationOptions, MeasureOptions, ResourceOptions
from mxq.counted import spoken_bytes, spoken_seconds
from mxq.machine import Machine, Rates
from mxq.models.adapter import ModelAdapter
from mxq.models.source import open_source
from mxq.resources import (
    Needs,
    check_needs,
    estimate,
    sizes_of,
    workload,
)
from mxq.scheme import parse_schemes
from mxq.tables import show_needs

RATES = Rates(operations_per_second=1e9, searched_weights_per_second=1e6)
MENU = parse_schemes("w2a16_g32_asym,w4a16_g32_asym")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return ModelAdapter(open_source(save_tiny(tmp_path_factory.mktemp("model"))))


def work_of(adapter, *, limit=0, plans=2, **measured):
    options = MeasureOptions(MENU, **{"rotation": "off", "quantizer": "rtn", **measured})
    settings = measure_settings(adapter, options, None)
    calibration = CalibrationOptions("own", samples=16, seqlen=8)
    return workload(calibration, settings, ResourceOptions(limit), plans=plans, bits=4.0)


# Two layers of width 64, four experts of width 32 and a shared one, 257 tokens of vocabulary.
EXPERTS = 4 * 3 * 64 * 32
SHARED = 3 * 64 * 32


def test_sizes_are_those_of_the_module_tree(adapter):
    sizes = sizes_of(adapter)
    attention = 64 * (64 + 2 * 32 + 64) + 64 + 2 * 32  # q, k, v, o, and the biases of q, k, v
    routing = 4 * 64 + 64  # the router, and the gate of the shared expert
    assert sizes.layer_elements == (EXPERTS + SHARED + attention + routing + 2 * 64,) * 2
    assert sizes.outside_elements == 2 * 257 * 64 + 64
    assert (sizes.largest_outside, sizes.hidden, sizes.vocabulary) == (257 * 64, 64, 257)
    assert [sum(b.weights for b in layer) for layer in sizes.blocks] == [EXPERTS + SHARED] * 2
    assert sizes.share == 0.5
    stored = sum(p.stat().st_size for p in adapter.source.folder.glob("*.safetensors"))
    assert sizes.stored_bytes == stored


def test_tokens_are_those_of_the_options_with_spare_and_held_out_samples(adapter):
    work = work_of(adapter)
    # 16 samples, a quarter in reserve, an eighth held out, of 8 tokens each.
    assert (work.fit_tokens, work.heldout_tokens, work.tokens) == (160, 16, 176)
    assert work.batch_tokens == 160


def test_disk_is_both_checkpoints_and_all_activations_without_memory(adapter):
    sizes = sizes_of(adapter)
    disk = estimate(sizes, work_of(adapter), RATES).disk_bytes
    weights = 2 * (EXPERTS + SHARED)
    assert disk["packed checkpoints"] == 2 * (weights // 2 + sizes.kept_bytes)
    # Hidden states of before and after a layer; then of one layer the inputs of gate, up (64) and
    # down (32) of the shared expert and of the experts (64), and the stream that they write to
    # (64), by batch and joined; all of it beside that of the original.
    hidden, sites = 176 * 64 * 4 * 2, 176 * (64 + 64 + 32 + 64 + 64) * 4
    assert disk["activations over the limit"] == 2 * (hidden + 2 * sites)


def test_disk_is_that_of_measuring_where_it_takes_more_than_packing(adapter):
    sizes = sizes_of(adapter)
    deep = replace(sizes, blocks=sizes.blocks * 100)
    disk = estimate(deep, replace(work_of(adapter), bits=0.0), RATES).disk_bytes
    # Hidden states of 200 layers, the last ones and their gradients; of one layer what its sites
    # read, and the gradients, by batch and joined. The packed ones are what is not quantized.
    hidden, sites = 176 * 64 * 4 * 202, 176 * (64 + 64 + 32 + 64) * 4
    assert disk == {"activations over the limit": hidden + 2 * 2 * sites}
    assert hidden > 2 * sizes.kept_bytes


def test_memory_takes_what_disk_does_not(adapter):
    sizes = sizes_of(adapter)
    total = estimate(sizes, work_of(adapter), RATES).disk_bytes["activations over the limit"]
    for limit in (0, 1000, 100_000, total, 10 * total):
        needs = estimate(sizes, work_of(adapter, limit=limit), RATES)
        assert needs.memory_bytes["kept activations"] == min(limit, total)
        on_disk = needs.disk_bytes["activations over the limit"]
        # Hidden states leave half of the limit to the rest, so more may go to disk, never less.
        assert max(0, total - limit) <= on_disk <= total
    assert (
        estimate(sizes, work_of(adapter, limit=10 * total), RATES).disk_bytes[
            "activations over the limit"
        ]
        == 0
    )


def test_a_metric_without_gradients_keeps_one_layers_activations(adapter):
    sizes = sizes_of(adapter)
    disk = estimate(sizes, work_of(adapter, sensitivity="output_mse"), RATES).disk_bytes
    hidden, sites = 176 * 64 * 4 * 2, 176 * (64 + 64 + 32 + 64 + 64) * 4
    # When plans are packed, those of the original layers are kept beside.
    assert disk["activations over the limit"] == 2 * (hidden + 2 * sites)


def test_the_clip_search_of_every_scheme_and_plan_is_in_the_time(adapter):
    sizes, weights = sizes_of(adapter), 2 * (EXPERTS + SHARED)
    free = replace(RATES, operations_per_second=1e30, read_bytes_per_second=1e30)
    seconds = estimate(sizes, work_of(adapter), free).seconds
    assert seconds["measure"] == pytest.approx(2 * weights / 1e6)  # two schemes
    assert seconds["pack"] == pytest.approx(2 * weights / 1e6)  # two plans
    tried = estimate(sizes, work_of(adapter, rotation="auto"), free).seconds
    assert tried["measure"] == pytest.approx(3 * weights / 1e6)  # the cheapest one, both ways
    both = estimate(sizes, work_of(adapter, quantizer="gptq"), free).seconds
    assert both["measure"] == seconds["measure"]  # round to nearest beside it takes the same grid


def test_a_forward_counts_the_experts_that_a_token_takes(adapter):
    sizes = sizes_of(adapter)
    slow = Rates(1e6, 1e30, 1e30)
    work = replace(work_of(adapter), plans=0)
    # Two operations a weight; two of four experts are idle; 16 held-out tokens.
    forward = 2 * (sum(sizes.layer_elements) - 2 * EXPERTS / 2) * 16 / 1e6
    assert estimate(sizes, work, slow).seconds["measured loss"] == pytest.approx(forward)


def test_rows_that_change_together_take_the_time_of_rows_times_matrices(adapter):
    sizes, work = sizes_of(adapter), work_of(adapter, quantizer="kronecker")
    slow = Rates(1e30, 1e30, 1e30, row_operations_per_second=1e6)
    # Sixteen sweeps over every weight, eight times two operations for each of its outputs: of five
    # experts in two layers gate and up have 32 outputs and down has 64.
    operations = 16 * 8 * 2 * 2 * 5 * (2 * 64 * 32 * 32 + 64 * 32 * 64)
    assert estimate(sizes, work, slow).seconds["pack"] == pytest.approx(2 * operations / 1e6)
    refined = replace(work, settings=work_of(adapter, quantizer="refined").settings)
    assert estimate(sizes, refined, slow).seconds["pack"] < 1e-6


def test_processes_share_the_quantizing_but_not_the_forwards(adapter):
    sizes, free = sizes_of(adapter), replace(RATES, read_bytes_per_second=1e30)
    one, four = (
        estimate(sizes, replace(work_of(adapter), processes=n), free).seconds for n in (1, 4)
    )
    search = 2 * 2 * (EXPERTS + SHARED) / 1e6
    # x'x of 160 tokens in two layers: three shared linears, and four experts at half, whose gate
    # and up read the same.
    moments = 2 * 2 * 160 * (64**2 + 64**2 + 32**2 + 2 * (64**2 + 32**2)) / 1e9
    assert one["measure"] - four["measure"] == pytest.approx(0.75 * (search + moments))
    assert one["profile"] == four["profile"]


# Refusals

NEEDS = Needs({"layer": 3 * 2**30, "batch": 2**30}, {"packed": 2**30, "spilled": 2**29}, {})


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (Machine(2**32 - 1, 2**40), r"4.0 GiB of memory and 4.0 GiB are free .*for layer: 3"),
        (
            Machine(2**40, 2**30),
            r"1.5 GiB of disk and 1.0 GiB are free .*for packed: 1.0",
        ),
    ],
)
def test_too_little_memory_or_disk_is_refused_unless_forced(found, message):
    with pytest.raises(ValueError, match=message):
        check_needs(NEEDS, found, ResourceOptions())
    check_needs(NEEDS, found, ResourceOptions(force=True))


def test_enough_is_enough():
    check_needs(NEEDS, Machine(2**32, 3 * 2**29), ResourceOptions())


def test_a_run_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    source = save_tiny(tmp_path / "source")
    monkeypatch.setattr(resources, "machine", lambda folder: Machine(2**40, 1000))
    run = {"bits": 5, "calibration": token_ids(9, 16), "schemes": "w4a16_g32_asym"}
    with pytest.raises(ValueError, match=r"KiB of disk and 1000 bytes are free"):
        mxq.quantize(source, output=tmp_path / "out", **run)
    assert not list(tmp_path.glob("out/**/*.safetensors"))
    assert not list(tmp_path.glob("out/**/*.json"))
    assert mxq.quantize(source, output=tmp_path / "out", force=True, **run).folder.is_dir()


# The machine


def test_the_limit_of_a_control_group_counts_without_its_cached_files(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 200000\nactive_file 100000\n")
    groups = ((tmp_path, "memory.max", "memory.current"), (Path("/nowhere"), "a", "b"))
    monkeypatch.setattr(machine, "_CONTROL_GROUPS", groups)
    own = machine.psutil.Process().memory_info().rss
    # Within the resident memory that changes between the two readings.
    assert abs(machine.machine(tmp_path).memory_bytes - own - 400_000) < 2**24
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.machine(tmp_path).memory_bytes > 2**24 + own + 400_000


def test_disk_is_that_of_the_nearest_folder_that_exists(tmp_path):
    found = machine.machine(tmp_path / "not" / "yet")
    assert 0 < found.disk_bytes == pytest.approx(machine.machine(tmp_path).disk_bytes, rel=0.2)


def test_rates_are_those_of_a_machine():
    rates = machine.measure_rates()
    assert 1e7 < rates.operations_per_second < 1e15
    assert 1e4 < rates.searched_weights_per_second < 1e12
    assert 1e7 < rates.row_operations_per_second < 1e15


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3, "less than a minute"),
        (60, "about a minute"),
        (400, "about 7 minutes"),
        (2000, "about 30 minutes"),
        (3600 * 5.4, "about 5 hours"),
        (3600 * 70, "about 3 days"),
    ],
)
def test_times_are_rounded_to_what_they_are_worth(seconds, text):
    assert spoken_seconds(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (3 * 2**19, "1.5 MiB"),
        (2**30 - 1, "1,024.0 MiB"),
        (2**30, "1.0 GiB"),
        (1536 * 2**30, "1,536.0 GiB"),
    ],
)
def test_bytes_are_told_in_the_largest_unit_that_they_fill(count, text):
    assert spoken_bytes(count) == text


def test_the_table_of_needs_leaves_out_what_takes_nothing(capsys):
    memory = {"libraries": 2**29, "kept": 0, "layer": 2**20}
    needs = Needs(memory, {"packed": 3 * 2**10, "spilled": 0}, {"profile": 3.0})
    show_needs(needs, Machine(2**35, 2**38))
    shown = capsys.readouterr().err
    assert [cells(line) for line in shown.splitlines() if "│" in line] == [
        ["memory", "libraries", "512.0 MiB", ""],
        ["", "layer", "1.0 MiB", ""],
        ["", "in all", "513.0 MiB", "32.0 GiB"],
        ["disk", "packed", "3.0 KiB", ""],
        ["", "in all", "3.0 KiB", "256.0 GiB"],
        ["time", "profile", "less than a minute", ""],
    ]


def test_a_run_that_takes_no_disk_still_says_what_is_free(capsys):
    show_needs(Needs({"libraries": 1}, {"packed": 0}, {}), Machine(2**35, 2**38))
    lines = [cells(line) for line in capsys.readouterr().err.splitlines() if "│" in line]
    assert lines[-1] == ["disk", "in all", "0 bytes", "256.0 GiB"]


def cells(line):
    return [cell.strip() for cell in line.strip("│").split("│")]
