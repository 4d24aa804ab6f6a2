"""Write the page of a checkpoint into a file."""

import importlib.util
from pathlib import Path

from mxq.artifacts import MeasuredLayers
from mxq.publish import PAGE
from mxq.report.curve import loss_curve
from mxq.report.facts import gather
from mxq.report.times import step_times
from mxq.storage import write_atomically

GENERATOR = '<meta name="generator" content="mxq report">'
"""What a page has near its beginning; a file without it is not replaced."""


def write_report(
    folder: Path,
    output: Path | None = None,
    work: Path | None = None,
    *,
    profiles: Path | None = None,
    measured_layers: MeasuredLayers | None = None,
) -> Path:
    """Write the page of the checkpoint in ``folder``; the file, by default in that folder.

    ``work`` None is ``work`` inside the folder, ``profiles`` the folder of measured profiles of
    devices.

    Raises:
        ValueError: If the folder is no finished checkpoint of mxq, the file is one of another
            kind, or plotly or jinja2 are not installed.
    """
    absent = [name for name in ("plotly", "jinja2") if importlib.util.find_spec(name) is None]
    if absent:
        raise ValueError(
            f"the page needs {' and '.join(absent)}; run pip install 'mxq[report]', or read the "
            "same facts with mxq inspect"
        )
    from mxq.report.page import render_page

    path = folder / PAGE if output is None else output
    _check_replaceable(path)
    facts = gather(folder, work, measured_layers=measured_layers)
    page = render_page(facts, loss_curve(facts), step_times(facts, profiles))
    write_atomically(path, page)
    return path


def _check_replaceable(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a file for --output, e.g. {path / PAGE}")
    if not path.exists():
        return
    with path.open("rb") as file:
        beginning = file.read(1000)
    if GENERATOR.encode() not in beginning:
        raise ValueError(f"{path} is there and no page of mxq report; choose another --output")
