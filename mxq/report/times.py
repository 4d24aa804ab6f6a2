"""Where the time of one step goes, by the cost model that the plan was solved with."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mxq.config import AllocateOptions
from mxq.latency import Pricing, latency_report, load_pricing
from mxq.report.facts import Facts

FAR = 0.005
"""Relative difference of two latencies from which they are of different prices."""


@dataclass(frozen=True, slots=True)
class Times:
    """Microseconds of one step by layer and column of the plan, all additive.

    ``by_launch_us`` is the time launch by launch, None where only a roofline is known.
    """

    source: str
    tokens: int
    us: Mapping[tuple[int, str], float]
    by_launch_us: float | None
    notes: tuple[str, ...]

    @property
    def total_us(self) -> float:
        """The sum, which ``--max-latency`` limits."""
        return sum(self.us.values())


def step_times(facts: Facts, profiles: Path | None = None) -> Times | str:
    """The times of a plan, or a sentence on why they are not known.

    ``profiles`` is the folder of measured profiles of devices.
    """
    if facts.plan.latency_source is None:
        return (
            "No device was named when this plan was solved: name --device and --tokens to mxq "
            "quantize, or to mxq allocate and pack again."
        )
    known = f"{facts.plan.predicted_latency_us:.1f} us in one step ({facts.plan.latency_source})"
    asked = None if facts.origin is None else facts.origin.allocate
    if facts.table is None or asked is None or asked.device is None or asked.tokens is None:
        return f"{known}. Its parts are not known without the work folder."
    try:
        pricing = load_pricing(asked.device, profiles)
    except ValueError as error:
        return f"{known}. Its parts cannot be priced again: {error}."
    return _times(facts, asked, pricing)


def _times(facts: Facts, asked: AllocateOptions, pricing: Pricing) -> Times:
    assert facts.table is not None
    assert asked.tokens is not None
    table = facts.table
    prices_BS = pricing.cost.latency_us(
        table.blocks,
        table.schemes,
        tokens=asked.tokens,
        calibration_tokens=table.calibration_tokens,
    )
    place = {scheme: column for column, scheme in enumerate(table.schemes)}
    us: dict[tuple[int, str], float] = {}
    for number, cell in enumerate(facts.cells):
        key = (cell.layer, cell.column)
        us[key] = us.get(key, 0.0) + float(prices_BS[number, place[cell.scheme]])
    report = latency_report(table, {"plan": facts.plan}, pricing, asked.tokens)
    step = report.steps.get("plan")
    notes = list(report.notes)
    before = facts.plan.predicted_latency_us or 0.0
    if abs(sum(us.values()) - before) > FAR * before:
        notes.append(
            f"The plan was solved with {before:.1f} us ({facts.plan.latency_source}); prices have "
            "changed since."
        )
    by_launch = None if step is None else step.total_us
    return Times(pricing.cost.describe(), asked.tokens, us, by_launch, tuple(notes))
