"""The part of docs/results.md about timings of the kernels, from the raw files."""

from collections.abc import Mapping, Sequence
from typing import Any

from group_gemm.goals import Row, goal_table, judge

NO_TIMING = (
    "## Kernels: time",
    "",
    "No timing of the kernels exists yet. On a machine with a GPU,",
    "",
    "    python benchmarks/bench_group_gemm.py --json benchmarks/results/group-gemm-GPU.json",
    "    python benchmarks/make_results_page.py",
    "",
    "times them and puts the results here; nothing simulated is ever shown in this section. The "
    "goals that they will be judged by, set for an H200 before anything was timed:",
    "",
)


def timing_sections(files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Sections of all results files, or the words that there is none.

    Raises:
        ValueError: If a file is of a dry run or has a row without a time.
    """
    if not files:
        return [*NO_TIMING, *goal_table(judge([])), ""]
    lines = []
    for name, results in files.items():
        untimed = [row["key"] for row in results["rows"] if row["median_us"] is None]
        if results["about"]["dry_run"] or untimed:
            raise ValueError(
                f"{name} has rows that were not timed ({untimed[:3]}); remove the file"
            )
        lines += _section(name, results)
    return lines


def _section(name: str, results: Mapping[str, Any]) -> list[str]:
    about, rows = results["about"], results["rows"]
    versions = ", ".join(f"{key} {text}" for key, text in about["versions"].items())
    ceilings = {key: value for key, value in results["ceilings"].items() if value is not None}
    failed = [check["name"] for check in results["checks"] if not check["passed"]]
    lines = [
        f"## Kernels: time on {about['gpu']}",
        "",
        f"`{name}`, {about['date']}; {versions}. {len(rows)} cases, {len(results['checks'])} "
        f"checks against the definition, {len(failed)} failed. Median of CUDA graph replays on "
        "rotated copies of the weights; both products of a layer unless said otherwise.",
        "",
        f"Measured ceilings: {', '.join(_ceiling(*item) for item in ceilings.items())}. Peers: "
        f"{'; '.join(f'{peer} {words}' for peer, words in results['peers'].items())}.",
        "",
        "Goals were set for an H200 before anything was timed; the worst case decides.",
        "",
        *goal_table(judge(rows)),
        "",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        lines += _model_table(model, [row for row in rows if row["model"] == model])
    if results["left_out"]:
        lines += ["Left out:", ""]
        lines += [f"* {case['key']}: {case['reason']}" for case in results["left_out"]]
        lines += [""]
    return lines


def _model_table(model: str, rows: Sequence[Row]) -> list[str]:
    """Every row of a model: time with spread, weight bandwidth, rate, share of the roofline."""
    lines = [
        f"### {model}",
        "",
        "| what | by | plan | M | routing | launches | us | 10 % .. 90 % | weights TB/s | TFLOP/s "
        "| roofline |",
        "| --- | --- | --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    order = sorted(rows, key=lambda row: (row["kind"] != "pair", row["tokens"], row["plan"]))
    for row in order:
        share = "-" if row["roofline_share"] is None else f"{row['roofline_share']:.0%}"
        lines.append(
            f"| {row['kind']} | {row['runner']} | {row['plan']} | {row['tokens']} "
            f"| {row['routing']} | {row['launches']} | {row['median_us']:.1f} "
            f"| {row['p10_us']:.1f} .. {row['p90_us']:.1f} | {row['weight_tb_s']:.2f} "
            f"| {row['tflop_s']:.0f} | {share} |"
        )
    return [*lines, ""]


def _ceiling(name: str, value: float) -> str:
    if name == "copy_bytes_per_s":
        return f"copy {value / 1e12:.2f} TB/s"
    return f"{name.removesuffix('_flops_per_s')} {value / 1e12:.0f} TFLOP/s"
