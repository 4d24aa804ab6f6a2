"""Loss against size, as one HTML page that needs no network: points with their intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from mxq.evaluation.statistics import Estimate

if TYPE_CHECKING:
    from plotly.graph_objects import Figure, Scatter

DISTANCE = "KL to the reference (nats per token, log)"
"""The panel whose axis is logarithmic."""

PANEL_HEIGHT = 380
"""Pixels of one panel."""


@dataclass(frozen=True, slots=True)
class Point:
    """A model: its bytes on disk, and a value for some of the panels."""

    model: str
    file_bytes: int
    bits_per_weight: float | None
    values: Mapping[str, Estimate]


def require_plotly(path: Path | None) -> None:
    """Refuse a plot that could not be drawn, before the work and not after it.

    Raises:
        ValueError: If plotly is not installed.
    """
    if path is None:
        return
    try:
        import plotly  # noqa: F401  (whether it is there)
    except ImportError as error:
        raise ValueError(
            f"--plot is drawn by plotly, which cannot be imported ({error}); install it with: "
            "pip install 'mxq[report]'"
        ) from error


def write_plot(path: Path, points: Sequence[Point], title: str) -> None:
    """Write the page; plotly itself is inside it."""
    draw(points, title).write_html(path, include_plotlyjs=True, config={"displaylogo": False})


def draw(points: Sequence[Point], title: str) -> "Figure":
    """A panel for each quantity that some point has, all over the size on disk.

    A distance to the reference has a logarithmic axis, on which the reference has no place.
    """
    from plotly.subplots import make_subplots

    names = list(dict.fromkeys(name for point in points for name in point.values))
    figure = make_subplots(rows=len(names), cols=1, subplot_titles=names, vertical_spacing=0.12)
    for row, name in enumerate(names, start=1):
        is_distance = name == DISTANCE
        for color, point in enumerate(points):
            if name in point.values and not (is_distance and point.values[name].value <= 0):
                figure.add_trace(_trace(point, name, color, first=row == 1), row=row, col=1)
        figure.update_xaxes(title_text="size on disk (MB)", rangemode="tozero", row=row, col=1)
        if is_distance:
            figure.update_yaxes(type="log", row=row, col=1)
    figure.update_layout(
        template="plotly_white",
        height=PANEL_HEIGHT * len(names),
        legend_title_text="model",
        title_text=escape(title),
    )
    return figure


def _trace(point: Point, name: str, color: int, *, first: bool) -> "Scatter":
    """One point with its interval; the first panel's points make the legend."""
    from plotly.colors import qualitative
    from plotly.graph_objects import Scatter

    found, colors = point.values[name], qualitative.Safe
    bits = "" if point.bits_per_weight is None else f"<br>{point.bits_per_weight:.4g} bits a weight"
    has_interval = found.low is not None and found.high is not None
    return Scatter(
        x=[point.file_bytes / 1e6],
        y=[found.value],
        error_y=_error_bar(found) if has_interval else None,
        mode="markers",
        marker={"size": 9, "symbol": color, "color": colors[color % len(colors)]},
        name=escape(point.model),
        legendgroup=str(color),
        showlegend=first,
        hovertemplate=f"%{{x:.3f}} MB{bits}<br>%{{y:.6g}}",
    )


def _error_bar(found: Estimate) -> dict[str, object]:
    """From the value to the ends of the interval."""
    assert found.low is not None
    assert found.high is not None
    return {
        "type": "data",
        "symmetric": False,
        "array": [found.high - found.value],
        "arrayminus": [found.value - found.low],
    }
