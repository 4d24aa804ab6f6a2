"""The sections of the page, in order: what each explains, its figures and its tables.

A section whose facts are missing says so in a sentence; none has an empty plot.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from mxq.counted import counted
from mxq.report.comparison import HEADS, comparison, legend
from mxq.report.curve import Curve
from mxq.report.facts import Facts
from mxq.report.figure_choices import kept_choices as choices_by_layer
from mxq.report.figure_losses import (
    loss_against_bytes,
    loss_by_layer,
    predicted_against_measured,
    time_by_layer,
)
from mxq.report.figure_maps import bits_of_experts, bits_of_linears, use_of_experts
from mxq.report.origin import UNTOLD, command
from mxq.report.times import Times
from mxq.report.words import (
    coverage,
    kept_choices,
    measured_on,
    provenance,
    scheme_uses,
)

NO_WORK = "This needs the sensitivity table of the work folder, which is not there."

KEPT = (
    "That is each router by itself, with what the quantized layers before it give: which experts "
    "it takes for a token, held against those that it takes in the original."
)


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure with the id of its place and a caption, which may be empty."""

    key: str
    caption: str
    figure: go.Figure

    @property
    def height(self) -> int:
        """In pixels, kept free before the figure is drawn."""
        return int(self.figure.layout.height)


@dataclass(frozen=True, slots=True)
class Grid:
    """A table: of ``numbers``, to the right, or of ``words``."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    kind: str = "numbers"


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page; ``short`` is its name in the navigation, ``terms`` explain its tables."""

    key: str
    short: str
    title: str
    words: tuple[str, ...]
    plots: tuple[Plot, ...] = ()
    tables: tuple[Grid, ...] = ()
    lines: tuple[str, ...] = ()
    code: str = ""
    terms: tuple[tuple[str, str], ...] = ()


def make_sections(facts: Facts, curve: Curve | None, times: Times | str) -> tuple[Section, ...]:
    """All sections of the page."""
    return (
        _measured(facts),
        _bits(facts),
        _curve(curve),
        _layers(facts),
        _experts(facts),
        _times(times),
        _coverage(facts),
        _provenance(facts),
    )


def _measured(facts: Facts) -> Section:
    words = f"{measured_on(facts.written.heldout_tokens)}."
    grid, title = Grid(HEADS, comparison(facts)), "Measured beside the original"
    terms = legend(facts.plan.unit)
    return Section("measured", "Measured", title, (words,), tables=(grid,), terms=terms)


def _bits(facts: Facts) -> Section:
    words = "Stored bits of each weight matrix, scales and zero points included."
    if facts.table is None:
        words = "Bits of the codes of each weight matrix; its scales are not counted here."
    experts = bits_of_experts(facts)
    linears = "linears" if experts is None else "other linears"
    found = [
        ("experts-bits", "Bits per weight of routed experts", experts),
        ("linears-bits", f"Bits per weight of {linears}", bits_of_linears(facts)),
    ]
    rows = tuple(
        (
            str(use.scheme),
            f"{use.of_experts:,}",
            f"{use.plain:,}",
            f"{use.blocks / len(facts.cells):.1%}",
        )
        for use in scheme_uses(facts)
    )
    heads = ("format", "blocks of experts", "other linears", "of all blocks")
    return Section(
        "bits", "Bits", "Where the bits went", (words,), _plots(found), (Grid(heads, rows),)
    )


def _curve(curve: Curve | None) -> Section:
    title = "Loss against size"
    if curve is None:
        return Section("curve", "Loss and size", title, (NO_WORK,))
    words = (
        "Predicted loss of the whole model against the bytes of its quantized blocks: lower and "
        f"further left is better. {curve.rule}"
    )
    if not any(point.loss > 0 for point in (curve.plan, *curve.uniform, *curve.neighbours)):
        return Section("curve", "Loss and size", title, ("All predicted losses are 0.",))
    plot = Plot("curve-plot", "", loss_against_bytes(curve))
    return Section("curve", "Loss and size", title, (words,), (plot,))


def _layers(facts: Facts) -> Section:
    title = "Loss by layer"
    if facts.table is None:
        return Section("layers", "Layers", title, (NO_WORK,))
    words = ["The predicted loss of each layer, by what it is made of."]
    if facts.layers is None:
        words.append("Single layers were not measured; mxq report with --measure-layers does that.")
    else:
        words.append(
            f"Measured is the KL of the original with that one layer quantized, on "
            f"{counted(facts.layers.tokens, 'held-out token')}; on the diagonal the prediction is "
            "exact."
        )
    found = [
        ("layers-plot", "", loss_by_layer(facts)),
        ("agreement-plot", "Predicted against measured", predicted_against_measured(facts)),
    ]
    return Section("layers", "Layers", title, tuple(words), _plots(found))


def _experts(facts: Facts) -> Section:
    title, words = "Which text uses which expert", []
    use = None if facts.profile is None else use_of_experts(facts.profile)
    if facts.profile is None:
        words.append("The profile of the run is not there.")
    elif use is None:
        words.append("This model has no routed experts.")
    else:
        words.append(
            "Tokens that the routers sent to each expert, of "
            f"{counted(facts.profile.total_tokens, 'profiled token')} (the fitting and the spare "
            "ones), by domain of the text."
        )
    kept = kept_choices(facts.written_pack.expert_choices)
    if kept:
        words += [*kept, KEPT]
    found = [
        ("experts-plot", "Tokens over an equal split", use),
        ("choices-plot", "Choices of experts kept", choices_by_layer(facts)),
    ]
    return Section("experts", "Experts", title, tuple(words), _plots(found))


def _times(times: Times | str) -> Section:
    title = "Time of one step"
    if isinstance(times, str):
        return Section("time", "Time", title, (times,))
    by_launch = (
        ""
        if times.by_launch_us is None
        else (f" Launch by launch, each until its last tile ends: {times.by_launch_us:.1f} us.")
    )
    words = (
        f"{times.total_us:.1f} us for the blocks in a step of {counted(times.tokens, 'token')}, by "
        f"the cost model ({times.source}).{by_launch} Routing, rounding of inputs, rotation and "
        "activation functions are not counted."
    )
    plot = Plot("time-plot", "", time_by_layer(times))
    return Section("time", "Time", title, (words,), (plot,), lines=times.notes)


def _coverage(facts: Facts) -> Section:
    words = ("What was quantized and what was not.",)
    return Section("coverage", "Coverage", "Coverage", words, lines=coverage(facts))


def _provenance(facts: Facts) -> Section:
    line = None if facts.origin is None else command(facts.origin)
    words = UNTOLD if line is None else "This command makes the same checkpoint in the folder OUT."
    grid = Grid(("", ""), provenance(facts), "words")
    title = "How it was made"
    return Section("provenance", "Provenance", title, (words,), tables=(grid,), code=line or "")


def _plots(found: Sequence[tuple[str, str, go.Figure | None]]) -> tuple[Plot, ...]:
    return tuple(_made(found))


def _made(found: Sequence[tuple[str, str, go.Figure | None]]) -> Iterator[Plot]:
    for key, caption, figure in found:
        if figure is not None:
            yield Plot(key, caption, figure)
