"""Rules of engines: each is broken alone and mended, plans solved inside them keep them all.

What engines do was read in their sources (docs/engines.md); expected findings follow from that by
hand, and the price of a restriction from brute force over all plans.
"""

import importlib.util
import itertools
import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxq.artifacts import BlockInfo, Provenance, SensitivityTable
from mxq.config import AllocateOptions
from mxq.engines import (
    DENSE,
    ENGINES,
    ConfigGroup,
    Deployment,
    Exported,
    StoredFormat,
    check,
    check_tensor_parallel,
    fitting_schemes,
    format_of,
    format_warnings,
    load_rules,
    restrict,
    targets,
    unchecked,
)
from mxq.engines.blocks import BLOCK_KINDS, SAME_KINDS
from mxq.engines.check import PLAN_KINDS
from mxq.engines.compressed import read_compressed
from mxq.engines.exported import EXPORT_KINDS
from mxq.engines.gptq import read_gptq
from mxq.engines.rules import Accepted, EngineRules, Fused, Rule
from mxq.engines.targets import targets_of, unmatched
from mxq.for_engine import inside, marked
from mxq.planning import plan
from mxq.scheme import Scheme, parse_schemes
from mxq.search import InfeasibleError

RULES = Path(__file__).parents[2] / "mxq" / "engines" / "rules"
W4, W8, FP8 = (format_of(Scheme.parse(s)) for s in ("w4a16_g128_sym", "w8a16_g128_sym", "fp8"))


def blocks_of(*, layers=2, experts=2, hidden=256, width=128):
    """Attention, a shared expert and experts of each layer."""
    found = []
    for layer in range(layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            path = f"layers.{layer}.self_attn.{name}"
            found.append(BlockInfo(path, layer, None, name, hidden, hidden, 9, path))
        for name in ("gate_proj", "up_proj", "down_proj"):
            path = f"layers.{layer}.mlp.shared_expert.{name}"
            n, k = (hidden, width) if name == "down_proj" else (width, hidden)
            found.append(BlockInfo(path, layer, None, name, n, k, 9, path))
        for expert, name in itertools.product(range(experts), ("gate", "up", "down")):
            site = f"layers.{layer}.experts"
            n, k = (hidden, width) if name == "down" else (width, hidden)
            path = f"{site}.{expert}.{name}"
            found.append(BlockInfo(path, layer, expert, name, n, k, 3, site))
    return tuple(found)


BLOCKS = blocks_of()


def deployed(choose=lambda block: None, *, blocks=BLOCKS, usual=W4, **others):
    """All blocks in the usual format but for those that ``choose`` gives another."""
    formats = tuple(choose(block) or usual for block in blocks)
    return Deployment(blocks, formats, **others)


def broken(deployment, engine):
    """Identifiers of the broken rules that are errors, and of the others."""
    found = check(deployment, load_rules(engine))
    errors = {finding.rule.id for finding in found if finding.rule.is_error}
    return errors, {finding.rule.id for finding in found} - errors


def where(ending, stored):
    """That format for blocks whose name ends so."""
    return lambda block: stored if block.name.endswith(ending) else None


GPTQ_FUSED = {"layers.0.self_attn.qkv_proj": W8}

BREAKS = {
    ("vllm", "experts-alike"): deployed(lambda b: W8 if b.expert == 1 and b.layer == 0 else None),
    ("vllm", "expert-projections-alike"): deployed(where(".down", W8)),
    ("vllm", "fused-linears-alike"): deployed(where("0.self_attn.k_proj", W8)),
    ("vllm", "no-rotation"): deployed(rotated=frozenset({"layers.1.experts.0.up"})),
    ("vllm", "expert-formats"): deployed(
        lambda b: None if b.expert is None else StoredFormat("packed", 3, 16, None)
    ),
    ("vllm", "linear-formats"): deployed(
        where("o_proj", StoredFormat("packed", 3, 16, 128, symmetric=False))
    ),
    ("vllm", "activation-order"): deployed(usual=replace(W4, order="group")),
    ("vllm", "tensor-parallel-experts"): deployed(
        blocks=[b for b in BLOCKS if b.expert is not None], tensor_parallel=2
    ),
    ("vllm", "tensor-parallel-linears"): deployed(
        blocks=[b for b in BLOCKS if b.projection == "o_proj"], tensor_parallel=4
    ),
    ("vllm", "gptq-formats"): deployed(usual=StoredFormat("packed", 3), method="gptq"),
    ("vllm", "gptq-fused-names"): deployed(method="gptq", exported=Exported(fused=GPTQ_FUSED)),
    ("vllm", "gptq-packed"): deployed(
        method="gptq", exported=Exported(ungrouped=("model.layers.0.mlp.up",))
    ),
    ("vllm", "ignored"): deployed(exported=Exported(claimed=("model.layers.0.mlp.gate",))),
    ("vllm", "grouped"): deployed(exported=Exported(ungrouped=("model.layers.0.mlp.up",))),
    ("sglang", "experts-alike"): deployed(lambda b: W8 if b.expert == 1 else None),
    ("sglang", "expert-projections-alike"): deployed(where(".gate", W8)),
    ("sglang", "fused-linears-alike"): deployed(where("1.mlp.shared_expert.up_proj", W8)),
    ("sglang", "no-rotation"): deployed(rotated=frozenset({"layers.0.self_attn.q_proj"})),
    ("sglang", "one-storage"): deployed(where("o_proj", FP8)),
    ("sglang", "expert-formats"): deployed(
        lambda b: None if b.expert is None else StoredFormat("packed", 4, 16, 32, False)
    ),
    ("sglang", "linear-formats"): deployed(
        where("o_proj", StoredFormat("packed", 8, 16, 128, symmetric=False))
    ),
    ("sglang", "tensor-parallel-experts"): deployed(
        blocks=[b for b in BLOCKS if b.expert is not None], tensor_parallel=2
    ),
    ("sglang", "tensor-parallel-linears"): deployed(
        blocks=[b for b in BLOCKS if b.projection == "o_proj"], tensor_parallel=3
    ),
    ("sglang", "ignored"): deployed(exported=Exported(claimed=("model.layers.0.mlp.gate",))),
    ("sglang", "grouped"): deployed(exported=Exported(ungrouped=("model.layers.0.mlp.up",))),
    ("transformers", "experts-alike-in-the-model"): deployed(
        lambda b: W8 if b.expert is not None and b.layer == 1 else None
    ),
    ("transformers", "no-rotation"): deployed(rotated=frozenset({"layers.0.experts.0.up"})),
    ("transformers", "expert-formats"): deployed(
        lambda b: None if b.expert is None else replace(W4, symmetric=False)
    ),
    ("transformers", "linear-formats"): deployed(where("o_proj", replace(W4, symmetric=False))),
    ("transformers", "group-of-experts"): deployed(
        lambda b: W8 if b.expert is None else None,
        exported=Exported(
            groups=(
                ConfigGroup("group_0", ("re:.*self_attn.*", "a.b"), W8),
                ConfigGroup("group_1", ("re:.*mlp\\.\\w+\\.\\d+\\..*",), W4),
            )
        ),
    ),
    ("transformers", "gptq-dynamic"): deployed(method="gptq", exported=Exported(overrides=(".*",))),
    ("transformers", "expert-names"): deployed(exported=Exported(renamed=("layers.0.experts",))),
    ("transformers", "grouped"): deployed(exported=Exported(ungrouped=("model.layers.0.up",))),
    ("trtllm", "formats"): deployed(where("o_proj", W8), usual=FP8),
    ("trtllm", "experts-alike"): deployed(lambda b: DENSE if b.expert == 0 else None, usual=FP8),
    ("trtllm", "expert-projections-alike"): deployed(where(".up", DENSE), usual=FP8),
    ("trtllm", "no-rotation"): deployed(usual=FP8, rotated=frozenset({"layers.0.experts.0.up"})),
    ("trtllm", "one-group"): deployed(
        usual=FP8,
        exported=Exported(groups=tuple(ConfigGroup(n, ("Linear",), FP8) for n in ("a", "b"))),
    ),
    ("trtllm", "method"): deployed(usual=FP8, method="gptq"),
    ("trtllm", "ignored"): deployed(
        usual=FP8, exported=Exported(claimed=("model.layers.0.mlp.gate",))
    ),
}
"""A deployment for each rule that is an error, and that breaks no other such rule."""


def mended(deployment):
    """The same with nothing wrong: one format that every engine takes, one rank, no rotation."""
    usual = FP8 if FP8 in deployment.formats else W4
    return Deployment(deployment.blocks, (usual,) * len(deployment.blocks), exported=Exported())


@pytest.mark.parametrize(("engine", "rule"), BREAKS)
def test_a_deployment_that_breaks_one_rule_is_found_and_the_mended_one_is_not(engine, rule):
    errors, _ = broken(BREAKS[engine, rule], engine)
    assert errors == {rule}
    assert broken(mended(BREAKS[engine, rule]), engine)[0] == set()


def test_every_rule_that_is_an_error_is_broken_by_a_deployment_above():
    errors = {(e, rule.id) for e in ENGINES for rule in load_rules(e).rules if rule.is_error}
    assert errors == set(BREAKS)


WARNS = {
    ("vllm", "marlin-formats"): deployed(usual=StoredFormat("packed", 3, 16, 128)),
    ("vllm", "marlin-expert-shapes"): deployed(blocks=blocks_of(width=32)),
    ("vllm", "marlin-linear-shapes"): deployed(blocks=blocks_of(hidden=64)),
    ("vllm", "unknown-formats"): deployed(usual=StoredFormat("other", spelling="float4 by x")),
    ("vllm", "own-format"): deployed(method="mxq"),
    ("vllm", "gptq-ignored"): deployed(
        method="gptq", exported=Exported(claimed=("model.layers.0.mlp.gate",))
    ),
    ("vllm", "targets-match"): deployed(exported=Exported(unmatched=("re:.*nothing",))),
    ("vllm", "expert-names"): deployed(exported=Exported(renamed=("layers.0.experts",))),
    ("sglang", "gptq-unread"): deployed(method="gptq"),
    ("transformers", "untried-formats"): deployed(usual=FP8),
    ("transformers", "packing-release"): deployed(usual=StoredFormat("packed", 3)),
    ("transformers", "dequantize"): deployed(where("o_proj", W8)),
}


@pytest.mark.parametrize(("engine", "rule"), WARNS)
def test_a_warning_is_given_where_it_applies_and_not_for_the_usual_plan(engine, rule):
    errors, warnings = broken(WARNS[engine, rule], engine)
    assert rule in warnings
    assert errors == set()
    assert rule not in broken(deployed(), engine)[1]


def test_a_finding_names_the_blocks_and_shows_the_first():
    (finding,) = check(BREAKS["vllm", "fused-linears-alike"], load_rules("vllm"))
    names = [f"layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    assert list(finding.names) == names
    assert finding.detail == (
        "layers.0.self_attn.q_proj and those with it: 2 x w4a16_g128_sym, 1 x w8a16_g128_sym"
    )


def test_an_unquantized_part_of_a_fused_linear_is_another_format():
    errors, _ = broken(deployed(where("0.self_attn.v_proj", DENSE)), "vllm")
    assert errors == {"fused-linears-alike"}


def test_layers_may_differ_and_whole_expert_layers_stay_unquantized():
    by_layer = deployed(lambda b: (DENSE if b.expert is not None else W8) if b.layer else None)
    for engine in ("vllm", "sglang"):
        assert broken(by_layer, engine)[0] == set()


def test_own_checkpoints_are_held_against_the_rules_of_what_they_export_to():
    wrong = replace(BREAKS["vllm", "linear-formats"], method="mxq")
    assert broken(wrong, "vllm") == (
        {"linear-formats"},
        {"own-format", "marlin-formats"},
    )


def test_rules_about_an_export_are_listed_where_there_is_none():
    ids = {rule.id for rule in unchecked(deployed(), load_rules("vllm"))}
    assert ids == {"expert-names", "ignored", "grouped", "targets-match"}
    assert unchecked(deployed(exported=Exported()), load_rules("vllm")) == ()


@pytest.mark.parametrize(
    ("ranks", "width", "group", "is_fine"),
    [
        (1, 704, 128, True),  # one rank splits nothing
        (2, 1408, 64, True),  # 704 = 11 groups of 64
        (2, 1408, 128, False),  # 704 = 5.5 groups of 128
        (4, 1408, 32, True),  # 352 = 11 groups of 32
        (4, 1408, 64, False),
        (3, 1408, 32, False),  # 1408 / 3 is no integer
        (4, 1408, None, True),  # whole rows: one scale for all ranks
    ],
)
def test_groups_of_experts_under_tensor_parallelism(ranks, width, group, is_fine):
    experts = [b for b in blocks_of(hidden=2048, width=width) if b.expert is not None]
    usual = StoredFormat("packed", 4, 16, group)
    errors, _ = broken(deployed(blocks=experts, usual=usual, tensor_parallel=ranks), "vllm")
    assert errors == (set() if is_fine else {"tensor-parallel-experts"})


def test_zero_points_are_split_in_whole_words():
    # 4 bits of 12 outputs on each of 2 ranks are 48 bits: one and a half words.
    up = BlockInfo("layers.0.experts.0.up", 0, 0, "up", 24, 256, 1, "layers.0.experts")
    for symmetric, expected in ((True, set()), (False, {"tensor-parallel-experts"})):
        usual = replace(W4, symmetric=symmetric)
        assert broken(deployed(blocks=[up], usual=usual, tensor_parallel=2), "vllm")[0] == expected


def test_the_rules_are_well_formed_and_every_field_is_read():
    known = {
        EngineRules: {f.name for f in fields(EngineRules)},
        Rule: {f.name for f in fields(Rule)},
        Accepted: {f.name for f in fields(Accepted)},
        Fused: {f.name for f in fields(Fused)},
    }
    assert sorted(path.stem for path in RULES.glob("*.json")) == sorted(ENGINES)
    for engine in ENGINES:
        document, rules = json.loads((RULES / f"{engine}.json").read_text()), load_rules(engine)
        assert rules.engine == engine
        assert set(document) == known[EngineRules]
        assert len({rule.id for rule in rules.rules}) == len(rules.rules)
        for written, rule in zip(document["rules"], rules.rules, strict=True):
            assert set(written) <= known[Rule]
            assert rule.kind in {*BLOCK_KINDS, *SAME_KINDS, *PLAN_KINDS, *EXPORT_KINDS}
            assert rule.says.endswith(".")
            assert rule.remedy
            assert rule.source
            assert all(set(accepted) <= known[Accepted] for accepted in written.get("accepts", ()))
            assert all(set(fused) == known[Fused] for fused in written.get("fused", ()))
            assert len(rule.row_multiples) == len(rule.column_multiples) == 2


def test_no_key_of_the_rules_is_written_twice():
    def once(pairs):
        names = [name for name, _ in pairs]
        assert len(names) == len(set(names)), names
        return dict(pairs)

    for path in RULES.glob("*.json"):
        json.loads(path.read_text(), object_pairs_hook=once)


# Planning inside the rules

MENUS = {
    "vllm": "w2a16_g32_sym,w3a16_g64_asym,w4a16_g64_asym,w4a16_grow_sym,w8a8_grow_sym,bf16",
    "sglang": "w4a16_g64_asym,w4a16_grow_sym,w8a16_g32_sym,w8a8_grow_sym,fp8,bf16",
    "transformers": "w2a16_g32_sym,w3a16_g32_asym,w4a16_g64_sym,w8a16_grow_sym,fp8",
    "trtllm": "w4a16_g64_sym,w8a8_grow_sym,fp8,bf16",
}


def table_of(blocks, schemes, *, seed=0, rotated=()):
    rng = np.random.default_rng(seed)
    falling = np.geomspace(1, 1e-3, len(schemes))
    loss = rng.lognormal(0, 1.5, (len(blocks), 1)) * falling * rng.lognormal(0, 0.5, (1, 1))
    loss = loss * rng.lognormal(0, 0.5, loss.shape)
    return SensitivityTable(
        tuple(blocks),
        tuple(schemes),
        tuple(
            tuple(v if s.fits(b.in_features) else np.inf for s, v in zip(schemes, row, strict=True))
            for b, row in zip(blocks, loss.tolist(), strict=True)
        ),
        tuple(("rtn",) * len(schemes) for _ in blocks),
        "fisher",
        "nats per token",
        100,
        tuple(rotated),
        Provenance("m", "c"),
    )


def deployment_of(solved, blocks, ranks=1):
    formats = tuple(format_of(solved.schemes[b.name]) for b in blocks)
    return Deployment(tuple(blocks), formats, tensor_parallel=ranks)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    engine=st.sampled_from(ENGINES),
    seed=st.integers(0, 10**6),
    bits=st.floats(4, 16),
    granularity=st.sampled_from(["block", "expert", "projection", "layer"]),
    tie=st.booleans(),
    ranks=st.sampled_from([1, 2]),
)
def test_a_plan_solved_inside_the_rules_breaks_none(engine, seed, bits, granularity, tie, ranks):
    ranks = ranks if engine in ("vllm", "sglang") else 1
    table = table_of(BLOCKS, parse_schemes(MENUS[engine]), seed=seed)
    options = AllocateOptions(
        bits=bits, granularity=granularity, tie_gate_up=tie, engine=engine, tensor_parallel=ranks
    )
    try:
        plans = plan(table, options)
    except InfeasibleError:
        # By hand: 4 bits and a scale for each row of 128 weights; fp8 and the same.
        assert bits < {"sglang": 4.125, "trtllm": 8.125}[engine]
        return
    free = plan(table, replace(options, engine=None, tensor_parallel=1))["plan"]
    for solved in plans.values():
        found = check(deployment_of(solved, BLOCKS, ranks), load_rules(engine))
        assert [finding.rule.id for finding in found if finding.rule.is_error] == []
        assert (solved.engine, solved.tensor_parallel) == (engine, ranks)
    chosen = plans["plan"]
    assert chosen.engine_cost >= 0
    assert chosen.unrestricted_loss == min(free.predicted_loss, chosen.predicted_loss)
    assert chosen.engine_cost == chosen.predicted_loss - chosen.unrestricted_loss
    assert chosen.storage_bits <= bits * chosen.weights * (1 + 1e-9)


def test_the_price_is_the_difference_of_two_brute_forces():
    blocks = blocks_of(layers=1, experts=2)[-6:]
    schemes = parse_schemes("w2a16_g32_sym,w3a16_g32_asym,w4a16_g64_sym")
    table = table_of(blocks, schemes, seed=3)
    size = np.array(
        [[s.storage_bits(b.out_features, b.in_features) for s in schemes] for b in blocks]
    )
    weights, loss = sum(b.out_features * b.in_features for b in blocks), np.array(table.loss)
    rows = np.arange(6)

    def best(choices):
        fitting = [c for c in choices if size[rows, list(c)].sum() <= 3.6 * weights]
        return min(loss[rows, list(c)].sum() for c in fitting)

    free = best(itertools.product(range(3), repeat=6))
    alike = best([(column,) * 6 for column in (0, 2)])  # asymmetric 3 bits are not taken
    chosen = plan(table, AllocateOptions(bits=3.6, engine="vllm"))["plan"]
    assert chosen.predicted_loss == pytest.approx(alike)
    assert chosen.engine_cost == pytest.approx(alike - free)
    assert chosen.engine_cost > 0
    assert "inside the rules of vLLM 0.33.0" in chosen.description


def test_a_solver_that_stops_early_makes_no_price_below_zero():
    # A plan inside the rules is one without them, so the best of those loses no more.
    table = table_of(BLOCKS, parse_schemes("w4a16_g128_sym,w8a16_g128_sym"))
    options = AllocateOptions(bits=5, engine="vllm")
    chosen = plan(table, options)["plan"]
    early = marked(chosen, inside(table, options), 1.001 * chosen.predicted_loss)
    assert (early.unrestricted_loss, early.engine_cost) == (chosen.predicted_loss, 0)


def test_an_engine_of_one_storage_gets_the_better_of_the_two():
    # At 9 bits both are open, and either may lose less.
    schemes = parse_schemes("w8a16_g128_sym,fp8")
    for place, better in enumerate(schemes):
        loss = tuple(tuple(0.1 if s == place else 0.2 for s in (0, 1)) for _ in BLOCKS)
        table = replace(table_of(BLOCKS, schemes), loss=loss)
        chosen = plan(table, AllocateOptions(bits=9, engine="sglang"))["plan"]
        assert set(chosen.schemes.values()) == {better}


def without(table, scheme, projection):
    """The table with that scheme not on offer for that projection."""
    column = table.schemes.index(Scheme.parse(scheme))
    loss = [list(row) for row in table.loss]
    for block, row in zip(table.blocks, loss, strict=True):
        row[column] = np.inf if block.projection == projection else row[column]
    return replace(table, loss=tuple(map(tuple, loss)))


def test_a_storage_that_a_projection_does_not_list_is_left_out():
    table = table_of(BLOCKS, parse_schemes("w8a16_g128_sym,fp8"))
    options = AllocateOptions(bits=9, engine="sglang")
    chosen = plan(without(table, "w8a16_g128_sym", "down"), options)["plan"]
    assert {str(scheme) for scheme in chosen.schemes.values()} == {"fp8"}
    neither = without(without(table, "w8a16_g128_sym", "down"), "fp8", "up")
    with pytest.raises(
        ValueError, match=r"takes none of the schemes that are listed for .*\.up; mx"
    ):
        plan(neither, options)


def test_a_rotated_table_is_refused_with_what_to_do():
    table = table_of(BLOCKS, parse_schemes("w4a16_g128_sym"), rotated=(1,))
    with pytest.raises(ValueError, match=r"layers 1 were measured rotated, .*--rotation off"):
        plan(table, AllocateOptions(bits=5, engine="vllm"))


def test_schemes_that_an_engine_does_not_take_are_named():
    table = table_of(BLOCKS, parse_schemes("w3a16_g128_asym,w5a16_g128_asym"))
    with pytest.raises(
        ValueError, match=r"vLLM 0\.33\.0 takes none of w3a16_g128_asym, w5a16_g128_a"
    ):
        plan(table, AllocateOptions(bits=6, engine="vllm"))
    table = table_of(BLOCKS, parse_schemes("w3a16_g128_asym,w4a16_g128_sym"))
    with pytest.raises(
        ValueError, match=r"takes none of w3a16_g128_asym for layers\.0.self_attn.q"
    ):
        plan(table, AllocateOptions(plan="uniform:w3a16_g128_asym", engine="vllm"))
    forced = plan(table, AllocateOptions(plan="uniform:w4a16_g128_sym", engine="vllm"))["plan"]
    assert (forced.engine, forced.engine_cost) == ("vllm", None)


def test_schemes_that_need_another_kernel_are_named():
    schemes = parse_schemes("w3a16_g128_sym,w4a16_g128_asym,w8a16_g128_sym,bf16")
    (warning,) = format_warnings(load_rules("vllm"), schemes)
    assert warning.startswith("w3a16_g128_sym: Marlin, which comes with the engine")
    assert format_warnings(load_rules("sglang"), schemes) == ()


def test_a_budget_that_the_engine_cannot_meet_says_whose_rules():
    table = table_of(BLOCKS, parse_schemes("w4a16_g128_sym,w2a16_g128_asym"))
    with pytest.raises(InfeasibleError, match="inside the rules of vLLM: 3 bits per weight"):
        plan(table, AllocateOptions(bits=3, engine="vllm"))


def test_ties_across_layers_do_not_go_with_an_objective_of_each_layer():
    table = table_of(BLOCKS, parse_schemes("w4a16_g128_sym,w2a16_g128_sym"))
    options = AllocateOptions(bits=3, engine="transformers", objective="mxmoe", r=1)
    with pytest.raises(ValueError, match="solves each layer alone"):
        plan(table, options)
    assert plan(table, replace(options, engine="vllm"))["plan"].engine_cost is None


@pytest.mark.parametrize(
    ("engine", "ranks", "expected"),
    [
        (
            "vllm",
            1,
            "w2a16_g128_sym,w3a16_g128_sym,w4a16_g128_asym,w5a16_g128_sym,w6a16_g128_sym,"
            "w8a16_g128_sym,w4a16_grow_asym",
        ),
        # 704 inputs on a rank: groups of 64.
        (
            "vllm",
            2,
            "w2a16_g64_sym,w3a16_g64_sym,w4a16_g64_asym,w5a16_g64_sym,w6a16_g64_sym,"
            "w8a16_g64_sym,w4a16_grow_asym",
        ),
        ("sglang", 1, "w4a16_g128_asym,w8a16_g128_sym,w4a16_grow_asym"),
        (
            "transformers",
            1,
            "w2a16_g128_sym,w3a16_g128_sym,w4a16_g128_sym,w5a16_g128_sym,w6a16_g128_sym,"
            "w8a16_g128_sym,w2a16_grow_sym,w3a16_grow_sym,w4a16_grow_sym",
        ),
        ("trtllm", 1, "fp8,bf16"),
    ],
)
def test_the_default_menu_is_what_the_engine_takes_everywhere(engine, ranks, expected):
    blocks = blocks_of(hidden=2048, width=1408)
    assert fitting_schemes(load_rules(engine), blocks, ranks) == parse_schemes(expected)


SIZES = parse_schemes("w4a16_g128_sym,w4a16_g64_sym")


def test_what_is_forbidden_to_one_block_stays_allowed_for_others():
    # Groups of 128 cut the down projections on 2 ranks (64 inputs each), not the others.
    found = restrict(load_rules("vllm"), BLOCKS, SIZES, 2)
    (allowed,) = found.alternatives
    assert [str(s) for s in SIZES] == ["w4a16_g128_sym", "w4a16_g64_sym"]
    assert all(row[1] for row in allowed)
    forbidden = {b.projection for b, row in zip(BLOCKS, allowed, strict=True) if not row[0]}
    assert forbidden == {"down", "down_proj"}


# Reading configurations of others


def group(targets, bits=4, **changes):
    weights = {
        "num_bits": bits, "type": "int", "symmetric": True, "strategy": "group",
        "group_size": 128, "actorder": None, **changes,
    }  # fmt: skip
    return {"targets": targets, "weights": weights, "input_activations": None}


def test_groups_of_compressed_tensors_are_read_with_their_formats():
    token = {"strategy": "token", "num_bits": 8, "dynamic": True}
    config = read_compressed(
        {
            "format": "pack-quantized",
            "ignore": ["lm_head", "re:.*gate$"],
            "config_groups": {
                "a": group(["re:.*experts.*"], 3, symmetric=False, actorder="static"),
                "b": {**group(["model.x"], 8, strategy="channel"), "format": "int-quantized",
                      "input_activations": token},
                "c": group(["Linear"], 4, strategy="tensor_group"),
            },
        }
    )  # fmt: skip
    formats = [found.format for found in config.groups]
    assert formats[0] == StoredFormat("packed", 3, 16, 128, symmetric=False, order="static")
    assert formats[1] == StoredFormat("int", 8, 8, None)
    assert str(formats[2]) == "int4 by tensor_group 128"
    assert config.group_of("model.layers.0.experts.3.up").name == "a"
    assert config.group_of("model.x").name == "b"
    assert config.group_of("model.y").name == "c"
    assert config.is_ignored("model.layers.0.mlp.gate")
    assert not config.is_ignored("model.layers.0.mlp.gate_proj")


def test_the_first_target_in_the_list_wins_and_a_class_comes_last():
    found = targets_of(["Linear", "re:.*up", "model.up", "re:.*"])
    assert found.find("model.up") == 1
    assert found.find("model.down") == 3
    assert targets_of(["Linear"]).find("embed", is_linear=False) is None
    assert unmatched(targets_of(["a.b", "c.d", "re:a", "re:x", "Linear"]), ["a.b"]) == (
        "c.d",
        "re:x",
    )


def test_transformers_takes_a_pattern_of_experts_before_an_exact_name():
    groups = (
        ConfigGroup("group_0", ("model.layers.0.mlp.experts.9.up_proj",), W8),
        ConfigGroup("group_1", ("re:.*experts.*",), W4),
    )
    found = deployed(exported=Exported(groups=groups))
    assert broken(found, "transformers")[0] == set()
    found = deployed(exported=Exported(groups=groups[:1]))
    assert broken(found, "transformers")[0] == {"group-of-experts"}


def test_a_pattern_that_takes_for_ever_is_refused(monkeypatch):
    monkeypatch.setattr(targets, "MATCH_LIMIT_S", 0.05)
    with pytest.raises(ValueError, match=r"takes over 0\.05 s for one name"):
        targets_of(["re:(a|a|aa)+$"]).find("a" * 60 + "b")


def test_overrides_of_gptq_are_taken_in_their_order():
    config = read_gptq(
        {
            "bits": 4,
            "group_size": 128,
            "desc_act": True,
            "sym": True,
            "dynamic": {
                "-:.*gate$": {},
                "+:.*up": {"bits": 8, "desc_act": False},
                ".*": {"sym": False},
            },
        }
    )
    assert config.format_of("mlp.gate") == DENSE
    assert config.format_of("mlp.up_proj") == StoredFormat("packed", 8, 16, 128)
    assert config.format_of("mlp.down") == replace(W4, symmetric=False, order="group")


@pytest.mark.parametrize(
    ("read", "wrong", "message"),
    [
        (read_compressed, {}, "its config_groups is 'None', expected an object"),
        (read_compressed, {"config_groups": {}}, "its config_groups are empty"),
        (read_compressed, {"config_groups": {"a": 3}}, "its config group 'a' is '3'"),
        (read_compressed, {"config_groups": {"a": group("x")}}, "targets of 'a' are no list"),
        (read_compressed, {"config_groups": {"a": group(["re:("])}}, "is not a regular expression"),
        (read_compressed, {"config_groups": {"a": {"targets": []}}}, "weights of 'a' is 'None'"),
        (read_gptq, {"bits": 4}, "lacks bits or group_size"),
        (read_gptq, {"bits": "4", "group_size": 128}, "its bits are '4'"),
        (read_gptq, {"bits": 4, "group_size": 0}, "its group_size 0"),
        (read_gptq, {"bits": 4, "group_size": -1, "dynamic": [1]}, "its dynamic is "),
    ],
)
def test_a_damaged_configuration_is_refused_in_words(read, wrong, message):
    with pytest.raises(
        ValueError, match=message.replace("(", r"\(") if "re:" in message else message
    ):
        read(wrong)


def test_an_unknown_engine_and_ranks_without_sense_are_refused():
    with pytest.raises(ValueError, match="engine 'tgi' is unknown; choose one of vllm, sglang"):
        load_rules("tgi")
    with pytest.raises(ValueError, match="--tp is 0; it must be at least 1"):
        check_tensor_parallel("vllm", 0)
    with pytest.raises(ValueError, match="no rule of transformers about tensor parallelism"):
        check_tensor_parallel("transformers", 2)
    check_tensor_parallel("transformers", 1)


def test_the_page_shows_the_rules_as_they_are():
    root = Path(__file__).parents[2]
    path = root / "scripts" / "engine_rules.py"
    spec = importlib.util.spec_from_file_location("engine_rules", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = script.PAGE.read_text()
    assert text == script.page_with_rules(text), "run scripts/engine_rules.py"
    for engine in ENGINES:
        rules = load_rules(engine)
        assert rules.version in text
        assert all(f"| `{rule.id}` | {rule.severity} |" in text for rule in rules.rules)
