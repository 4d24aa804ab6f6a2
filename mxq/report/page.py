"""The page: one HTML file with every figure, table and line of script that it needs.

plotly.js and the figures are in it once, compressed; the browser unpacks them. Texts from models
and paths go through the template's escaping.
"""

import base64
import gzip
import json
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from mxq.report import palette
from mxq.report.curve import Curve
from mxq.report.facts import Facts
from mxq.report.sections import Section, make_sections
from mxq.report.times import Times
from mxq.report.words import headlines, warnings

_HERE = Path(__file__).parent


def render_page(facts: Facts, curve: Curve | None, times: Times | str) -> str:
    """The page as text; the same facts, curve and times give the same page."""
    sections = make_sections(facts, curve, times)
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(_read("page.html")).render(
        title=f"{facts.name}, {facts.plan.bits_per_weight:.2f} bits per weight",
        eyebrow=facts.model_type if facts.origin is None else facts.origin.model.model,
        lead=f"Plan: {facts.plan.description}. {_bound(facts)}",
        headlines=headlines(facts),
        warnings=(*warnings(facts), *facts.notes),
        sections=sections,
        version=facts.record.provenance.versions.get("mxq", "of a version that is not known"),
        style=Markup(_read("page.css")),
        script=Markup(_read("page.js")),
        dark_of=Markup(json.dumps(dict(palette.DARK_OF))),
        plotly=Markup(_packed(get_plotlyjs())),
        figures=Markup(_packed(_figures(sections))),
    )


def _bound(facts: Facts) -> str:
    plan = facts.plan
    asked = None if facts.origin is None else facts.origin.allocate
    if plan.description.startswith("uniform") or asked is None or asked.objective != "loss":
        return ""  # the bound is not one of all plans of that size
    if not plan.proven:
        return "It is not proven to be the best of its size."
    return (
        "No plan of that size and under the same rules has a predicted loss below "
        f"{plan.bound:.4g} {plan.unit}."
    )


def _figures(sections: Sequence[Section]) -> str:
    """JSON of all figures by the id of their place."""
    parts = (
        f"{json.dumps(plot.key)}:{plot.figure.to_json()}"
        for section in sections
        for plot in section.plots
    )
    return "{" + ",".join(parts) + "}"


def _packed(text: str) -> str:
    """A text for the browser to unpack: gzip without a date, in letters that end no element."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")
