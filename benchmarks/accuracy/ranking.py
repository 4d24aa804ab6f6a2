"""The section "Predicted and measured order of plans" of the results page, from a file alone."""

from collections.abc import Mapping
from typing import Any

LEAST_SPEARMAN = 0.9
"""What was to be reached over thirty plans of one size."""


def ranking_section(name: str, results: Mapping[str, Any]) -> list[str]:
    """Rank correlation, the sum's bias, and a few of the plans."""
    found, rows = results["summary"], results["rows"]
    verdict = "reached" if found["spearman"] >= LEAST_SPEARMAN else "missed"
    lines = [
        f"## Predicted and measured order of plans: {results['model']}",
        "",
        f"`{name}`, {results['date']}, commit {results['commit']}. {found['plans']} plans of "
        f"{results['bits']:g} bits per weight, solved on losses multiplied by noise of a growing "
        f"standard deviation (of its logarithm), seed {results['seed']}. Predicted: the sum of the "
        "blocks' losses, of calibration text. Measured: KL to the original on held-out text.",
        "",
        f"Spearman's rank correlation is {found['spearman']:.3f} (goal {LEAST_SPEARMAN:g}: "
        f"{verdict}). Measured over predicted is {found['factor_median']:.2f} in the median, from "
        f"{found['factor_least']:.2f} to {found['factor_most']:.2f}.",
        "",
        "| noise | predicted | measured | measured / predicted |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for row in rows[:: max(1, len(rows) // 10)]:
        predicted, kl = row["predicted"], row["kl"]
        lines.append(f"| {row['noise']:.2f} | {predicted:.5f} | {kl:.5f} | {kl / predicted:.2f} |")
    return [*lines, ""]
