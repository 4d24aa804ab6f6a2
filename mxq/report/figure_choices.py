"""The figure of kept choices: how often each layer's router chooses as in the original."""

import plotly.graph_objects as go

from mxq.report import palette
from mxq.report.facts import Facts
from mxq.report.figure_parts import by_layer
from mxq.report.words import plan_name

COLOURS = (palette.PLAN, palette.UNIFORM)
"""Of the plan that was written and of the one beside it."""


def kept_choices(facts: Facts) -> go.Figure | None:
    """Share of the original's choices of experts that are kept by layer, for every packed plan.

    None where the plan that was written does not know.
    """
    names = [facts.record.written, *(n for n in facts.results if n != facts.record.written)]
    known = {name: facts.record.packs[name].expert_choices for name in names}
    if not known[facts.record.written]:
        return None
    figure = go.Figure()
    for (name, found), colour in zip(known.items(), COLOURS, strict=False):
        label = plan_name(facts.results[name].description)
        figure.add_trace(
            go.Scatter(
                name=f"{label}, written" if facts.results[name].written else label,
                x=[one.layer for one in found],
                y=[one.share for one in found],
                customdata=[[f"{one.kept:,}", f"{one.choices:,}"] for one in found],
                mode="lines+markers",
                line={"color": colour, "width": 2},
                marker={"size": 7},
                hovertemplate="layer %{x}<br>%{y:.2%}: %{customdata[0]} of %{customdata[1]} choices"
                "<extra></extra>",
            )
        )
    by_layer(figure, sorted({one.layer for found in known.values() for one in found}), 280)
    figure.update_xaxes(zeroline=False)
    least = min(one.share for found in known.values() for one in found)
    room = max(0.08 * (1 - least), 1e-4)
    return figure.update_yaxes(
        title_text="choices kept", tickformat=".4~p", range=[least - room, 1 + room]
    )
