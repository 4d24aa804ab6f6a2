"""The cases in order of importance: what a goal needs first, then the grid, then the variants."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from group_gemm.shapes import MODELS, TOKENS, UNIFORM, Model, Routing, mixes

OURS = "mxq"

SKEWED_TOKENS = (16, 64, 256, 1024)
LAYER_PLANS = ("w4a16_g128_asym", "bf16", "w8a8_grow_sym", "mix-w4-size")

PEERS = {
    "torch": ("bf16", "fp8"),
    "humming-indexed": ("w4a16_g128_sym", "w8a16_g128_sym", "w3a16_g128_sym", "w2a16_g128_sym"),
    "humming-grouped": ("w4a16_g128_sym", "w8a8_grow_sym", "w4a8_grow_sym"),
    "flag-gems": ("w4a16_g128_sym", "bf16", "w8a16_g128_sym"),
}
"""Schemes that each peer is timed with; symmetric ones, which are their shortest path."""


@dataclass(frozen=True, slots=True)
class Case:
    """One row: who computes what, for how many tokens routed how.

    ``kind`` "pair" is both products on inputs that are there, "layer" everything from the router's
    choice to the weighted sum. ``launches`` "single" is one launch for each format.
    """

    kind: str
    runner: str
    model: str
    plan: str
    tokens: int
    routing: Routing = "uniform"
    launches: str = "mixed"

    @property
    def key(self) -> str:
        """What names the row in a results file."""
        words = (self.kind, self.runner, self.model, self.plan, self.tokens, self.routing)
        return "/".join(map(str, (*words, self.launches)))


@dataclass(frozen=True, slots=True)
class Block:
    """Cases in every combination, the models innermost."""

    plans: tuple[str, ...]
    tokens: tuple[int, ...]
    runner: str = OURS
    kind: str = "pair"
    routings: tuple[Routing, ...] = ("uniform",)
    launches: tuple[str, ...] = ("mixed",)


BOTH = ("mixed", "single")
FEW, MANY = (64, 16, 4, 1), 8192
MIX = ("mix-w4-size",)
PEER_NAMES = ("humming-indexed", "flag-gems", "humming-grouped")

GOAL_BLOCKS = (
    Block(UNIFORM[:5], FEW),
    Block((*UNIFORM[:2], *UNIFORM[5:8]), (MANY,)),
    Block(("bf16",), (MANY,), "torch"),
    Block(MIX, (16, 64, 1, 4, 256), launches=BOTH),
    *(Block(PEERS[name][:1], FEW, name) for name in PEER_NAMES),
    Block(LAYER_PLANS[:2], (1,), kind="layer"),
)
"""What the goals are judged by: decoding, prefill, launches, peers, the first token."""

GRID_BLOCKS = (
    Block(UNIFORM[:8], TOKENS),
    Block(PEERS["torch"], TOKENS, "torch"),
    Block(tuple(mixes()), TOKENS, launches=BOTH),
    *(Block(PEERS[name][:1], TOKENS, name) for name in PEER_NAMES),
)
"""Uniform plans and mixes over all numbers of tokens, and peers beside them."""

VARIANT_BLOCKS = (
    Block(("w4a16_g128_asym", "bf16"), SKEWED_TOKENS, routings=("zipf", "traced")),
    Block(MIX, SKEWED_TOKENS, routings=("zipf", "traced"), launches=BOTH),
    Block(LAYER_PLANS, TOKENS, kind="layer"),
    *(Block(plans, TOKENS, name) for name, plans in PEERS.items()),
    Block(UNIFORM[8:], TOKENS),
)
"""Skewed and traced routings, whole layers, peers in other widths, the last uniform plans."""


def all_cases(models: Sequence[Model] = MODELS, tokens: Sequence[int] = TOKENS) -> tuple[Case, ...]:
    """Every case of these models and numbers of tokens once, most important first."""
    found = [
        Case(block.kind, block.runner, model.name, plan, count, routing, launches)
        for block in (*GOAL_BLOCKS, *GRID_BLOCKS, *VARIANT_BLOCKS)
        for count, routing, plan, launches in product(
            block.tokens, block.routings, block.plans, block.launches
        )
        for model in models
        if count in tokens
    ]
    return tuple(dict.fromkeys(found))
