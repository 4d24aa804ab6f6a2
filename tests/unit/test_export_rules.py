"""Rules for names: exact, disjoint, and short."""

import re

import pytest
import torch

from mxq.checkpoint.export.targets import describe, matches


def experts(layers, count, leaves=("gate", "up")):
    return [
        f"m.layers.{i}.mlp.e.{e}.{x}" for i in range(layers) for e in range(count) for x in leaves
    ]


def texts(rules):
    return sorted(rule.name or rule.regex for rule in rules)


@pytest.mark.parametrize("seed", range(6))
def test_every_name_is_matched_by_its_own_label_alone(seed):
    generator = torch.Generator().manual_seed(seed)
    names = [
        *experts(4, 5), *[f"m.layers.{i}.attn.{x}" for i in range(4) for x in "qkvo"],
        *[f"tower.layers.{i}.attn.{x}" for i in range(3) for x in "qk"], "head", "m.proj",
        *[f"m.xlayers.{i}.attn.q" for i in range(2)], *[f"a.{i}.b.{j}.c.{k}.w" for i in range(2)
        for j in range(2) for k in range(3)], "layers.0.attn.q", "3.w",
        *[f"tower.{i}.merge.{j}" for i in range(3) for j in (0, 2, 11)], "m.layers.0.mlp.0", "12",
    ]  # fmt: skip
    drawn = torch.randint(1 + seed, (len(names),), generator=generator).tolist()
    labels = dict(zip(names, drawn, strict=True))
    found = describe(labels)
    for name, label in labels.items():
        hits = {other for other, rules in found.items() if matches(rules, name)}
        assert hits == {label}, (name, hits)


def test_one_label_is_one_expression():
    assert texts(describe(dict.fromkeys(experts(12, 8), "a"))["a"]) == [
        r".*layers\.\d+\.mlp\.e\.\d+\.(gate|up)$"
    ]


def test_layers_of_one_label_share_an_expression():
    labels = {name: name.split(".")[2] in "02" for name in experts(4, 2)}
    assert texts(describe(labels)[True]) == [r".*layers\.(0|2)\.mlp\.e\.\d+\.(gate|up)$"]


def test_layers_with_the_same_experts_share_an_expression():
    labels = {n: n.split(".")[5] == "1" and n.split(".")[2] != "3" for n in experts(4, 3)}
    found = describe(labels)
    assert texts(found[True]) == [r".*layers\.(0|1|2)\.mlp\.e\.1\.(gate|up)$"]
    assert texts(found[False]) == [
        r".*layers\.(0|1|2)\.mlp\.e\.(0|2)\.(gate|up)$", r".*layers\.3\.mlp\.e\.\d+\.(gate|up)$"
    ]  # fmt: skip


def test_a_single_name_is_exact():
    labels = {"m.layers.0.q": 1, "m.layers.1.q": 2, "head": 3}
    assert texts(describe(labels)[1]) == ["m.layers.0.q"]
    assert texts(describe(labels)[3]) == ["head"]


def test_a_name_that_ends_as_another_is_written_out():
    labels = {"m.layers.0.q": 1, "m.layers.1.q": 1, "tower.layers.0.q": 2, "tower.layers.1.q": 2}
    assert texts(describe(labels)[1]) == [r"^m\.layers\.\d+\.q$"]


def test_a_dot_is_a_dot():
    (rule,) = describe({"m.layers.0.q": 1, "m.layers.1.q": 1})[1]
    assert re.match(rule.regex, "m.layers.1.q")
    assert not re.match(rule.regex, "m.layers.1xq")
