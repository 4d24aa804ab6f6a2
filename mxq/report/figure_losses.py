"""Curves and bars: loss against bytes, loss by layer, predicted against measured, time by layer."""

from collections.abc import Mapping, Sequence
from html import escape

import plotly.graph_objects as go

from mxq.artifacts import MeasuredLayers
from mxq.report import palette
from mxq.report.curve import Curve, Point
from mxq.report.facts import Facts
from mxq.report.figure_parts import base, by_layer, log_axis, log_range, stack
from mxq.report.times import Times

MOST_NAMED = 40
"""Points up to which each has its name beside it."""


def loss_against_bytes(curve: Curve) -> go.Figure:
    """Predicted loss of uniform plans, of neighbours and of this plan against their bytes."""
    line = sorted((*curve.neighbours, curve.plan), key=lambda point: point.block_bytes)
    solved = {"line": {"color": palette.NEIGHBOUR, "width": 2}, "marker": {"size": 6}}
    square = {"size": 10, "symbol": "square", "color": palette.UNIFORM}
    star = {"size": 18, "symbol": "star", "color": palette.PLAN}
    uniform = _points(curve.uniform, "uniform plans", mode="markers+text", marker=square)
    # Names of the larger plans go to the left, where the curve has left room.
    sides = ["top right" if x < max(uniform.x) / 1.5 else "top left" for x in uniform.x]
    uniform.update(textposition=sides, textfont={"size": 11, "color": palette.MUTED})
    figure = go.Figure(
        [
            _points(line, "solved again", mode="lines+markers", **solved),
            uniform,
            _points([curve.plan], "this plan", mode="markers", marker=star),
        ]
    )
    base(figure, 420)
    losses = [point.loss for point in (*line, *curve.uniform) if point.loss > 0]
    figure.update_xaxes(title_text="MB of the quantized blocks")
    figure.update_yaxes(title_text=f"predicted loss, {escape(curve.unit)}")
    return figure.update_yaxes(log_axis(log_range(losses)))


def loss_by_layer(facts: Facts) -> go.Figure | None:
    """Predicted loss of each layer as a stack of its projections, measured beside it if known."""
    if facts.table is None:
        return None
    layers = list(facts.layer_numbers)
    figure = go.Figure(stack(_losses(facts), layers, "predicted %{y:.3g}"))
    if facts.layers is not None:
        figure.add_trace(
            go.Scatter(
                name="measured",
                x=layers,
                y=_measured(facts.layers, layers),
                mode="markers",
                marker={
                    "symbol": "diamond",
                    "size": 11,
                    "color": palette.INK,
                    "line": {"width": 1, "color": palette.SURFACE},
                },
                hovertemplate="layer %{x}<br>measured %{y:.3g}<extra></extra>",
            )
        )
    by_layer(figure, layers)
    return figure.update_yaxes(title_text=f"loss, {escape(facts.table.unit)}", rangemode="tozero")


def predicted_against_measured(facts: Facts) -> go.Figure | None:
    """Loss of each layer, predicted against measured, with the diagonal; None if not measured."""
    if facts.layers is None or facts.table is None:
        return None
    sums = predicted_by_layer(facts)
    pairs = zip(sums.items(), _measured(facts.layers, list(sums)), strict=True)
    # A logarithmic axis has no place for 0.
    shown = [(layer, x, y) for (layer, x), y in pairs if x > 0 and y is not None and y > 0]
    if not shown:
        return None
    ends = log_range([value for _, x, y in shown for value in (x, y)])
    diagonal = [10**end for end in ends]
    layers = go.Scatter(
        x=[x for _, x, _ in shown],
        y=[y for _, _, y in shown],
        text=[str(layer) for layer, _, _ in shown],
        mode="markers+text" if len(shown) <= MOST_NAMED else "markers",
        textposition="top center",
        textfont={"size": 11, "color": palette.MUTED},
        marker={"size": 10, "color": palette.MEASURED},
        hovertemplate="layer %{text}<br>predicted %{x:.3g}<br>measured %{y:.3g}<extra></extra>",
    )
    dashes = {"color": palette.NEIGHBOUR, "dash": "dash", "width": 1}
    equal = go.Scatter(x=diagonal, y=diagonal, mode="lines", line=dashes, hoverinfo="skip")
    figure = base(go.Figure([equal, layers]), 420)
    figure.update_xaxes(title_text=f"predicted, {escape(facts.table.unit)}", tickangle=0)
    figure.update_yaxes(title_text="measured KL, nats per token")
    for update in (figure.update_xaxes, figure.update_yaxes):
        update(constrain="domain", **log_axis(ends))
    figure.update_yaxes(scaleanchor="x")  # the diagonal is one
    return figure.update_layout(showlegend=False)


def time_by_layer(times: Times) -> go.Figure:
    """Microseconds of one step by layer, a stack of its projections."""
    layers = sorted({layer for layer, _ in times.us})
    figure = go.Figure(stack(times.us, layers, "%{y:.2f} us"))
    return by_layer(figure, layers).update_yaxes(title_text="us in one step")


def predicted_by_layer(facts: Facts) -> dict[int, float]:
    """The predicted loss of each layer of the plan."""
    sums = dict.fromkeys(facts.layer_numbers, 0.0)
    for (layer, _), loss in _losses(facts).items():
        sums[layer] += loss
    return sums


def _losses(facts: Facts) -> Mapping[tuple[int, str], float]:
    sums: dict[tuple[int, str], float] = {}
    for cell in facts.cells:
        key = (cell.layer, cell.column)
        sums[key] = sums.get(key, 0.0) + (cell.loss or 0.0)
    return sums


def _measured(measured: MeasuredLayers, layers: Sequence[int]) -> list[float | None]:
    """The measured loss of those layers; None for one that was not measured."""
    return [measured.kl[layer] if layer < len(measured.kl) else None for layer in layers]


def _points(points: Sequence[Point], name: str, **style: object) -> go.Scatter:
    """Plans as points; a loss of 0 has no place on a logarithmic axis."""
    shown = [point for point in points if point.loss > 0]
    return go.Scatter(
        x=[point.block_bytes / 1e6 for point in shown],
        y=[point.loss for point in shown],
        name=name,
        text=[escape(point.label) for point in shown],
        customdata=[point.bits for point in shown],
        hovertemplate="<b>%{text}</b><br>%{customdata:.3f} bits per weight, %{x:.4g} MB<br>"
        "predicted loss %{y:.4g}<extra></extra>",
        **style,
    )
