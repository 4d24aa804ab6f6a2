"""The section "Speed" of the results page, from results files alone."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from speed.cases import ORDER, shares
from speed.goals import Goal, goals_of

Row = Mapping[str, Any]

NAMES: Mapping[str, str] = {
    "small/mxq": "mxq `--effort fast`: all stages",
    "small/mxq-one-scheme": "mxq `--effort fast`: all stages, one scheme",
    "small/mxq-balanced": "mxq `--effort balanced` (the default): all stages",
    "small/mxq-best": "mxq `--effort best`: all stages",
    "small/autoround": "AutoScheme on all samples, rounding without tuning, export",
    "small/autoround-default-scoring": "the same, scored on its default of 16 x 128 tokens",
    "small/llmcompressor": "llm-compressor: GPTQ, one scheme",
    "random/mxq": "mxq `--effort fast`: all stages",
    "random/llmcompressor": "llm-compressor: GPTQ, one scheme",
}

CLOCKED = (
    *("small/mxq", "small/mxq-balanced", "small/mxq-best", "small/mxq-one-scheme"),
    "random/mxq",
)
"""Cases whose steps are shown."""

PROCESSORS = "processor_s"

LEAST_SHARE = 0.005
"""Parts below this share of a run are summed up in one line."""


def speed_sections(files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Sections of all files, or one that says that there is none."""
    if not files:
        return [
            "## Speed of the pipeline",
            "",
            "Not measured: there is no `pipeline-*.json` (see `benchmarks/bench_pipeline.py`).",
            "",
        ]
    lines = []
    for name, results in files.items():
        lines += _section(name, results)
    return lines


def _section(name: str, results: Mapping[str, Any]) -> list[str]:
    rows: Sequence[Row] = results["rows"]
    settings, machine = results["settings"], results["machine"]
    gib = machine["memory_bytes"] / 2**30
    return [
        f"## Speed of the pipeline: {settings['threads']} threads",
        "",
        f"`{name}`, {results['date'][:10]}; {machine['processor']}, {machine['cores']} cores, "
        f"{gib:.0f} GiB. Calibration {settings['small_samples']} x {settings['seqlen']} tokens of "
        f"{settings['calibration']} ({settings['random_samples']} x {settings['seqlen']} random "
        "ones for the random model), the same ids for all; mxq holds out one more row for every "
        "eight. Each run is a process of its own with cold caches. Every linear of the decoder "
        "layers is quantized; seconds count loading the model and writing the result, not imports; "
        "held-out loss is in the time of mxq only. Candidates of mxq: "
        f"{', '.join(settings['mxq_schemes'])}; on the random model "
        f"{', '.join(settings['random_schemes'])}; of AutoScheme: "
        f"{', '.join(settings['autoround_schemes'])}; both at {settings['bits']:g} bits per "
        "weight. "
        f"llm-compressor rounds to {settings['one_scheme']} and passes every token through every "
        "expert, its default.",
        "",
        *_totals(rows),
        "",
        *(_goal_line(goal) for goal in goals_of(rows)),
        "",
        "Below are seconds of all processors together, as the steps of mxq took them; s per "
        "million is of the parameters that were quantized. Where it was run again, beside other "
        "programs with one thread, a case has the steps of that run.",
        "",
        *_where(results),
        *_left_out(rows),
    ]


def _totals(rows: Sequence[Row]) -> list[str]:
    """A line for each case that was run: medians, and the spread where there are several runs."""
    lines = [
        "| model | tool | seconds | of processors | s per million parameters | imports, s "
        "| load at start | held-out nats |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in ORDER:
        found = [row for row in rows if row["case"] == case and "total_s" in row]
        if not found:
            continue
        total, parameters = _median(found, "total_s"), found[0]["model"]["parameters"]
        spread = [row["total_s"] for row in found]
        between = f" ({min(spread):.1f} to {max(spread):.1f})" if len(spread) > 1 else ""
        loss = f"{_median(found, 'nll'):.4f}" if "nll" in found[0] else "-"
        lines.append(
            f"| {_model(found[0])} | {NAMES[case]}; {_versions(found[0])} | {total:.1f}{between} "
            f"| {_median(found, 'processor_s'):.1f} | {total / parameters * 1e6:.3f} "
            f"| {_median(found, 'import_s'):.1f} | {_median(found, 'load_at_start'):.1f} | {loss} |"
        )
    original = [row["original_nll"] for row in rows if row["case"] == "small/mxq" and "nll" in row]
    if original:
        lines += ["", f"The original of the small model has {original[0]:.4f} held-out nats."]
    return lines


def _goal_line(goal: Goal) -> str:
    found = "" if goal.found is None else f", found {goal.found:.2f}"
    return f"- {goal.text}: at least {goal.least:g} times{found} (**{goal.verdict}**)"


def _where(results: Mapping[str, Any]) -> list[str]:
    """Tables of stages, and of the parts of every stage, of mxq's first run on each model."""
    lines = []
    for case in CLOCKED:
        row = clocked(results, case)
        if row is not None:
            place = f"{NAMES[case]}, {_model(row)}, {made_at(row)}"
            lines += [f"Where the processors' time goes, {place}:", "", *_parts(row), ""]
    return lines


def clocked(results: Mapping[str, Any], case: str) -> Row | None:
    """The run of a case whose steps are shown, None without one.

    One that was made beside other programs comes before all: it is the newer one.
    """
    rows = (*results.get("loaded", ()), *results["rows"])
    return next((row for row in rows if row["case"] == case and "clock" in row), None)


def made_at(row: Row) -> str:
    """The commit that ran, its threads where they are not the file's, and the load at the start."""
    threads = ", one thread" if row.get("threads") == 1 else ""
    return f"commit {row['commit']}{threads}, load {row['load_at_start']:.1f} at the start"


def _parts(row: Row) -> list[str]:
    clock, million = row["clock"], row["quantized_weights"] / 1e6
    stages = list(shares(clock, "stage", PROCESSORS))
    ranked = sorted(shares(clock, "part", PROCESSORS).items(), key=lambda item: -item[1])
    large = [part for part, share in ranked if share >= LEAST_SHARE]
    seconds: dict[tuple[str, str], float] = {}
    for entry in clock:
        part = entry["part"] if entry["part"] in large else "all others"
        place = entry["stage"], part
        seconds[place] = seconds.get(place, 0.0) + entry[PROCESSORS]
    total = sum(seconds.values())
    rest = [part for part in large if part != "other"]
    lines = [
        f"| share of the time | {' | '.join(stages)} | all | s per million |",
        f"| --- |{' ---: |' * (len(stages) + 2)}",
    ]
    for part in (*rest, *(["other"] if "other" in large else []), "all others"):
        cells = [seconds.get((stage, part), 0.0) for stage in stages]
        lines.append(_step(part, cells, total, million))
    sums = [sum(s for (at, _), s in seconds.items() if at == stage) for stage in stages]
    lines.append(_step("all", sums, total, million))
    per_million = [f"{cell / million:.3f}" for cell in (*sums, total)]
    return [*lines, _table_line("s per million", [*per_million, ""])]


def _step(name: str, seconds: Sequence[float], total: float, million: float) -> str:
    """A line of a step: its shares by stage and in all, and what it costs."""
    shown = [f"{cell / total:.1%}" for cell in (*seconds, sum(seconds))]
    return _table_line(name, [*shown, f"{sum(seconds) / million:.3f}"])


def _table_line(name: str, cells: Sequence[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


def _left_out(rows: Sequence[Row]) -> list[str]:
    lines = [
        f"- {row['case']}: {'failed' if 'error' in row else row['skipped']}"
        for row in rows
        if "total_s" not in row
    ]
    return ["Left out:", "", *lines, ""] if lines else []


def _median(rows: Sequence[Row], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def _model(row: Row) -> str:
    model = row["model"]
    return f"{model['name']} ({model['family']}, {model['parameters'] / 1e6:,.1f} M)"


def _versions(row: Row) -> str:
    return ", ".join(f"{name} {text}" for name, text in row["versions"].items())
