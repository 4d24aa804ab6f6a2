"""Options: every refusal is read, sizes and default schemes are counted by hand."""

import re
from pathlib import Path

import pytest

from mxq.config import (
    AllocateOptions,
    CalibrationOptions,
    MeasureOptions,
    ModelOptions,
    OutputOptions,
    QuantizeOptions,
    default_schemes,
    parse_size,
)
from mxq.scheme import Scheme


def refused(make, message, **options):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        make(**options)


def test_a_scope_that_does_not_exist_is_shown_the_menu():
    message = "scope 'mlp' is unknown; choose one of auto, experts, all"
    refused(ModelOptions, message, model="m", scope="mlp")


def test_a_pattern_that_does_not_compile_is_named():
    message = "--keep 'a(' is not a regular expression: missing ), unterminated subpattern"
    refused(ModelOptions, message, model="m", keep=("fine", "a("))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("samples", 1, "samples is 1; it must be at least 2"),
        ("seqlen", 1, "seqlen is 1; it must be at least 2"),
        ("expert_floor", -1, "expert floor is -1; it must be at least 0"),
    ],
)
def test_calibration_numbers_have_a_least_value(option, value, message):
    refused(CalibrationOptions, message, **{option: value})


def test_the_least_values_themselves_are_taken():
    assert CalibrationOptions(samples=2, seqlen=2, expert_floor=0).samples == 2


def test_a_rotation_that_does_not_exist_is_shown_the_menu():
    refused(
        MeasureOptions, "rotation 'yes' is unknown; choose one of auto, on, off", rotation="yes"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of --bits, --size or --plan; found none of them"),
        (
            {"bits": 4.0, "size_bytes": 10},
            "give one of --bits, --size or --plan; found --bits and --size",
        ),
        (
            {"bits": 4.0, "plan": "uniform:fp8"},
            "give one of --bits, --size or --plan; found --bits and --plan",
        ),
        ({"bits": 0.0}, "--bits 0 is not between 0 and 16 bits per weight"),
        ({"bits": 16.5}, "--bits 16.5 is not between 0 and 16 bits per weight"),
        ({"bits": float("nan")}, "--bits nan is not between 0 and 16 bits per weight"),
        ({"bits": 4.0, "r": -0.1}, "--r -0.1 is not between 0 and 1"),
        ({"bits": 4.0, "r": 1.5}, "--r 1.5 is not between 0 and 1"),
        (
            {"bits": 4.0, "granularity": "row"},
            "granularity 'row' is unknown; choose one of block, expert, projection, layer",
        ),
        (
            {"bits": 4.0, "objective": "time"},
            "objective 'time' is unknown; choose one of loss, mxmoe",
        ),
        (
            {"bits": 4.0, "max_latency_us": 5.0, "device": "h200"},
            "--max-latency needs --device and --tokens: a latency is of both",
        ),
        (
            {"bits": 4.0, "max_latency_us": 5.0, "tokens": 8},
            "--max-latency needs --device and --tokens: a latency is of both",
        ),
        (
            {"bits": 4.0, "objective": "mxmoe", "device": "h200"},
            "--objective mxmoe with r < 1 needs --device and --tokens for T",
        ),
        ({"plan": "w4a16_g128_asym"}, "--plan 'w4a16_g128_asym' is not of the form uniform:SCHEME"),
        ({"plan": "uniform:"}, "--plan 'uniform:' is not of the form uniform:SCHEME"),
        ({"plan": "uniform:w9"}, "scheme 'w9' is not of the form"),
    ],
)
def test_allocations_that_make_no_sense_are_refused(options, message):
    refused(AllocateOptions, message, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 16.0},
        {"size_bytes": 1},
        {"bits": 4.0, "max_latency_us": 5.0, "device": "h200", "tokens": 8},
        {"bits": 4.0, "objective": "mxmoe", "r": 1.0},
        {"bits": 4.0, "r": 0.0},
    ],
)
def test_one_budget_is_enough(options):
    assert AllocateOptions(**options).forced_scheme() is None


def test_a_forced_plan_is_its_scheme():
    options = AllocateOptions(plan="uniform:w4a16_g64_sym")
    assert options.forced_scheme() == Scheme.parse("w4a16_g64_sym")


def test_the_work_folder_is_inside_the_output_unless_given():
    assert OutputOptions(Path("out")).work_folder == Path("out/work")
    assert OutputOptions(Path("out"), work=Path("w")).work_folder == Path("w")


def test_options_left_out_are_the_defaults():
    options = QuantizeOptions(ModelOptions("m"), AllocateOptions(bits=4.0), OutputOptions(Path()))
    assert (options.calibration, options.measure) == (CalibrationOptions(), MeasureOptions())


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("17B", 17),
        ("900MB", 900_000_000),
        ("2kB", 2000),
        ("2KiB", 2048),
        ("3 GB", 3_000_000_000),
        (" 1.5MiB ", 3 * 2**19),
        # 5.2 x 2^30 = 5583457484.8
        ("5.2GiB", 5_583_457_484),
        ("1TB", 10**12),
        ("1TiB", 2**40),
    ],
)
def test_sizes_by_hand(text, size_bytes):
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "5", "5.2 gib", "-1GB", "GiB", "5 GiB left", "1e3MB"])
def test_a_size_without_number_or_unit_is_refused(text):
    refused(parse_size, f"size {text!r} is not a number with a unit, e.g. 5.2GiB", text=text)


def test_a_size_with_two_points_is_refused():
    refused(parse_size, "size '1.2.3GB' does not start with a number", text="1.2.3GB")


@pytest.mark.parametrize(
    ("widths", "group"),
    [({2048, 768}, "128"), ({2048, 704}, "64"), ({2048, 96}, "32"), ({2048, 100}, "row")],
)
def test_default_schemes_take_the_largest_group_that_divides_every_width(widths, group):
    # Rows stand beside the groups at 2 to 4 bits.
    expected = {f"w{bits}a16_g{group}_asym" for bits in (2, 3, 4, 5, 6, 8)}
    expected |= {f"w{bits}a16_grow_asym" for bits in (2, 3, 4)}
    assert {str(scheme) for scheme in default_schemes(widths)} == expected
