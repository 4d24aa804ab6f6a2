"""The command line's help at the widths of terminals: nothing cut, no default or choice unsaid."""

import os
import re

import pytest
import typer
from typer.testing import CliRunner

from mxq.cli import app
from mxq.config import (
    GRANULARITIES,
    OBJECTIVES,
    PLANS,
    ROTATIONS,
    SCOPES,
    default_schemes,
)
from mxq.engines import ENGINES
from mxq.profiling.sensitivity import SENSITIVITY
from mxq.profiling.texts import HUB_SETS
from mxq.quantizers import QUANTIZERS
from mxq.search.device import device_names
from mxq.search.solvers import SOLVERS

WIDTHS = (80, 100, 120)
COMMANDS = typer.main.get_command(app).commands

WITHOUT_DEFAULT = {
    *("--bits", "--size", "--plan"),  # one of them has to be given
    *("--keep", "--tokens", "--shapes"),
    *("--tie-gate-up", "--overwrite", "--force", "--json", "--open", "--measure-layers"),
}
"""Optional all the same: what is not said is not done."""


def help_of(*command, width):
    """What --help prints in a terminal of that width."""
    environment = {**os.environ, "COLUMNS": str(width), "TERM": "dumb"}
    done = CliRunner().invoke(app, [*command, "--help"], env=environment)
    assert done.exit_code == 0, done.output
    return done.output


def spoken(shown):
    """The words without the boxes around them, in one line."""
    return " ".join(re.sub("[─│╭╮╰╯]", " ", shown).split())


def parameters():
    return [
        pytest.param(name, parameter, id=f"{name} {parameter.opts[0]}")
        for name, command in COMMANDS.items()
        for parameter in command.params
    ]


def default_of(parameter):
    """What the help has to say of a default; None where there is none."""
    if isinstance(parameter.show_default, str):
        return f"({parameter.show_default})"
    if parameter.secondary_opts:
        return (parameter.opts if parameter.default else parameter.secondary_opts)[0].strip("-")
    is_absent = parameter.default is None or parameter.default is False
    return None if is_absent else str(parameter.default)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=" ".join)
def test_help_fits_the_terminal_and_cuts_nothing(command, width):
    shown = help_of(*command, width=width)
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", COMMANDS)
def test_every_word_and_default_of_every_option_is_shown_whole(name, width):
    words = spoken(help_of(name, width=width))
    for parameter in COMMANDS[name].params:
        assert " ".join(parameter.help.split()) in words
        for option in (*parameter.opts, *parameter.secondary_opts):
            assert (option if option.startswith("-") else parameter.metavar) in words.split()
        default = default_of(parameter)
        assert default is None or f"[default: {default}]" in words


@pytest.mark.parametrize(("name", "parameter"), parameters())
def test_an_optional_parameter_says_its_default(name, parameter):
    is_said = parameter.required or default_of(parameter) is not None
    assert is_said or parameter.opts[0] in WITHOUT_DEFAULT


@pytest.mark.parametrize(
    ("command", "option", "menu"),
    [
        ("quantize", "calibration", (*HUB_SETS, "demo", "self", "file:PATH")),
        ("quantize", "scope", SCOPES),
        ("quantize", "sensitivity", SENSITIVITY),
        ("quantize", "quantizer", QUANTIZERS),
        ("quantize", "rotation", ROTATIONS),
        ("quantize", "granularity", GRANULARITIES),
        ("quantize", "objective", OBJECTIVES),
        ("quantize", "solver", SOLVERS),
        ("quantize", "engine", ENGINES),
        ("check", "engine", ENGINES),
        ("quantize", "device", device_names()),
        ("tune", "plans", PLANS),
    ],
)
def test_the_help_of_a_choice_names_all_that_there_is(command, option, menu):
    (found,) = (p for p in COMMANDS[command].params if p.name == option)
    assert set(menu) <= {word.strip(".,:;()") for word in found.help.split()}


def test_the_default_schemes_are_what_the_help_says():
    # "w2a16 to w8a16, asym, groups of 128 or less; 2 to 4 bits also grow"
    plain = {f"w{bits}a16_g128_asym" for bits in (2, 3, 4, 5, 6, 8)}
    rows = {f"w{bits}a16_grow_asym" for bits in (2, 3, 4)}
    assert {str(scheme) for scheme in default_schemes({256})} == plain | rows
    assert "w8a16_g64_asym" in map(str, default_schemes({192}))


def test_the_first_help_names_every_command_and_the_words_of_a_plan():
    words = spoken(help_of(width=80))
    for name, command in COMMANDS.items():
        summary = command.help.partition("\n\n")[0]
        assert f"{name} {' '.join(summary.split())}" in words
    assert "A block is one weight matrix, a scheme its number format" in words
