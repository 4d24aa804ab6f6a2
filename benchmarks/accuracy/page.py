"""The section "Accuracy" of the results page and the README's table, from results files alone."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from accuracy.goals import BASELINE, Row, at, budget, goals_of, share

NAMES: Mapping[str, str] = {
    "rtn": "uniform, round to nearest with clip search",
    "gptq": "uniform, GPTQ",
    "gptq-rotated": "uniform, GPTQ, rotated inputs",
    "mxmoe": "MxMoE's own mode (layer norm, per-layer budget, gate = up, rotated GPTQ)",
    "mxq-fast": "mxq with `--effort fast`",
    "mxq": "mxq default",
    "mxq-best": "mxq with `--effort best`",
    "llmcompressor": "llm-compressor GPTQ, uniform",
    "llmcompressor-mxq-plan": "llm-compressor GPTQ, widths of mxq's plan, no rotation",
    "autoround": "AutoRound, widths by AutoScheme, tuned",
    "autoround-untuned": "AutoRound, widths by AutoScheme",
    "autoround-uniform": "AutoRound, uniform, tuned",
    "modelopt": "Model-Optimizer `auto_quantize`, int2/3/4/8 symmetric, scales by mse",
}


CHOICES = (
    " Choices kept: the share of the original's choices of experts (a held-out token with one of "
    "its experts) that are the same, the mean over layers, of the seeds that were judged by it."
)

DEFAULT_ITERS = 200
"""Steps of AutoRound's tuning when nothing is said; rows with fewer say so."""


def accuracy_section(name: str, results: Mapping[str, Any]) -> list[str]:
    """Tables of one accuracy file: by size and method, goals, domains, predicted and measured."""
    rows: list[Row] = results["rows"]
    has_choices = any("choices_kept" in row for row in rows)
    more = " choices kept |" if has_choices else ""
    lines = [
        f"## Accuracy at equal bytes: {results['model']}",
        "",
        f"`{name}`, {results['date']}, commit {', '.join(_unique(r['commit'] for r in rows))}; "
        f"{_listed(results['versions'])}. Calibration {results['samples']} x {results['seqlen']} "
        f"tokens, of which mxq takes a quarter more for cold experts and an eighth more to hold "
        "out; peers are given all of these rows. "
        f"{rows[0]['heldout_tokens']:,} held-out tokens. Mean over seeds, +- the standard "
        "deviation between them. KL to the original and excess loss in nats per token; bits count "
        "every stored bit of the quantized linears (experts and shared experts, the same for all "
        "tools): codes, scales of 16 bits, zero points of the width of the codes. Shares compare "
        f"the seeds that both rows have.{CHOICES if has_choices else ''}",
        "",
        "| budget | method | seeds | bits | KL | excess nats | top-1 same |"
        f"{more} KL / {BASELINE} |",
        f"| ---: | --- |{' ---: |' * (7 if has_choices else 6)}",
    ]
    for size in _sizes(rows):
        methods = _unique(row["method"] for row in at(rows, size))
        lines += [_line(rows, size, method, has_choices=has_choices) for method in methods]
    return [
        *lines,
        "",
        *_peers(rows),
        *_skipped(results.get("skipped", [])),
        *goals_table(rows),
        "",
        *domain_table(rows),
        "",
        *prediction_table(rows),
        "",
    ]


def goals_table(rows: Sequence[Row]) -> list[str]:
    """What was to be reached beside what was found."""
    lines = [
        "Goals, each the KL of `mxq` over that of another row of the size:",
        "",
        "| goal | at most | found | |",
        "| --- | ---: | ---: | --- |",
    ]
    for goal in goals_of(rows):
        found = "-" if goal.found is None else f"{goal.found:.2f}"
        lines.append(f"| {goal.text} | {goal.most:.2f} | {found} | {goal.verdict} |")
    return lines


def domain_table(rows: Sequence[Row]) -> list[str]:
    """KL by held-out domain."""
    domains = list(rows[0]["domains"])
    lines = [
        "KL by held-out domain:",
        "",
        f"| budget | method | {' | '.join(domains)} |",
        f"| ---: | --- |{' ---: |' * len(domains)}",
    ]
    for size in _sizes(rows):
        for method in _unique(row["method"] for row in at(rows, size)):
            found = at(rows, size, method)
            cells = [
                f"{statistics.mean(r['domains'][d]['kl'] for r in found):.5f}" for d in domains
            ]
            lines.append(f"| {budget(size)} | {method} | {' | '.join(cells)} |")
    return lines


def prediction_table(rows: Sequence[Row]) -> list[str]:
    """Predicted loss against measured KL where the prediction is in nats."""
    lines = [
        "Predicted loss (Fisher, calibration text) against measured KL (held-out text):",
        "",
        "| budget | method | predicted | measured | measured / predicted |",
        "| ---: | --- | ---: | ---: | ---: |",
    ]
    for size in _sizes(rows):
        for method in (BASELINE, "mxq-fast", "mxq"):
            found = at(rows, size, method)
            if found and found[0]["predicted"] is not None:
                predicted = statistics.mean(row["predicted"] for row in found)
                measured = statistics.mean(row["kl"] for row in found)
                lines.append(
                    f"| {budget(size)} | {method} | {predicted:.5f} | {measured:.5f} "
                    f"| {measured / predicted:.2f} |"
                )
    return lines


def readme_table(rows: Sequence[Row]) -> list[str]:
    """Mean KL of each method and budget."""
    sizes = _sizes(rows)
    budgets = [
        f"{statistics.mean(row['bits'] for row in at(rows, size, 'mxq')):.2f}" for size in sizes
    ]
    lines = [
        f"| KL at bits per weight (budget) | {' | '.join(budgets)} |",
        f"| --- |{' ---: |' * len(sizes)}",
    ]
    for method in _unique(row["method"] for row in rows):
        cells = [_mean_kl(_on_common_seeds(at(rows, size), method)) for size in sizes]
        name = _name(method, [row for row in rows if row["method"] == method])
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _on_common_seeds(rows: Sequence[Row], method: str) -> list[Row]:
    """Rows of a method on the seeds that every method of the size has, so that means compare."""
    seeds = {name: {r["seed"] for r in rows if r["method"] == name} for name in NAMES}
    common = set.intersection(*(found for found in seeds.values() if found))
    return [row for row in rows if row["method"] == method and row["seed"] in common]


def _name(method: str, rows: Sequence[Row]) -> str:
    """A method's name, with the steps of its tuning where they are fewer than its default."""
    steps = sorted({row.get("settings", {}).get("iters", DEFAULT_ITERS) for row in rows})
    told = " and ".join(str(count) for count in steps if count < DEFAULT_ITERS)
    return NAMES[method] + (f", {told} steps instead of its {DEFAULT_ITERS}" if told else "")


def _mean_kl(rows: Sequence[Row]) -> str:
    return f"{statistics.mean(row['kl'] for row in rows):.4f}" if rows else "-"


def _line(rows: Sequence[Row], size: str, method: str, *, has_choices: bool) -> str:
    found = at(rows, size, method)
    kls = [row["kl"] for row in found]
    spread = f" +- {statistics.stdev(kls):.5f}" if len(kls) > 1 else ""
    of_baseline = share(rows, size, method, BASELINE)

    def mean(key: str) -> float:
        return statistics.mean(row[key] for row in found)

    cells = (
        budget(size),
        _name(method, found),
        str(len(found)),
        f"{mean('bits'):.4f}",
        f"{mean('kl'):.5f}{spread}",
        f"{mean('excess_nats'):.5f}",
        f"{mean('top1_agreement'):.2%}",
        *([_choices_kept(found)] if has_choices else []),
        "-" if of_baseline is None else f"{of_baseline:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def _choices_kept(rows: Sequence[Row]) -> str:
    """The mean of the rows that have it: older ones were judged without."""
    known = [row["choices_kept"] for row in rows if "choices_kept" in row]
    return f"{statistics.mean(known):.2%}" if known else "-"


def _peers(rows: Sequence[Row]) -> list[str]:
    """Versions and settings of the peers, one line each."""
    lines = []
    for method in _unique(row["method"] for row in rows if "settings" in row):
        found = [row for row in rows if row["method"] == method]
        settings = _unique(_listed(_plain(row["settings"])) for row in found)
        seconds = statistics.median(row["quantize_s"] for row in found)
        lines.append(
            f"* {NAMES[method]}: {'; '.join(_unique(_listed(r['versions']) for r in found))}; "
            f"{'; or '.join(settings)}; a row took {seconds:.0f} s (median; other programs ran "
            "beside it)."
        )
    return [*lines, ""] if lines else []


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that are the same at every size; lists in words."""
    kept = {k: v for k, v in settings.items() if k not in ("avg_bits", "effective_bits")}
    return {k: "/".join(v) if isinstance(v, list) else v for k, v in kept.items()}


def _skipped(skipped: Sequence[Row]) -> list[str]:
    lines = [
        f"* Not measured: {NAMES[row['method']]}, {budget(row['size'])}, seed {row['seed']}: "
        f"{row['skipped'].strip().splitlines()[-1]}"
        for row in skipped
    ]
    return [*lines, ""] if lines else []


def _listed(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {text}" for name, text in found.items())


def _sizes(rows: Sequence[Row]) -> list[str]:
    return _unique(row["size"] for row in rows)


def _unique(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))
