"""Write docs/results.md from the raw results under benchmarks/results/. No number is typed by hand.

python benchmarks/make_results_page.py
"""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compiled_page import compiled_sections
from group_gemm.page import timing_sections
from speed.page import speed_sections

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
README = ROOT / "README.md"
README_RESULTS = "accuracy-qwen2moe-14m.json"
README_START = "<!-- results: made by benchmarks/make_results_page.py -->"
README_END = "<!-- /results -->"

NAMES = {
    "rtn": "uniform, round to nearest with clip search",
    "gptq": "uniform, GPTQ",
    "gptq-rotated": "uniform, GPTQ, rotated inputs",
    "mxmoe": "MxMoE's own mode (layer norm, per-layer budget, gate = up, rotated GPTQ)",
    "mxq": "mxq default",
}

Row = Mapping[str, Any]


def main() -> None:
    """Write the page."""
    parts = [
        "# Results",
        "",
        "Made by `benchmarks/make_results_page.py` from the raw files under `benchmarks/results/`.",
        "",
    ]
    for path in sorted(RESULTS.glob("accuracy-*.json")):
        parts += accuracy_section(path.name, json.loads(path.read_text()))
    for path in sorted(RESULTS.glob("solver-*.json")):
        parts += solver_section(path.name, json.loads(path.read_text()))
    parts += speed_sections(
        {
            path.name: json.loads(path.read_text())
            for path in sorted(RESULTS.glob("pipeline-*.json"))
        }
    )
    parts += memory_section(
        {path.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob("memory-*.json"))}
    )
    timings = {path.name: json.loads(path.read_text()) for path in _group_gemm_files()}
    parts += timing_sections(timings)
    for path in sorted(RESULTS.glob("kernels-compiled.json")):
        parts += compiled_sections(path.name, json.loads(path.read_text()))
    for path in sorted(RESULTS.glob("repack-*.json")):
        parts += repack_section(path.name, json.loads(path.read_text()))
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join(parts).rstrip() + "\n")
    write_readme_table()


def _group_gemm_files() -> list[Path]:
    return sorted(RESULTS.glob("group-gemm-*.json"))


def write_readme_table() -> None:
    """Replace the README's table by the mean KL of each method and budget."""
    rows: list[Row] = json.loads((RESULTS / README_RESULTS).read_text())["rows"]
    sizes, methods = (_unique(row[key] for row in rows) for key in ("size", "method"))
    budgets = [
        f"{statistics.mean(r['bits'] for r in rows if (r['size'], r['method']) == (s, 'mxq')):.2f}"
        for s in sizes
    ]
    lines = [
        f"| KL at bits per weight (budget) | {' | '.join(budgets)} |",
        f"| --- |{' ---: |' * len(sizes)}",
    ]
    for method in methods:
        cells = [_readme_cell([r for r in rows if r["size"] == size], method) for size in sizes]
        lines.append(f"| {NAMES[method]} | {' | '.join(cells)} |")
    text = README.read_text()
    head, tail = text.index(README_START) + len(README_START), text.index(README_END)
    README.write_text(text[:head] + "\n" + "\n".join(lines) + "\n" + text[tail:])


def _readme_cell(rows: Sequence[Row], method: str) -> str:
    return f"{_mean(rows, method, 'kl'):.4f}" if _has(rows, method) else "-"


def accuracy_section(name: str, results: Mapping[str, Any]) -> list[str]:
    """Tables of one accuracy file: by size and method, by domain, predicted against measured."""
    rows: list[Row] = results["rows"]
    tokens = rows[0]["heldout_tokens"]
    lines = [
        f"## Accuracy at equal bytes: {results['model']}",
        "",
        f"`{name}`, {results['date']}; {_versions(results)}. Calibration "
        f"{results['samples']} x {results['seqlen']} tokens, {len(_seeds(rows))} seeds; "
        f"{tokens:,} held-out tokens. Mean over seeds, +- the standard deviation between them. KL "
        "to the original and excess loss in nats per token; bits count every stored bit of the "
        "quantized linears.",
        "",
        "| budget | method | bits | KL | excess nats | top-1 same | KL / best uniform GPTQ |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for size in _unique(row["size"] for row in rows):
        at_size = [row for row in rows if row["size"] == size]
        baseline = min(
            _mean(at_size, m, "kl") for m in ("gptq", "gptq-rotated") if _has(at_size, m)
        )
        methods = _unique(row["method"] for row in at_size)
        lines += [_accuracy_line(size, method, at_size, baseline) for method in methods]
    return [*lines, "", *domain_table(rows), "", *prediction_table(rows), ""]


def domain_table(rows: Sequence[Row]) -> list[str]:
    """KL by held-out domain."""
    domains = list(rows[0]["domains"])
    lines = [
        "KL by held-out domain:",
        "",
        f"| budget | method | {' | '.join(domains)} |",
        f"| ---: | --- |{' ---: |' * len(domains)}",
    ]
    for size in _unique(row["size"] for row in rows):
        for method in _unique(row["method"] for row in rows):
            found = [r for r in rows if (r["size"], r["method"]) == (size, method)]
            if found:
                cells = [
                    f"{statistics.mean(r['domains'][d]['kl'] for r in found):.5f}" for d in domains
                ]
                lines.append(f"| {_budget(size, found)} | {method} | {' | '.join(cells)} |")
    return lines


def prediction_table(rows: Sequence[Row]) -> list[str]:
    """Predicted loss against measured KL where the prediction is in nats."""
    lines = [
        "Predicted loss (Fisher, calibration text) against measured KL (held-out text):",
        "",
        "| budget | method | predicted | measured | measured / predicted |",
        "| ---: | --- | ---: | ---: | ---: |",
    ]
    for size in _unique(row["size"] for row in rows):
        for method in ("gptq-rotated", "mxq"):
            found = [r for r in rows if (r["size"], r["method"]) == (size, method)]
            if found and found[0]["predicted"] is not None:
                predicted = statistics.mean(r["predicted"] for r in found)
                measured = statistics.mean(r["kl"] for r in found)
                lines.append(
                    f"| {_budget(size, found)} | {method} | {predicted:.5f} | {measured:.5f} "
                    f"| {measured / predicted:.2f} |"
                )
    return lines


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


def _accuracy_line(size: str, method: str, rows: Sequence[Row], baseline: float) -> str:
    found = [row for row in rows if row["method"] == method]
    kls = [row["kl"] for row in found]
    spread = statistics.stdev(kls) if len(kls) > 1 else 0.0
    bits = statistics.mean(row["bits"] for row in found)
    return (
        f"| {_budget(size, found)} | {NAMES.get(method, method)} | {bits:.4f} "
        f"| {statistics.mean(kls):.5f} +- {spread:.5f} | {_mean(rows, method, 'excess_nats'):.5f} "
        f"| {_mean(rows, method, 'top1_agreement'):.2%} "
        f"| {statistics.mean(kls) / baseline:.2f} |"
    )


def _budget(size: str, rows: Sequence[Row]) -> str:
    scheme, _, bits = size.partition("=")
    return bits or f"that of {scheme}" if rows else size


def _mean(rows: Sequence[Row], method: str, key: str) -> float:
    return statistics.mean(row[key] for row in rows if row["method"] == method)


def _has(rows: Sequence[Row], method: str) -> bool:
    return any(row["method"] == method for row in rows)


def _seeds(rows: Sequence[Row]) -> set[int]:
    return {row["seed"] for row in rows}


def _unique(items: Iterator[str]) -> list[str]:
    return list(dict.fromkeys(items))


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
