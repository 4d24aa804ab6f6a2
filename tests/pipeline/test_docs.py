"""The README and the pages are true: snippets run, commands parse, links and messages exist."""

import ast
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import click
import pytest
import typer

from mxq.cli import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

PLACEHOLDERS = {"MODEL": "demo", "B": "3"}
"""Words in capitals that stand for a value in a command."""


def code(page, language):
    """The code blocks of a language, in order; without those that need a GPU and say so."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [block for block in blocks if not block.startswith("# on a GPU")]


def anchors(page):
    """The anchors that a code host makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", [page for page in PAGES if code(page, "python")], ids=lambda p: p.name
)
def test_the_python_of_a_page_runs_in_order(page, tmp_path):
    snippets = "\n".join(code(page, "python"))
    if '"out"' in snippets and 'output="out"' not in snippets:
        # What the commands of the page have written by then.
        snippets = f"import mxq\nmxq.quantize('demo', bits=3, output='out', samples=16)\n{snippets}"
    script = tmp_path / "snippets.py"
    script.write_text(snippets)
    run = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def test_the_readme_prints_what_was_written(tmp_path):
    (snippet,) = code(ROOT / "README.md", "python")
    assert 'print(result.written, result.losses["plan"].kl)' in snippet


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_point_at_files_and_headings(page):
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def commands():
    """Every line of a plain code block that starts a command of mxq or a script of the project."""
    for page in PAGES:
        for block in (*code(page, ""), *code(page, "sh")):
            for line in block.replace("\\\n", " ").splitlines():
                if re.match(r"(mxq|python) [a-z]", line):
                    words = shlex.split(line, comments=True)
                    yield pytest.param(words, id=f"{page.name}: {line[:60]}")


@cache
def options_of(script):
    """What a script's --help prints."""
    run = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return set(re.findall(r"--[a-z][a-z0-9-]*", run.stdout))


@pytest.mark.parametrize("words", list(commands()))
def test_commands_parse(words):
    words = [PLACEHOLDERS.get(word, word) for word in words]
    if words[0] == "mxq":
        command = typer.main.get_command(app)
        with click.Context(command) as context:
            name, found, rest = command.resolve_command(context, words[1:])
            found.make_context(name, list(rest), parent=context)
    else:
        used = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
        assert used <= options_of(words[1])


@cache
def texts_of_the_package():
    """Every string of the package's source, values that are filled in as ``{}``."""
    found = []
    for path in ROOT.glob("mxq/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_the_messages_that_are_explained_exist():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 15
    assert [m for m in messages if not any(m in text for text in texts_of_the_package())] == []


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {page.name for page in ROOT.glob("docs/*.md")} - {"README.md"}
    assert set(re.findall(r"\]\(([a-z-]+\.md)\)", index)) == pages
