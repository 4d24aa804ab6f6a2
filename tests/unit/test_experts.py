"""Fused experts: every layout against separate matrices, routing against transformers' own."""

from itertools import product

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

from mxq.models.adapter import run_experts
from mxq.models.experts import (
    dense_linear,
    expert_bias,
    expert_count,
    expert_inner,
    expert_output,
    expert_weight,
    is_fused_experts,
    locate,
    projection_shapes,
    route,
    routed_tokens,
    run_expert,
    working_linear,
)

E, H, I = 3, 4, 6  # noqa: E741  (experts, outer and inner width)
EPS = torch.finfo(torch.float32).eps


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Fused(nn.Module):
    """Experts in the layout that the flags say, made of separate matrices and biases."""

    def __init__(self, parts, *, gate, bias, transposed, concatenated, norm=False):
        super().__init__()
        self.num_experts, self.has_gate, self.has_bias = E, gate, bias
        self.is_transposed, self.is_concatenated = transposed, concatenated
        self.has_post_expert_norm = norm
        self.act_fn = nn.functional.silu
        weights, biases = parts
        self.down_proj = nn.Parameter(self.stored([weights[e, "down"] for e in range(E)]))
        up = [self.joined([weights[e, p] for p in self.inward()]) for e in range(E)]
        setattr(self, f"{'gate_' if gate else ''}up_proj", nn.Parameter(self.stored(up)))
        if bias:
            self.down_proj_bias = nn.Parameter(torch.stack([biases[e, "down"] for e in range(E)]))
            up = [self.joined([biases[e, p] for p in self.inward()]) for e in range(E)]
            name = f"{'gate_' if gate else ''}up_proj_bias"
            setattr(self, name, nn.Parameter(torch.stack(up)))

    def inward(self):
        return ("gate", "up") if self.has_gate else ("up",)

    def joined(self, rows):
        """Rows of gate and up one after the other, or in turn."""
        if self.is_concatenated:
            return torch.cat(rows)
        return torch.stack([row for pair in zip(*rows, strict=True) for row in pair])

    def stored(self, weights):
        return torch.stack([w.T if self.is_transposed else w for w in weights])

    def _apply_gate(self, gate_up):
        if self.is_concatenated:
            gate, up = gate_up.chunk(2, -1)
        else:
            gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        return self.act_fn(gate) * up

    def post_expert_norm(self, y):
        return 2 * y


def parts():
    shapes = {"gate": (I, H), "up": (I, H), "down": (H, I)}
    weights, biases = {}, {}
    for place, (e, p) in enumerate(product(range(E), shapes)):
        weights[e, p] = random(*shapes[p], seed=place)
        biases[e, p] = random(shapes[p][0], seed=place + 100)
    return weights, biases


LAYOUTS = [
    {"gate": gate, "bias": bias, "transposed": transposed, "concatenated": concatenated}
    for gate, bias, transposed, concatenated in product([True, False], repeat=4)
    if gate or concatenated  # without a gate there is nothing to interleave
]


def layout_id(layout):
    words = [name if on else f"no {name}" for name, on in layout.items()]
    return ", ".join(words)


every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)


@every_layout
def test_each_weight_is_found_in_every_layout(layout):
    weights, _ = parts()
    module = Fused(parts(), **layout)
    for e, p in product(range(E), projection_shapes(module)):
        assert torch.equal(expert_weight(module, e, p), weights[e, p]), (e, p)


@every_layout
def test_each_bias_is_found_in_every_layout(layout):
    _, biases = parts()
    module = Fused(parts(), **layout)
    for e, p in product(range(E), projection_shapes(module)):
        found = expert_bias(module, e, p)
        assert torch.equal(found, biases[e, p]) if layout["bias"] else found is None, (e, p)


@every_layout
def test_locate_names_a_parameter_and_the_rectangle_in_it(layout):
    weights, _ = parts()
    module = Fused(parts(), **layout)
    for e, p in product(range(E), projection_shapes(module)):
        name, index = locate(module, e, p)
        rectangle = module.get_parameter(name)[index]
        expected = weights[e, p].T if layout["transposed"] else weights[e, p]
        assert torch.equal(rectangle, expected), (e, p)


@every_layout
def test_located_rectangles_cover_every_weight_once(layout):
    module = Fused(parts(), **layout)
    seen = {name: torch.zeros_like(p) for name, p in module.named_parameters() if p.dim() == 3}
    for e, p in product(range(E), projection_shapes(module)):
        name, index = locate(module, e, p)
        seen[name][index] += 1
    assert all((count == 1).all() for count in seen.values())


@every_layout
def test_shapes_and_counts_by_hand(layout):
    module = Fused(parts(), **layout)
    expected = {"up": (I, H), "down": (H, I)}
    assert projection_shapes(module) == ({"gate": (I, H)} if layout["gate"] else {}) | expected
    assert tuple(projection_shapes(module))[-2:] == ("up", "down")
    assert expert_count(module) == E
    assert is_fused_experts(module)


@pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.ModuleList(), nn.Identity()])
def test_other_modules_are_not_fused_experts(module):
    assert not is_fused_experts(module)


def plain_expert(layout, e, x_TH):
    """Inner activation and output of one expert, from its separate matrices."""
    weights, biases = parts()

    def linear(p, x):
        return x @ weights[e, p].T + (biases[e, p] if layout["bias"] else 0)

    silu = nn.functional.silu
    up = linear("up", x_TH)
    inner = silu(linear("gate", x_TH)) * up if layout["gate"] else silu(up)
    return inner, linear("down", inner)


@every_layout
def test_an_expert_is_its_three_matrices(layout):
    module, x_TH = Fused(parts(), **layout), random(5, H, seed=7)
    for e in range(E):
        inner, y = plain_expert(layout, e, x_TH)
        linear = dense_linear(module, e)
        # The same products in the same order; the sums over 4 and 6 terms may be taken otherwise.
        found = expert_inner(module, linear, x_TH)
        assert (found - inner).abs().max() <= 8 * EPS * inner.abs().max()
        found = expert_output(module, linear, x_TH)
        assert (found - y).abs().max() <= 32 * EPS * y.abs().max()


@every_layout
def test_an_expert_that_runs_whole_is_the_same(layout):
    module, x_TH = Fused(parts(), **layout, norm=True), random(5, H, seed=7)
    for e in range(E):
        y = expert_output(module, dense_linear(module, e), x_TH)
        # Gate and up are one product here; their sums over 4 terms may be taken otherwise.
        assert (run_expert(module, e, x_TH) - y).abs().max() <= 32 * EPS * y.abs().max()


@every_layout
@pytest.mark.parametrize("projection", ["gate", "up"])
def test_an_expert_that_runs_whole_rounds_its_inputs(layout, projection):
    if projection == "gate" and not layout["gate"]:
        return
    module, x_TH = Fused(parts(), **layout), random(5, H, seed=7)
    module.mxq_inputs = {(1, projection): lambda x: 3 * x}
    expected = expert_output(module, working_linear(module, 1), x_TH)
    assert torch.equal(run_expert(module, 1, x_TH), expected)
    plain = expert_output(module, dense_linear(module, 1), x_TH)
    assert not torch.allclose(expected, plain)


def test_a_norm_after_the_expert_is_applied():
    layout = LAYOUTS[0]
    x_TH = random(5, H)
    plain, normed = Fused(parts(), **layout), Fused(parts(), **layout, norm=True)
    found = [expert_output(m, dense_linear(m, 1), x_TH) for m in (plain, normed)]
    assert torch.equal(found[1], 2 * found[0])


# --- routing ----------------------------------------------------------------------------------


def test_routed_tokens_by_hand():
    index_TR = torch.tensor([[0, 2], [1, 0], [2, 1]])
    rows, positions = routed_tokens(index_TR, 0)
    assert (rows.tolist(), positions.tolist()) == ([0, 1], [0, 1])


def test_routing_by_hand():
    # Expert e multiplies by 10^e. Token 0: 0.5 x 1 + 2 x 100; token 1 goes to expert 1 alone, its
    # other choice being the sentinel 3.
    hidden_TH = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    index_TR = torch.tensor([[0, 2], [3, 1]])
    weights_TR = torch.tensor([[0.5, 2.0], [7.0, 1.0]])
    found = route(hidden_TH, index_TR, weights_TR, 3, lambda e, x: x * 10**e)
    assert found.tolist() == [[200.5, 401.0], [30.0, 40.0]]


def test_an_expert_without_tokens_is_not_run():
    ran = []
    index_TR = torch.tensor([[0], [2], [2]])
    route(torch.ones(3, 2), index_TR, torch.ones(3, 1), 4, lambda e, x: ran.append(len(x)) or x)
    assert ran == [1, 2]


def test_no_token_at_all_is_routed_nowhere():
    empty = torch.zeros(0, 2, dtype=torch.int64)
    assert route(torch.zeros(0, 4), empty, torch.zeros(0, 2), 3, lambda e, x: x).shape == (0, 4)


def test_the_sum_has_the_type_of_the_hidden_states():
    hidden_TH = torch.ones(1, 2, dtype=torch.bfloat16)
    found = route(hidden_TH, torch.tensor([[0]]), torch.ones(1, 1), 1, lambda e, x: x.float())
    assert found.dtype == torch.bfloat16


_SMALL = {"hidden_size": 16, "vocab_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}


def make_experts(experts_class, family, **fields):
    """Experts of a real family with random parameters, running transformers' own loop."""
    config = CONFIG_MAPPING[family](**_SMALL, **fields)
    config._experts_implementation = "eager"
    module = experts_class(config)
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(0.3 * random(*parameter.shape, seed=seed))
    return module


FAMILIES = {
    "gated": lambda: make_experts(
        Qwen2MoeExperts, "qwen2_moe", num_experts=5, moe_intermediate_size=8
    ),
    "interleaved, transposed, biased": lambda: make_experts(
        GptOssExperts, "gpt_oss", num_local_experts=5, intermediate_size=8
    ),
    "without gate": lambda: make_experts(
        NemotronHExperts, "nemotron_h", n_routed_experts=5, moe_intermediate_size=8
    ),
    "transposed": lambda: make_experts(
        AriaExperts, "aria_text", moe_num_experts=5, intermediate_size=8
    ),
    "norm after each expert": lambda: make_experts(
        MuseSparkExperts,
        "muse_spark_text",
        num_local_experts=5,
        moe_hidden_size=16,
        moe_intermediate_size=8,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_equal_those_of_transformers(family):
    module, tokens = FAMILIES[family](), 40
    hidden_TH = random(tokens, 16)
    # Expert 4 gets no token, and token 0 has all its weight on expert 3.
    index_TR = random(tokens, 4, seed=1).topk(2).indices
    weights_TR = random(tokens, 2).softmax(-1)
    index_TR[0], weights_TR[0] = torch.tensor([3, 1]), torch.tensor([1.0, 0.0])
    with torch.no_grad():
        expected = module(hidden_TH, index_TR, weights_TR)
        found = run_experts(module, hidden_TH, index_TR, weights_TR)
    # Products of 16 and of 8 terms, rounded in another order at most; values are near 1.
    assert (found - expected).abs().max() <= 32 * EPS * expected.abs().max()
    assert expected.abs().max() > 0.1
