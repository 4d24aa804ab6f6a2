"""What the kernels have to reach, and whether rows of a results file show that they do.

A goal is judged by its worst case; one without a timed row is "not measured". Pure: rows in,
verdicts out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
Value = tuple[str, float]
"""A case in words, and the number that is judged."""

SMALL_EXPERTS = ("Qwen1.5-MoE", "DeepSeek-V2-Lite", "Qwen3-30B-A3B")
LARGE_EXPERTS = "Mixtral-8x7B"
MANY_TOKENS = 8192

W4, W8, W3, W2 = "w4a16_g128_asym", "w8a16_g128_sym", "w3a16_g128_asym", "w2a16_g128_asym"

PEERS_OF = {
    W4: "w4a16_g128_sym",
    W3: "w3a16_g128_sym",
    W2: "w2a16_g128_sym",
    W8: "w8a16_g128_sym",
    "bf16": "bf16",
    "mix-w4-size": "w4a16_g128_sym",
    "mix-w3-size": "w3a16_g128_sym",
}
"""The peers' plan of the same size for a plan of ours."""


@dataclass(frozen=True, slots=True)
class Goal:
    """``goal`` and ``floor`` in ``unit``; ``values`` finds what is judged among the rows."""

    name: str
    unit: str
    goal: float
    floor: float
    values: Callable[[Sequence[Row]], list[Value]]
    less_is_better: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """A goal with its worst and best value, None if nothing was timed."""

    goal: Goal
    worst: Value | None
    best: Value | None
    cases: int

    @property
    def words(self) -> str:
        """Goal reached, floor reached, missed, or not measured."""
        if self.worst is None:
            return "not measured"
        sign = -1 if self.goal.less_is_better else 1
        value = sign * self.worst[1]
        if value >= sign * self.goal.goal:
            return "goal"
        return "floor" if value >= sign * self.goal.floor else "missed"


def judge(rows: Sequence[Row]) -> tuple[Verdict, ...]:
    """Every goal against the timed rows."""
    timed = [row for row in rows if row["median_us"] is not None]
    verdicts = []
    for goal in GOALS:
        values = sorted(goal.values(timed), key=lambda value: value[1])
        if goal.less_is_better:
            values.reverse()
        ends = (values[0], values[-1]) if values else (None, None)
        verdicts.append(Verdict(goal, *ends, len(values)))
    return tuple(verdicts)


def goal_table(verdicts: Sequence[Verdict]) -> list[str]:
    """Lines of a Markdown table: goal, floor, measured, verdict."""
    lines = [
        "| goal | unit | goal | floor | worst measured | best | cases | verdict |",
        "| --- | --- | ---: | ---: | --- | ---: | ---: | --- |",
    ]
    for verdict in verdicts:
        goal = verdict.goal
        worst = "-" if verdict.worst is None else f"{verdict.worst[1]:.3g} ({verdict.worst[0]})"
        best = "-" if verdict.best is None else f"{verdict.best[1]:.3g}"
        lines.append(
            f"| {goal.name} | {goal.unit} | {goal.goal:g} | {goal.floor:g} | {worst} | {best} "
            f"| {verdict.cases} | {verdict.words} |"
        )
    return lines


def _decode_bandwidth(*plans: str) -> Callable[[Sequence[Row]], list[Value]]:
    """Weight bytes a second where tiles fill the GPU: the large experts, or 16 tokens and more."""

    def values(rows: Sequence[Row]) -> list[Value]:
        return [
            (f"{row['plan']} {_where(row)}", row["weight_tb_s"])
            for row in _ours(rows)
            if row["plan"] in plans
            and row["tokens"] <= 64
            and (row["model"] == LARGE_EXPERTS or row["tokens"] >= 16)
        ]

    return values


def _speed_up(plan: str, tokens: Sequence[int]) -> Callable[[Sequence[Row]], list[Value]]:
    """Time of our own bf16 over that of a plan."""

    def values(rows: Sequence[Row]) -> list[Value]:
        ours = _ours(rows)
        bf16 = {(row["model"], row["tokens"]): row["median_us"] for row in _of(ours, "bf16")}
        return [
            (_where(row), bf16[row["model"], row["tokens"]] / row["median_us"])
            for row in _of(ours, plan)
            if row["tokens"] in tokens and (row["model"], row["tokens"]) in bf16
        ]

    return values


def _first_token(rows: Sequence[Row]) -> list[Value]:
    return [
        (_where(row), row["median_us"])
        for row in _of(_ours(rows), W4)
        if row["tokens"] == 1 and row["model"] in SMALL_EXPERTS
    ]


def _against_torch(rows: Sequence[Row]) -> list[Value]:
    peers = {
        (row["model"], row["tokens"]): row["median_us"]
        for row in _pairs(rows)
        if row["runner"] == "torch" and row["plan"] == "bf16"
    }
    return [
        (_where(row), peers[row["model"], row["tokens"]] / row["median_us"])
        for row in _of(_ours(rows), "bf16")
        if row["tokens"] == MANY_TOKENS and (row["model"], row["tokens"]) in peers
    ]


def _one_launch(rows: Sequence[Row]) -> list[Value]:
    """Time of one launch for each format over that of one launch for all."""
    apart = {_place(row): row["median_us"] for row in _pairs(rows) if row["launches"] == "single"}
    return [
        (f"{row['plan']} {_where(row)} {row['routing']}", apart[_place(row)] / row["median_us"])
        for row in _pairs(rows)
        if row["launches"] == "mixed" and row["tokens"] <= 256 and _place(row) in apart
    ]


def _against_peers(rows: Sequence[Row]) -> list[Value]:
    """Time of the best peer of the same size over ours."""
    peers: dict[tuple[str, str, int], float] = {}
    for row in _pairs(rows):
        if row["runner"] != "mxq" and row["routing"] == "uniform":
            place = row["plan"], row["model"], row["tokens"]
            peers[place] = min(row["median_us"], peers.get(place, float("inf")))
    values = []
    for row in _ours(rows):
        place = PEERS_OF.get(row["plan"], ""), row["model"], row["tokens"]
        if row["tokens"] <= 64 and place in peers:
            values.append((f"{row['plan']} {_where(row)}", peers[place] / row["median_us"]))
    return values


def _same_bits(rows: Sequence[Row]) -> list[Value]:
    return [
        (row["key"], float(row["identical_bits"]))
        for row in rows
        if row["runner"] == "mxq" and row["identical_bits"] is not None
    ]


def _pairs(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["kind"] == "pair"]


def _ours(rows: Sequence[Row]) -> list[Row]:
    """Our pairs in one launch with a uniform routing."""
    return [
        row
        for row in _pairs(rows)
        if (row["runner"], row["launches"], row["routing"]) == ("mxq", "mixed", "uniform")
    ]


def _of(rows: Sequence[Row], plan: str) -> list[Row]:
    return [row for row in rows if row["plan"] == plan]


def _place(row: Row) -> tuple[str, ...]:
    return tuple(str(row[key]) for key in ("runner", "model", "plan", "tokens", "routing"))


def _where(row: Row) -> str:
    return f"{row['model']} M={row['tokens']}"


DECODE = (16, 64)

GOALS = (
    Goal("decode, full waves, w4a16", "TB/s", 2.8, 2.4, _decode_bandwidth(W4)),
    Goal("decode, full waves, w8 and bf16", "TB/s", 3.4, 3.0,
         _decode_bandwidth("bf16", W8, "w8a8_grow_sym", "fp8")),
    Goal("decode, full waves, w3a16", "TB/s", 2.5, 2.1, _decode_bandwidth(W3)),
    Goal("decode, full waves, w2a16", "TB/s", 2.0, 1.6, _decode_bandwidth(W2)),
    Goal("w8a16 against own bf16, M=16..64", "x", 1.8, 1.6, _speed_up(W8, DECODE)),
    Goal("w4a16 against own bf16, M=16..64", "x", 3.0, 2.5, _speed_up(W4, DECODE)),
    Goal("w3a16 against own bf16, M=16..64", "x", 3.6, 2.8, _speed_up(W3, DECODE)),
    Goal("w2a16 against own bf16, M=16..64", "x", 4.2, 3.2, _speed_up(W2, DECODE)),
    Goal("M=1, small experts, w4a16, both products", "us", 14, 20, _first_token, True),
    Goal("prefill M=8192, bf16 against torch grouped_mm", "x", 1.0, 0.9, _against_torch),
    Goal("prefill M=8192, w8a8 against own bf16", "x", 1.65, 1.4,
         _speed_up("w8a8_grow_sym", (MANY_TOKENS,))),
    Goal("prefill M=8192, fp8 against own bf16", "x", 1.65, 1.4, _speed_up("fp8", (MANY_TOKENS,))),
    Goal("prefill M=8192, w4a8 against own bf16", "x", 1.55, 1.3,
         _speed_up("w4a8_grow_sym", (MANY_TOKENS,))),
    Goal("prefill M=8192, w4a16 against own bf16", "x", 0.8, 0.65, _speed_up(W4, (MANY_TOKENS,))),
    Goal("mix in one launch against one for each scheme, M<=256", "x", 1.1, 0.97, _one_launch),
    Goal("best uniform peer of the same bytes against ours, M<=64", "x", 1.0, 1.0, _against_peers),
    Goal("same bits in two runs", "share", 1.0, 1.0, _same_bits),
)  # fmt: skip
