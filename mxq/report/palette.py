"""The colours of the page: each has a form for light and one for dark.

Figures are drawn with the light ones. The page swaps a figure's colours by ``DARK_OF``, so a light
colour stands for one thing only. Sequences go from pale to deep in light and the other way round
in dark, so that more always stands out more; their order survives every common form of colour
blindness and a grey print.
"""

from collections.abc import Mapping

INK = "#1c2430"
MUTED = "#5b6675"
LINE = "#dde2e9"
SURFACE = "#fefefe"
ABSENT = "#f1f3f6"

PLAN = "#0b62c4"
UNIFORM = "#c2500a"
NEIGHBOUR = "#7d8896"
MEASURED = "#0a7d64"

BITS = ("#f7eda6", "#d6ce78", "#a9a877", "#7f8682", "#596780", "#2f4a7d", "#05255c")
"""Few bits to many."""

LOAD = ("#f3f1f8", "#dcd5ee", "#c0b4e0", "#a08fcf", "#7f68bb", "#5d419f", "#3a1d7c")
"""Less than a fair share, a fair share in the middle, more."""

KINDS = ("#2b6cb8", "#d98218", "#23907a", "#a8467f", "#6b7a1f", "#7a5bb5", "#b0392c", "#4d8fa6")
"""Projections beside each other."""

DARK_OF: Mapping[str, str] = {
    INK: "#e7ebf1",
    MUTED: "#9aa7b8",
    LINE: "#2c3644",
    SURFACE: "#151b23",
    ABSENT: "#1d2530",
    PLAN: "#6aaef8",
    UNIFORM: "#f39a55",
    NEIGHBOUR: "#8a96a6",
    MEASURED: "#4fc7a8",
    **dict(
        zip(
            BITS,
            ("#22345c", "#3d4f78", "#62697c", "#87857a", "#ada578", "#d5c868", "#fdee57"),
            strict=True,
        )
    ),
    **dict(
        zip(
            LOAD,
            ("#1e222e", "#332f4f", "#4b4372", "#675a98", "#877abd", "#ac9fe0", "#d8ccff"),
            strict=True,
        )
    ),
    **dict(
        zip(
            KINDS,
            (
                *("#68a8ee", "#f0ad55", "#52c2a6", "#dc83b6"),
                *("#b3c254", "#a98df0", "#ec7a6c", "#7fc3da"),
            ),
            strict=True,
        )
    ),
}


def scale(colours: tuple[str, ...]) -> list[tuple[float, str]]:
    """A colour scale with stops at equal distances."""
    return [(place / (len(colours) - 1), colour) for place, colour in enumerate(colours)]
