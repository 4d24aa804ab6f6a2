"""Parts that the figures share: axes, panels beside each other, stacks by layer, hover texts.

Colours are those of ``palette`` for light, and every text from a model is escaped: plotly reads
some markup in texts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, TypeVar

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mxq.report import palette

WIDE = 40
"""Columns of a heat map from which maps stand below each other, without gaps between cells."""

WORDY = 12
"""Columns up to which cells of a heat map have room for a number."""

TITLE_PX, AXIS_PX, BAR_PX = 34, 54, 30

NARROWEST_PX = 640
"""Width that a figure has at least, on paper and on a phone, where it scrolls."""

SIDE_PX, DIGIT_PX = 80, 9
"""What is beside the panels, and a digit of a label with its part of the gap."""

LOG_STEPS = (
    (1,),
    (1, 3),
    (1, 2, 5),
    (1, 1.5, 2, 3, 4, 5, 7),
    (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8),
    (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9),
)
"""Ticks of a decade, few to many."""

LEAST_TICKS = 4

Item = TypeVar("Item")


def grouped(items: Sequence[Item], key: Callable[[Item], str]) -> dict[str, list[Item]]:
    """Items by key, keys in the order in which they come first."""
    found: dict[str, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def base(figure: go.Figure, height: int) -> go.Figure:
    """Set what all figures have in common: no background, fonts, thin lines."""
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 64, "r": 16, "t": TITLE_PX, "b": AXIS_PX},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13, "color": palette.INK},
        hoverlabel={
            "bgcolor": palette.SURFACE,
            "bordercolor": palette.NEIGHBOUR,
            "font": {"color": palette.INK, "size": 13},
            "align": "left",
        },
        hovermode="closest",
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    )
    line = {"gridcolor": palette.LINE, "linecolor": palette.LINE, "zerolinecolor": palette.LINE}
    title = {"font": {"size": 13, "color": palette.MUTED}, "standoff": 8}
    figure.update_xaxes(
        **line, title=title, tickfont={"color": palette.MUTED, "size": 12}, fixedrange=True
    )
    figure.update_yaxes(
        **line, title=title, tickfont={"color": palette.MUTED, "size": 12}, fixedrange=True
    )
    figure.update_yaxes(automargin=True)
    return figure


def panels(titles: Sequence[str], columns: int, rows: int) -> go.Figure:
    """Subplots for heat maps of that many cells: beside each other, or below if they are wide."""
    beside = 1 if columns > WIDE else min(len(titles), 3 if columns <= WORDY else 2)
    lines = -(-len(titles) // beside)
    panel_px = min(max(rows * (5 if columns > WIDE else 24), 84), 460)
    height = lines * (panel_px + TITLE_PX) + AXIS_PX + BAR_PX
    figure = make_subplots(
        rows=lines,
        cols=beside,
        shared_yaxes=True,
        shared_xaxes=True,
        subplot_titles=[escape(title) for title in titles],
        horizontal_spacing=0.03,
        vertical_spacing=TITLE_PX / (height - TITLE_PX - AXIS_PX - BAR_PX) if lines > 1 else 0,
    )
    base(figure, height)
    figure.update_layout(margin_t=TITLE_PX + BAR_PX)
    figure.update_annotations(font={"size": 13, "color": palette.INK})
    wide_px = (NARROWEST_PX - SIDE_PX) / beside
    figure.update_xaxes(showgrid=False, zeroline=False, dtick=step(columns, wide_px), tickangle=0)
    figure.update_yaxes(showgrid=False, zeroline=False, autorange="reversed")
    for number in range(len(titles) - beside, len(titles)):  # nothing is below these
        figure.update_xaxes(showticklabels=True, row=number // beside + 1, col=number % beside + 1)
    return figure


def panel(figure: go.Figure, number: int) -> dict[str, int]:
    """Row and column of a panel, as ``add_trace`` takes them."""
    beside = max(1, len(figure._get_subplot_rows_columns()[1]))
    return {"row": number // beside + 1, "col": number % beside + 1}


def heat_map(
    z: Sequence[Sequence[float | None]],
    told: Sequence[Sequence[str]],
    x: Sequence[int],
    y: Sequence[int] | Sequence[str],
    *,
    shown: str,
) -> go.Heatmap:
    """A heat map on the figure's colour axis; ``told`` is what a cell says when pointed at.

    ``shown`` is the format of the number in a cell, where cells have room for one.
    """
    gap = 0 if len(x) > WIDE else 2
    return go.Heatmap(
        z=z,
        x=list(x),
        y=list(y),
        customdata=told,
        coloraxis="coloraxis",
        xgap=gap,
        ygap=gap,
        hoverongaps=False,
        texttemplate=shown if len(x) <= WORDY else None,
        hovertemplate="%{customdata}<extra></extra>",
    )


def colour_axis(
    colours: tuple[str, ...], ends: tuple[float, float], ticks: Mapping[float, str]
) -> dict[str, Any]:
    """The layout of a colour axis with its bar."""
    return {
        "colorscale": palette.scale(colours),
        "cmin": ends[0],
        "cmax": ends[1],
        "colorbar": {
            "orientation": "h",
            "yref": "container",
            "xref": "container",
            "x": 0,
            "xanchor": "left",
            "y": 1,
            "yanchor": "top",
            "len": 300,
            "lenmode": "pixels",
            "ypad": 0,
            "xpad": 12,
            "tickvals": list(ticks),
            "ticktext": list(ticks.values()),
            "tickfont": {"color": palette.MUTED, "size": 11},
            "outlinewidth": 0,
            "thickness": 10,
        },
    }


def stack(
    values: Mapping[tuple[int, str], float], layers: Sequence[int], shown: str
) -> list[go.Bar]:
    """Bars by layer, the largest kinds one upon the other and the small ones as one.

    ``values`` are by layer and kind; ``shown`` is the format of a value when pointed at.
    """
    totals: dict[str, float] = {}
    for (_, kind), value in values.items():
        totals[kind] = totals.get(kind, 0.0) + value
    room = len(palette.KINDS)
    named = list(totals)
    if len(named) > room:
        named = sorted(sorted(named, key=lambda kind: -totals[kind])[: room - 1], key=named.index)
    rows = {kind: dict.fromkeys(layers, 0.0) for kind in named}
    if len(totals) > room:
        rows["others"] = dict.fromkeys(layers, 0.0)
    for (layer, kind), value in values.items():
        rows[kind if kind in rows else "others"][layer] += value
    return [
        go.Bar(
            name=escape(kind),
            x=list(layers),
            y=list(row.values()),
            marker={"color": colour},
            hovertemplate=f"layer %{{x}}, {escape(kind)}<br>{shown}<extra></extra>",
        )
        for (kind, row), colour in zip(rows.items(), palette.KINDS, strict=False)
    ]


def by_layer(figure: go.Figure, layers: Sequence[int], height: int = 360) -> go.Figure:
    """Lay out a figure of bars by layer."""
    base(figure, height)
    figure.update_layout(barmode="stack", bargap=max(0.1, 0.7 - 0.04 * len(layers)))
    figure.update_layout(legend_traceorder="normal")
    distance = step(1 + max(layers), NARROWEST_PX - SIDE_PX)
    figure.update_xaxes(title_text="layer", dtick=distance, tickangle=0, showgrid=False)
    figure.update_xaxes(range=[min(layers) - 0.6, max(layers) + 0.6])
    return figure


def step(count: int, wide_px: float) -> int:
    """Distance of ticks so that the numbers 0 to ``count - 1`` have room on that many pixels."""
    label_px = DIGIT_PX * (1 + len(str(count - 1)))
    distance = 1
    while count / distance * label_px > wide_px:
        distance *= 2
    return distance


def log_axis(ends: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis between those powers of ten, with ticks enough to read values."""
    decades = range(math.floor(ends[0]), math.ceil(ends[1]) + 1)
    values: list[float] = []
    for steps in LOG_STEPS:
        values = [part * 10.0**decade for decade in decades for part in steps]
        values = [value for value in values if ends[0] <= math.log10(value) <= ends[1]]
        if len(values) >= LEAST_TICKS:
            break
    return {
        "type": "log",
        "range": list(ends),
        "tickvals": values,
        "ticktext": [_scientific(value) for value in values],
    }


def _scientific(value: float) -> str:
    """A tick as ``2e-5``, or plain where that is short."""
    if 0.01 <= value < 10_000:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def log_range(values: Sequence[float]) -> list[float]:
    """Ends of a logarithmic axis that leaves room around values above 0."""
    low, high = math.log10(min(values)), math.log10(max(values))
    room = max(0.08 * (high - low), 0.12)
    return [low - room, high + room]
