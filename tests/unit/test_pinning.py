"""Super experts: the rule by hand, and what pins leave of a table to every solver."""

import json
from dataclasses import replace
from math import inf, isfinite

import pytest
from exploring import SCHEMES, random_table, save_work

from mxq.artifacts import Provenance
from mxq.config import AllocateOptions
from mxq.explore.question import Setting
from mxq.explore.run import open_site
from mxq.pinning import keep_wide, pins_for, pins_of, widest
from mxq.planning import plan
from mxq.profiling.activation import ActivationStats, SiteStats
from mxq.profiling.super_experts import find_super_experts
from mxq.report.words import pin_lines
from mxq.scheme import parse_schemes
from mxq.search.problem import InfeasibleError
from mxq.storage import digest_of, to_text

TABLE = random_table()
PINNED = "layers.1.experts.2"
PINS = {PINNED: 50.0}


def site(layer, peaks):
    """A site of which only the maxima count."""
    nothing = (0.0,) * len(peaks)
    return SiteStats(
        site=f"layers.{layer}.experts",
        tokens=((1,),) * len(peaks),
        gate_mass=((1.0,),) * len(peaks),
        coactivation_entropy=0.0,
        coactivation_entropy_max=0.0,
        input_power=nothing,
        inner_power=nothing,
        down_max=tuple(map(float, peaks)),
    )


def profile_of(*sites):
    made_from = Provenance("m", "c")
    return ActivationStats(("x",), 9, sites, 0, (), (), 0, "c", made_from)


PROFILE = profile_of(site(0, [1] * 5), site(1, [1, 1, 50, 1, 1]), site(2, [1] * 5))


def found(*sites):
    return {expert.name: expert.times for expert in find_super_experts(sites)}


# The rule


def test_an_expert_far_above_its_layer_stands_out_by_the_median_of_the_others():
    # The others of layer 1 have 2, 4, 6, so 4 in the median, and 40 is the tenfold of that.
    assert found(site(0, [3, 3, 3, 3]), site(1, [2, 40, 4, 6])) == {"layers.1.experts.1": 10.0}
    assert found(site(0, [3, 3, 3, 3]), site(1, [2, 39, 4, 6])) == {}


@pytest.mark.parametrize(
    "sites",
    [
        [site(0, [5, 5, 5, 5]), site(1, [5, 5, 5, 5])],
        # Deep layers put out more; none of their experts stands out from its mates.
        [site(0, [1, 1, 1, 1]), site(1, [300, 320, 310, 305])],
        [site(0, [7])],
        [site(0, [0, 0, 9])],
        [site(0, [0, 0]), site(1, [0, 0])],
        [],
    ],
    ids=["all alike", "a deep layer", "one expert", "mates without tokens", "no token", "dense"],
)
def test_a_model_without_outliers_has_none(sites):
    assert found(*sites) == {}


def test_less_than_a_tenth_of_the_largest_maximum_is_none():
    outlier = site(0, [1, 1, 1, 1000])
    assert list(found(outlier, site(1, [1, 1, 99, 1]))) == ["layers.0.experts.3"]
    assert list(found(outlier, site(1, [1, 1, 100, 1]))) == [
        "layers.0.experts.3",
        "layers.1.experts.2",
    ]


def test_only_so_many_of_the_largest_are_super_experts():
    # Four that stand out alike but for the order: three in a small model, the largest.
    small = [site(layer, [1, 1, 1, 1, 1, 100 + layer]) for layer in range(4)]
    assert list(found(*small)) == [f"layers.{layer}.experts.5" for layer in (1, 2, 3)]
    # 0.5 % of 4 x 200 = 800 experts are four.
    large = [site(layer, [1] * 199 + [100 + layer]) for layer in range(4)]
    assert len(found(*large)) == 4
    # Experts that no token reached are no experts of a rank: 600 left, so three.
    unused = [site(layer, [0] * 50 + [1] * 149 + [100 + layer]) for layer in range(4)]
    assert len(found(*unused)) == 3


# What a plan has to keep


def test_the_widest_schemes_are_those_of_8_bits_or_the_widest_there_are():
    def spelled(menu):
        return [str(scheme) for scheme in widest(parse_schemes(menu))]

    assert spelled("w2a16_grow_sym,w8a16_grow_sym,bf16") == ["w8a16_grow_sym", "bf16"]
    assert spelled("w2a16_grow_sym,w4a16_grow_sym,w4a16_g128_sym") == [
        "w4a16_grow_sym",
        "w4a16_g128_sym",
    ]


def test_pins_leave_others_as_they_are_and_the_widest_of_what_a_block_can_have():
    up = next(n for n, b in enumerate(TABLE.blocks) if b.name == f"{PINNED}.up")
    loss = list(TABLE.loss)
    loss[up] = (*loss[up][:3], inf, inf)  # of this block 2, 3 and 4 bits alone are left
    table = keep_wide(replace(TABLE, loss=tuple(loss)), PINS)
    for number, block in enumerate(table.blocks):
        kept = [isfinite(value) for value in table.loss[number]]
        if number == up:
            assert kept == [False, False, True, False, False]
        elif block.site == "layers.1.experts" and block.expert == 2:
            assert kept == [False, False, False, True, True]
        else:
            assert table.loss[number] == loss[number]


ANSWERS = [
    {},
    {"solver": "lagrangian"},
    {"granularity": "expert"},
    {"tie_gate_up": True},
    {"device": "h200", "tokens": 64},
    {"floor_bits": 2.5},
    {"bits": 6.5, "engine": "vllm"},  # one format for all experts of a layer: a third is wide
]


@pytest.mark.parametrize("options", ANSWERS, ids=str)
def test_every_way_to_a_plan_keeps_pinned_experts_wide(options):
    asked = AllocateOptions(**{"bits": 4.5, **options})
    pinned, free = plan(TABLE, asked, pins=PINS), plan(TABLE, asked)
    names = {block.name for block in TABLE.blocks if block.name.startswith(PINNED + ".")}
    assert min(free["plan"].schemes[name].w_bits for name in names) < 8  # else this says nothing
    assert min(pinned["plan"].schemes[name].w_bits for name in names) >= 8
    assert pinned["plan"].storage_bits <= asked.bits * pinned["plan"].weights
    assert (pinned["plan"].pinned, free["plan"].pinned) == (PINS, {})
    if "uniform" in free:
        assert pinned["uniform"] == free["uniform"]


def test_pins_that_do_not_fit_are_named_with_the_way_out():
    # All at 2 bits need 2.14; the pinned expert of 15 alone asks for some tenths more.
    asked = AllocateOptions(bits=2.2)
    assert plan(TABLE, asked)["plan"].bits_per_weight <= 2.2
    with pytest.raises(InfeasibleError) as error:
        plan(TABLE, asked, pins=PINS)
    assert f"with 1 expert pinned to 8 bits or the widest format ({PINNED}): 2.2 bits" in str(
        error.value
    )
    assert str(error.value).endswith("; --pin off plans without pins")


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4, "pin": "off"},
        {"plan": "uniform:bf16"},
        {"bits": 4, "objective": "mxmoe", "r": 1},
    ],
    ids=str,
)
def test_nothing_is_pinned_where_that_is_off(options):
    assert pins_for(AllocateOptions(**options), PROFILE) == {}
    assert pins_for(AllocateOptions(bits=4), PROFILE) == PINS


def test_another_word_for_pin_is_refused():
    with pytest.raises(ValueError, match="pin 'on' is unknown; choose one of auto, off"):
        AllocateOptions(bits=4, pin="on")


# In a work folder


def test_a_folder_without_a_profile_pins_none_and_says_so(tmp_path, caplog):
    work = save_work(tmp_path, TABLE)
    assert pins_of(work, TABLE, AllocateOptions(bits=4)) == {}
    assert "holds no profile, so no expert is pinned" in caplog.text
    work.save("profile", PROFILE)
    assert pins_of(work, TABLE, AllocateOptions(bits=4)) == PINS


def test_a_profile_older_than_the_maxima_is_refused(tmp_path):
    work = save_work(tmp_path, TABLE)
    document = json.loads(to_text(PROFILE))
    for old in document["content"]["sites"]:
        del old["down_max"]
    content = json.dumps(document["content"], sort_keys=True, separators=(",", ":"))
    work.path("profile").write_text(json.dumps({**document, "sha256": digest_of(content)}))
    with pytest.raises(ValueError, match=r"profile\.json .* has no down_max.*; run its stage"):
        pins_of(work, TABLE, AllocateOptions(bits=4))
    assert pins_of(work, TABLE, AllocateOptions(bits=4, pin="off")) == {}


def test_explore_shows_the_plan_that_allocate_gives(tmp_path):
    work = save_work(tmp_path, TABLE)
    work.save("profile", PROFILE)
    answer = open_site(Setting(tmp_path)).solve("bits=4.5")
    expected = plan(TABLE, AllocateOptions(bits=4.5, solver="lagrangian"), pins=PINS)
    chosen = [str(SCHEMES[place]) for place in answer["choice"]]
    assert chosen == [str(expected["plan"].schemes[block.name]) for block in TABLE.blocks]
    assert answer["uniform"]["scheme"] == str(next(iter(expected["uniform"].schemes.values())))


# Words


def test_pins_are_named_by_how_far_they_stand_out():
    chosen = plan(TABLE, AllocateOptions(bits=4.5), pins={"layers.0.experts.1": 12.4, **PINS})
    assert pin_lines(chosen["plan"]) == [
        f"Pinned to the widest formats: {PINNED} (50 times), layers.0.experts.1 (12 times), "
        "by largest output over the median of the layer's other experts."
    ]
    free = plan(TABLE, AllocateOptions(bits=4.5))["plan"]
    assert pin_lines(free) == []
    assert [line.split(",")[0] for line in pin_lines(free, PROFILE)] == ["Not pinned"]
    assert pin_lines(free, profile_of(site(0, [1] * 5))) == []
