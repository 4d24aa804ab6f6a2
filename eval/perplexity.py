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
from dataclasses import replace

from rich.table import Table

import mxq  # noqa: F401  (registers the checkpoint format)
from mxq.evaluation.losses import Loss, ModelLosses
from mxq.evaluation.output import (
    Report,
    add_common_options,
    as_json,
    error_cell,
    interval_caption,
    interval_cell,
    interval_facts,
    make_table,
    run_script,
    versions,
    watch,
)
from mxq.evaluation.reference import KEEP_CHOICES
from mxq.evaluation.texts import Prepared, TextOptions, measure, prepare


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_script(_parser().parse_args(argv), _evaluate, "perplexity")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Perplexity of causal language models on texts.")
    add_common_options(parser)
    parser.add_argument(
        "--text",
        required=True,
        help="a .txt or .jsonl file, wikitext2, demo, or NAME=TEXT,NAME=TEXT for several domains",
    )
    parser.add_argument("--per-domain", action="store_true", help="a row for each domain as well")
    parser.add_argument("--reference", help="model to compare with: hub id, folder, or demo")
    parser.add_argument("--window", type=int, help="tokens (2048, or what the models know if less)")
    parser.add_argument("--limit", type=int, help="read at most this many tokens of each domain")
    parser.add_argument("--batch", type=int, default=1, help="windows at a time (1)")
    parser.add_argument(
        "--keep-logits",
        choices=KEEP_CHOICES,
        default="auto",
        help="keep the reference's logits in temporary files (yes), or the reference in memory "
        "beside each model (no); auto: files if they take less than half of the free disk",
    )
    return parser


def _evaluate(arguments: argparse.Namespace) -> tuple[Report, Sequence[Table]]:
    options = TextOptions(
        text=arguments.text,
        window=arguments.window,
        limit=arguments.limit,
        batch=arguments.batch,
        device=arguments.device,
        confidence=arguments.confidence,
        keep_logits=arguments.keep_logits,
    )
    prepared = prepare(arguments.models, arguments.reference, options)
    found = measure(prepared, watch)
    report: Report = {
        "text": options.text,
        "window": prepared.window,
        "limit": options.limit,
        "reference": prepared.reference,
        **interval_facts(options.confidence),
        "models": [_model_report(losses) for losses in found],
        "versions": versions(),
    }
    return report, _tables(prepared, found, per_domain=arguments.per_domain)


def _model_report(losses: ModelLosses) -> Report:
    overall = as_json(losses.overall)
    assert isinstance(overall, dict)
    return {"model": losses.model, **overall, "domains": as_json(losses.domains)}


def _tables(
    prepared: Prepared, found: Sequence[ModelLosses], *, per_domain: bool
) -> Sequence[Table]:
    overall = found[0].overall
    units = [loss.windows for loss in found[0].domains.values()]
    caption = interval_caption(prepared.options.confidence, units, "windows")
    columns = ["perplexity"]
    if prepared.reference is not None:
        columns += ["KL", "flips"]
        caption += (
            " KL: KL(reference || model) in nats per token. Flips: where the likeliest token is "
            "another one."
        )
    title = f"{prepared.options.text}: {overall.tokens:,} tokens in windows of {prepared.window:,}"
    means = make_table(title, ["model"], ["windows", *columns], caption)
    apart = make_table(
        f"Paired differences to {found[0].model} +- standard error",
        ["model"],
        ["nats per token", *columns],
    )
    for losses in found:
        rows = {losses.model: losses.overall}
        if per_domain:
            rows |= {f"  {domain}": loss for domain, loss in losses.domains.items()}
        for label, loss in rows.items():
            means.add_row(label, f"{loss.windows:,}", *_mean_cells(loss)[: len(columns)])
            if loss.difference is not None:
                apart.add_row(label, *_difference_cells(loss)[: len(columns) + 1])
    return (means, apart) if len(found) > 1 else (means,)


def _mean_cells(loss: Loss) -> list[str]:
    return [
        interval_cell(loss.perplexity, "{:.4f}"),
        interval_cell(loss.kl, "{:.6f}"),
        interval_cell(loss.flips, "{:.2%}"),
    ]


def _difference_cells(loss: Loss) -> list[str]:
    difference = loss.difference
    assert difference is not None
    ratio = difference.perplexity_ratio
    percent = replace(ratio, value=ratio.value - 1)
    return [
        error_cell(difference.nll, "{:.4f}"),
        error_cell(percent, "{:.2%}"),
        error_cell(difference.kl, "{:.6f}"),
        error_cell(difference.flips, "{:.2%}"),
    ]


if __name__ == "__main__":
    sys.exit(main())
