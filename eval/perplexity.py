"""Perplexity of models on texts, side by side, and their distance to a reference model.

    python eval/perplexity.py out --text wikitext2 --reference Qwen/Qwen1.5-MoE-A2.7B
    python eval/perplexity.py out-a out-b --text code=code.txt,prose=prose.jsonl --per-domain

Windows do not overlap and every token but the first of a window is scored, as in published tables.
Compare a quantized model with its own original under the same window and text; perplexities of
other windows are not comparable. docs/evaluating.md says what the intervals mean.
"""

import argparse
import sys
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

import mxq  # noqa: F401  (registers the checkpoint format)
from mxq.evaluation.losses import ModelLosses
from mxq.evaluation.options import add_common_options, add_text_options, text_options
from mxq.evaluation.output import (
    Report,
    difference_cells,
    loss_cells,
    losses_report,
    make_table,
    run_script,
    text_caption,
    text_facts,
    text_title,
    versions,
    watch,
)
from mxq.evaluation.texts import Prepared, measure, prepare


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_script(_parser().parse_args(argv), _evaluate, "perplexity")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Perplexity of causal language models on texts.")
    add_common_options(parser)
    add_text_options(parser, reference="none")
    parser.add_argument("--per-domain", action="store_true", help="a row for each domain as well")
    parser.add_argument("--batch", type=int, default=1, help="windows at a time (1)")
    return parser


def _evaluate(arguments: argparse.Namespace) -> tuple[Report, Sequence[Table]]:
    prepared = prepare(
        arguments.models,
        text_options(arguments),
        reference=arguments.reference,
        baseline=arguments.baseline,
    )
    found = measure(prepared, watch)
    report: Report = {
        **text_facts(prepared),
        "models": [{"model": losses.model, **losses_report(losses)} for losses in found],
        "versions": versions(),
    }
    return report, _tables(prepared, found, per_domain=arguments.per_domain)


def _tables(
    prepared: Prepared, found: Sequence[ModelLosses], *, per_domain: bool
) -> Sequence[Table]:
    columns = ["perplexity", *(() if prepared.reference is None else ("KL", "flips"))]
    caption = text_caption(prepared, found)
    means = make_table(text_title(prepared, found), ["model"], ["windows", *columns], caption)
    apart = make_table(
        f"Paired differences to {found[prepared.baseline].model} +- standard error",
        ["model"],
        ["nats per token", *columns],
    )
    for losses in found:
        rows = {losses.model: losses.overall}
        if per_domain:
            rows |= {f"  {domain}": loss for domain, loss in losses.domains.items()}
        for label, loss in rows.items():
            means.add_row(escape(label), f"{loss.windows:,}", *loss_cells(loss)[: len(columns)])
            if loss.difference is not None:
                apart.add_row(escape(label), *difference_cells(loss)[: len(columns) + 1])
    return (means, apart) if len(found) > 1 else (means,)


if __name__ == "__main__":
    sys.exit(main())
