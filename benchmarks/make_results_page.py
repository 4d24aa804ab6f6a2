"""Write docs/results.md from the raw results under benchmarks/results/. No number is typed by hand.

python benchmarks/make_results_page.py
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accuracy.activations import activation_section
from accuracy.page import accuracy_section, readme_table
from accuracy.ranking import ranking_section
from accuracy.scope import scope_section
from compiled_page import compiled_sections
from efforts import effort_sections
from group_gemm.page import timing_sections
from speed.page import speed_sections

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
README = ROOT / "README.md"
README_RESULTS = "accuracy-qwen2moe-14m.json"
README_START = "<!-- results: made by benchmarks/make_results_page.py -->"
README_END = "<!-- /results -->"


def main() -> None:
    """Write the page."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    parts = [
        "# Results",
        "",
        "Made by `benchmarks/make_results_page.py` from the raw files under `benchmarks/results/`.",
        "",
    ]
    accuracies = _read("accuracy-*.json")
    pipelines = _read("pipeline-*.json")
    for name, found in accuracies.items():
        parts += accuracy_section(name, found)
    for name, found in _read("activations-*.json").items():
        parts += activation_section(name, found)
    parts += effort_sections(accuracies, pipelines)
    for path in sorted(RESULTS.glob("ranking-*.json")):
        parts += ranking_section(path.name, json.loads(path.read_text()))
    for path in sorted(RESULTS.glob("scope-*.json")):
        parts += scope_section(path.name, json.loads(path.read_text()))
    for path in sorted(RESULTS.glob("solver-*.json")):
        parts += solver_section(path.name, json.loads(path.read_text()))
    parts += speed_sections(pipelines)
    parts += memory_section(_read("memory-*.json"))
    parts += timing_sections(_read("group-gemm-*.json"))
    for path in sorted(RESULTS.glob("kernels-compiled.json")):
        parts += compiled_sections(path.name, json.loads(path.read_text()))
    for path in sorted(RESULTS.glob("repack-*.json")):
        parts += repack_section(path.name, json.loads(path.read_text()))
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join(parts).rstrip() + "\n")
    write_readme_table()


def _read(pattern: str) -> dict[str, Any]:
    """Results by the name of their file."""
    return {path.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))}


def write_readme_table() -> None:
    """Replace the README's table by the mean KL of each method and budget."""
    lines = readme_table(json.loads((RESULTS / README_RESULTS).read_text())["rows"])
    text = README.read_text()
    head, tail = text.index(README_START) + len(README_START), text.index(README_END)
    README.write_text(text[:head] + "\n" + "\n".join(lines) + "\n" + text[tail:])


def solver_section(name: str, results: Mapping[str, Any]) -> list[str]:
    """One solver file: mxq beside plain PuLP."""
    plain = results.get("plain_pulp", {})
    lines = [
        f"## Solver: {results.get('blocks')} blocks x {results.get('schemes')} schemes, "
        f"{results.get('budgets')} budgets",
        "",
        f"`{name}`, {results.get('date')}; {_versions(results)}.",
        "",
        "| | seconds | gap | proven | peak MiB |",
        "| --- | ---: | ---: | --- | ---: |",
    ]
    for label, row in (("mxq", results), ("plain PuLP with CBC", plain)):
        cells = [_cell(row.get(key)) for key in ("seconds", "gap", "proven", "peak_mib")]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return [*lines, ""]


def memory_section(files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The files of the memory benchmark: one row each, what was stated before beside the peak."""
    if not files:
        return []
    lines = [
        "## Memory of a whole run",
        "",
        "`benchmarks/bench_memory.py` writes a random checkpoint and quantizes it with mxq; the "
        "resident memory of that process is sampled ten times a second. Stated: what the run said "
        "before it started that it would need.",
        "",
        "| file | checkpoint | layers | quantizer, schemes | kept activations | peak memory | "
        "stated | disk | stated |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, found in files.items():
        case, model = found["case"], found["model"]
        cells = (
            f"`{name}`, {found['date'][:10]}, {found['commit']}",
            f"{model['family']}, {model['checkpoint_bytes'] / 1e9:.1f} GB",
            case["layers"],
            f"{case['quantizer']}; {case['schemes']}",
            case["memory"],
            *(
                f"{found[key] / 2**30:.2f} GiB"
                for key in (
                    *("peak_rss_bytes", "stated_memory_bytes"),
                    *("measured_disk_bytes", "stated_disk_bytes"),
                )
            ),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return [*lines, ""]


def repack_section(name: str, results: Mapping[str, Any]) -> list[str]:
    """One repacking file: seconds from the files' order to kernel order on the CPU."""
    lines = [
        f"## Repacking: a layer of {results['weights']:,} weights",
        "",
        f"`{name}`, {results['date']}; {_versions(results)}. {results['experts']} experts of three "
        f"matrices of {results['hidden']} x {results['inner']}, {results['threads']} of "
        f"{results['cpus']} CPUs, which other programs used too (load {results['load_at_start']} "
        "at the start).",
        "",
        "| format | seconds | ns for a weight | arena MiB | peak MiB |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    keys = ("scheme", "seconds", "ns_per_weight", "arena_mib", "peak_mib")
    lines += [f"| {' | '.join(str(row[key]) for key in keys)} |" for row in results["layers"]]
    return [*lines, ""]


def _versions(results: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {text}" for name, text in results.get("versions", {}).items())


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
