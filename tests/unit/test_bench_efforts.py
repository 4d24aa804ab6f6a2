"""What an effort gains and costs, from made-up results files."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import efforts  # noqa: E402

TWO, THREE = "w2a16_g128_asym", "w3a16_g128_asym=3"


def judged(method, size, seed, kl, *made):
    row = {"method": method, "size": size, "seed": seed, "kl": kl}
    return row | dict(zip(("quantizer", "target"), made, strict=False))


def timed(case, *seconds, **more):
    clock = [{"stage": "s", "part": "p", "processor_s": s, "wall_s": 99.0} for s in seconds]
    row = {"case": case, "commit": "abc", "load_at_start": 0.5, "quantized_weights": 5_000_000}
    return {**row, "clock": clock, **more}


ROWS = [
    judged("mxq-fast", TWO, 0, 0.5, "gptq", "local"),
    judged("mxq-fast", TWO, 1, 0.25, "gptq", "local"),
    judged("mxq-fast", THREE, 0, 0.125, "gptq", "local"),
    judged("mxq", TWO, 1, 0.125, "refined", "original"),
    judged("gptq", TWO, 1, 9.0, "gptq", "local"),
]


def section(rows, timings, loaded=(), model="m"):
    settings = {"model": "m", "small_samples": 8, "seqlen": 16, "mxq_schemes": ["a"], "bits": 3.25}
    pipeline = {"settings": settings, "rows": timings, "loaded": list(loaded)}
    return efforts.effort_sections(
        {"accuracy-m.json": {"model": model, "rows": rows}}, {"pipeline-2.json": pipeline}
    )


def test_gain_is_of_common_seeds_and_cost_of_the_processors():
    lines = section(ROWS, [timed("small/mxq", 6.0, 4.0), timed("small/mxq-balanced", 15.0)])
    # Seed 1 is what both have of the first budget; 10 and 15 s for 5 million parameters.
    assert "| `fast` | `gptq` | `local` | 0.25000 | 0.12500 | 10 | 2.0 | 1.00 |" in lines
    assert "| `balanced` | `refined` | `original` | 0.12500 | - | 15 | 3.0 | 1.50 |" in lines
    assert "KL, that of w2a16_g128_asym | KL, 3 bits |" in lines[4]
    assert len({line.count("|") for line in lines[4:8]}) == 1


def test_an_effort_without_a_time_has_its_gain_and_none_without_either():
    lines = section(ROWS, [timed("small/mxq", 10.0)])
    assert "| `balanced` | `refined` | `original` | 0.12500 | - | - | - | - |" in lines
    lines = section(ROWS[:3], [timed("small/mxq", 10.0)])
    assert "| `fast` | `gptq` | `local` | 0.37500 | 0.12500 | 10 | 2.0 | 1.00 |" in lines
    assert not [line for line in lines if "balanced" in line]


def test_a_run_beside_other_programs_is_the_newer_one():
    again = timed("small/mxq", 20.0, commit="def", load_at_start=7.25)
    lines = section(ROWS, [timed("small/mxq", 10.0), timed("small/mxq-balanced", 15.0)], [again])
    assert "| `fast` | `gptq` | `local` | 0.25000 | 0.12500 | 20 | 4.0 | 1.00 |" in lines
    told = "(commit def, load 7.2 at the start; commit abc, load 0.5 at the start)"
    assert told in lines[2]


def test_files_of_two_models_have_nothing_to_tell_together():
    assert section(ROWS, [timed("small/mxq", 10.0)], model="other") == []
