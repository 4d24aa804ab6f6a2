"""The page as the server gives it out: its files, with what it is about written into it."""

import html
import json
from collections.abc import Mapping
from pathlib import Path

from mxq.explore.server import Resource

_FOLDER = Path(__file__).parent / "static"
_TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8"}


def page_resources(facts: Mapping[str, object]) -> dict[str, Resource]:
    """The parts of the page by path.

    Raises:
        ValueError: If plotly, whose script draws the charts, is not installed.
    """
    parts = {
        f"/{path.name}": Resource(_TYPES[path.suffix], path.read_bytes())
        for path in sorted(_FOLDER.iterdir())
        if path.suffix in _TYPES
    }
    script = Resource(_TYPES[".js"], plotly_script().encode())
    page = Resource("text/html; charset=utf-8", page_text(facts).encode())
    return {"/": page, "/plotly.js": script, **parts}


def page_text(facts: Mapping[str, object]) -> str:
    """The page with the facts as a JSON element; text in them cannot leave it."""
    text = (_FOLDER / "page.html").read_text(encoding="utf-8")
    # "<" is all that could end the element; JSON spells it another way too.
    inside = json.dumps(facts, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return text.replace("{{model}}", html.escape(str(facts["model"]))).replace("{{facts}}", inside)


def plotly_script() -> str:
    """The script that comes with the plotly package.

    Raises:
        ValueError: If the package is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ValueError(
            "the page is drawn by plotly, which is not installed; run pip install 'mxq[report]'"
        ) from error
    return str(get_plotlyjs())
