"""Heat maps: bits by layer and expert, bits of other linears, use of experts by domain.

A map is one trace for each projection or domain, whatever the number of experts.
"""

import math
from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go

from mxq.counted import counted
from mxq.profiling.activation import ActivationStats, SiteStats
from mxq.report import palette
from mxq.report.facts import Cell, Facts
from mxq.report.figure_parts import colour_axis, grouped, heat_map, panel, panels

MOST_BITS = 9.0
"""Bits from which the colour no longer changes, so that bf16 does not hide the rest."""

LEAST_SHARE = 1 / 8
"""Part of a fair share of the tokens below which the colour no longer changes."""


def bits_of_experts(facts: Facts) -> go.Figure | None:
    """Stored bits by layer and expert, a map for each projection; None without experts."""
    cells = [cell for cell in facts.cells if cell.expert is not None]
    if not cells:
        return None
    experts = list(range(1 + max(cell.expert or 0 for cell in cells)))
    layers = _span(cells)
    maps = grouped(cells, lambda cell: cell.column)
    figure = panels(list(maps), len(experts), len(layers))
    for number, members in enumerate(maps.values()):
        at = {(cell.layer, cell.expert): cell for cell in members}
        grid = [[at.get((layer, expert)) for expert in experts] for layer in layers]
        figure.add_trace(_bits(grid, experts, layers), **panel(figure, number))
    _label(figure, "expert", "layer")
    return figure.update_layout(coloraxis=_bits_axis(facts))


def bits_of_linears(facts: Facts) -> go.Figure | None:
    """Stored bits of the linears beside experts by path and layer; None without any."""
    cells = [cell for cell in facts.cells if cell.expert is None]
    if not cells:
        return None
    names, layers = list(grouped(cells, lambda cell: cell.column)), _span(cells)
    at = {(cell.column, cell.layer): cell for cell in cells}
    grid = [[at.get((name, layer)) for layer in layers] for name in names]
    figure = panels([""], len(layers), len(names))
    trace = _bits(grid, layers, [escape(name) for name in names])
    figure.add_trace(trace, **panel(figure, 0))
    _label(figure, "layer", "")
    figure.update_yaxes(dtick=1)
    return figure.update_layout(coloraxis=_bits_axis(facts))


def use_of_experts(profile: ActivationStats) -> go.Figure | None:
    """Routed tokens against a fair share by layer and expert, a map for each domain."""
    sites = [site for site in profile.sites if site.tokens]
    if not sites:
        return None
    experts = list(range(max(len(site.tokens) for site in sites)))
    names = [_site_name(site) for site in sites]
    figure = panels(list(profile.domains), len(experts), len(sites))
    for number in range(len(profile.domains)):
        rows = [_shares(site, number, len(experts)) for site in sites]
        z = [[None if share is None else _colour(share) for share in row] for row in rows]
        told = [
            [_use_told(site, number, expert, share) for expert, share in enumerate(row)]
            for site, row in zip(sites, rows, strict=True)
        ]
        trace = heat_map(z, told, experts, names, shown="")
        figure.add_trace(trace, **panel(figure, number))
    _label(figure, "expert", "layer")
    figure.update_yaxes(type="category")
    ticks = {-3.0: "1/8", -2.0: "1/4", -1.0: "1/2", 0.0: "fair", 1.0: "2x", 2.0: "4x", 3.0: "8x"}
    axis = colour_axis(palette.LOAD, (-3, 3), ticks)
    return figure.update_layout(coloraxis=axis)


def _span(cells: Sequence[Cell]) -> list[int]:
    """Layers from the first to the last one with such blocks; those between may have none."""
    layers = [cell.layer for cell in cells]
    return list(range(min(layers), max(layers) + 1))


def _bits(
    grid: Sequence[Sequence[Cell | None]],
    x: Sequence[int],
    y: Sequence[int] | Sequence[str],
) -> go.Heatmap:
    z = [[None if cell is None else round(cell.bits, 3) for cell in row] for row in grid]
    told = [["" if cell is None else _cell_told(cell) for cell in row] for row in grid]
    return heat_map(z, told, x, y, shown="%{z:.1f}")


def _cell_told(cell: Cell) -> str:
    lines = [f"<b>{escape(cell.name)}</b>", f"{cell.scheme}, {cell.bits:.2f} bits per weight"]
    if cell.tokens is not None:
        lines.append(counted(cell.tokens, "calibration token"))
    if cell.loss is not None:
        lines.append(f"predicted loss {cell.loss:.3g}")
    return "<br>".join(lines)


def _bits_axis(facts: Facts) -> dict[str, object]:
    """One scale for all maps of a plan."""
    found = [cell.bits for cell in facts.cells]
    low = min(2.0, math.floor(min(found)))
    high = min(max(*found, low + 2), MOST_BITS)
    ticks = {float(tick): str(tick) for tick in range(math.ceil(low), math.floor(high) + 1)}
    if max(found) > high:
        ticks[high] = f"{high:g} and more"
    return colour_axis(palette.BITS, (low, high), ticks)


def _label(figure: go.Figure, x: str, y: str) -> None:
    """Name the axes at the left and the bottom edge of the panels only."""
    figure.update_xaxes(title_text=x, row=len(figure._get_subplot_rows_columns()[0]))
    figure.update_yaxes(title_text=y, col=1)


def _site_name(site: SiteStats) -> str:
    """The layer's number, with the path where it is not the usual one."""
    words = site.site.split(".")
    usual = len(words) == 3 and words[0] == "layers"
    return words[1] if usual else escape(site.site)


def _shares(site: SiteStats, domain: int, experts: int) -> list[float | None]:
    """Tokens of each expert over those of an equal split; None beyond the site's experts."""
    counts = [row[domain] for row in site.tokens]
    fair = sum(counts) / len(counts)
    shares = [count / fair if fair > 0 else None for count in counts]
    return shares + [None] * (experts - len(shares))


def _colour(share: float) -> float:
    return math.log2(min(max(share, LEAST_SHARE), 1 / LEAST_SHARE))


def _use_told(site: SiteStats, domain: int, expert: int, share: float | None) -> str:
    if share is None:
        return ""
    tokens, mass = site.tokens[expert][domain], site.gate_mass[expert][domain]
    weight = f", mean routing weight {mass / tokens:.2f}" if tokens else ""
    return (
        f"<b>{escape(site.site)}.{expert}</b><br>{counted(tokens, 'profiled token')}, "
        f"{share:.2f} of a fair share{weight}"
    )
