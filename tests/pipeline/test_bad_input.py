"""Bad input: every case of the table ends with one message that helps, and spoils nothing."""

import hashlib
import importlib.util
import io
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
from bad_case import RUN
from bad_models import FOLDERS, WEIGHTS
from bad_requests import BUDGETS, EARLY, OUTPUTS, STALE, TEXTS
from damage import Place
from tiny import save_tiny
from typer.testing import CliRunner

from mxq.cli import app
from mxq.workspace import Workspace

SCRIPT = Path(__file__).resolve().parents[2] / "eval" / "perplexity.py"
CASES = {**WEIGHTS, **FOLDERS, **TEXTS, **BUDGETS, **OUTPUTS, **STALE}
SENTENCE = "The clock struck nine. "


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A model of six experts, a text, and the work folder and the checkpoint of a whole run."""
    place = Place(tmp_path_factory.mktemp("pristine"))
    save_tiny(place.model, num_experts=6)
    place.text.write_text("".join(f"The clock struck {number} times. " for number in range(60)))
    status, output, errors = run(RUN, place)
    assert status == 0, output + errors
    place.output.rename(place.packed)
    place.fresh.rename(place.work)
    return place


@pytest.fixture
def place(pristine, tmp_path):
    """Copies that a mistake may edit; the work folder is that of the model beside it."""
    place = Place(Path(shutil.copytree(pristine.root, tmp_path / "place")))
    space = Workspace(place.work)
    settings = space.settings()
    space.save("settings", replace(settings, model=replace(settings.model, model=str(place.model))))
    return place


def run(command, place):
    """Exit status, standard output and errors of a command, its places filled in."""
    folders = ("root", "model", "text", "work", "fresh", "packed", "output")
    names = {name: getattr(place, name) for name in folders}
    names |= {"sentence": SENTENCE, "long": 200 * SENTENCE}
    # Filled in after the command is cut into words, so that a text stays one word.
    name, *words = [word.format(**names) for word in command.split()]
    if name == "perplexity":
        return evaluate(words)
    done = CliRunner().invoke(app, [name, *words])
    # Whatever is not the end of a command has left it with a traceback.
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    return done.exit_code, done.stdout, done.stderr


def evaluate(words):
    spec = importlib.util.spec_from_file_location("perplexity", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    output, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(output), redirect_stderr(errors):
        status = module.main(words)
    return status, output.getvalue(), errors.getvalue()


def digests(folder, *without):
    """SHA-256 of every file under a folder, and where each link points."""
    return {
        str(path.relative_to(folder)): path.readlink()
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if (path.is_file() or path.is_symlink()) and not set(without) & {*path.parents, path}
    }


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_ends_with_one_message_and_spoils_nothing(name, place):
    case = CASES[name]
    case.mistake(place)
    output = digests(place.output)
    # A run may leave finished stages in its work folder; that is where the next one goes on.
    own = (place.work, place.fresh, place.output)
    before = digests(place.root, *own)
    status, printed, errors = run(case.command, place)
    assert status == case.status, printed + errors
    assert digests(place.root, *own) == before
    assert "Traceback" not in errors
    if status == 0:
        message = printed
    else:
        assert digests(place.output) == output
        assert place.output.exists() == bool(output)
        assert printed == ""
        message = errors if status == 2 else message_of(errors)
    said = " ".join(message.split())
    for part in case.says:
        assert part in said
    if name in EARLY:
        assert not place.fresh.exists()


def message_of(errors):
    """The one message at the end of what was printed; lines of progress may come before."""
    (message,) = re.findall(r"^(?:error|perplexity): ((?:.|\n)*)", errors, re.MULTILINE)
    assert len(message) < 800
    assert len(message.splitlines()) <= 2
    return message


def test_every_table_has_its_own_names():
    tables = (WEIGHTS, FOLDERS, TEXTS, BUDGETS, OUTPUTS, STALE)
    assert len(CASES) == sum(map(len, tables))
    assert len(CASES) >= 40
