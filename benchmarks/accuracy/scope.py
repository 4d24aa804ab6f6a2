"""The section "What attention is worth" of the results page, from a results file alone."""

from collections.abc import Mapping
from typing import Any

NAMES: Mapping[str, str] = {
    "experts": "`--scope experts`",
    "all": "`--scope all`",
    "all-attention-8": "`--scope all`, attention at 8 bits or more",
}


def scope_section(name: str, results: Mapping[str, Any]) -> list[str]:
    """Rows of equal size: bits of experts and attention, files, KL and its share."""
    rows = results["rows"]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    lines = [
        f"## What attention is worth: {results['model']}",
        "",
        f"`{name}`, {results['date']}, commit {commits}. `benchmarks/bench_scope.py`: plans of all "
        "linears for the file size of a plan of the experts, so that bytes compare and not bits, "
        f"which are of other weights. Seed {results['seed']}, "
        f"{rows[0]['heldout_tokens']:,} held-out tokens. Attention that the scope leaves out has "
        "the 16 bits of the original. Share: KL over that of `--scope experts` at the size.",
        "",
        "| experts at | plan | weight files, bytes | bits of experts | bits of attention | KL "
        "| top-1 same | share |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        base = _base(rows, row)
        cells = (
            f"{row['expert_bits_asked']:g} bits",
            NAMES[row["plan"]],
            f"{row['file_bytes']:,}",
            f"{row['expert_bits']:.2f}",
            f"{row['attention_bits']:.2f}",
            f"{row['kl']:.5f}",
            f"{row['top1_agreement']:.2%}",
            "-" if base is None else f"{row['kl'] / base['kl']:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _base(rows: list[Mapping[str, Any]], row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The row of the experts alone at the same size, if it was measured."""
    same = [r for r in rows if r["expert_bits_asked"] == row["expert_bits_asked"]]
    return next((r for r in same if r["plan"] == "experts"), None)
