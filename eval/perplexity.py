"""Perplexity of a model on a text, and its distance to a reference model.

    python eval/perplexity.py out --text wikitext2 --reference Qwen/Qwen1.5-MoE-A2.7B

Windows do not overlap and every token but the first of a window is scored, as in published tables.
Compare a quantized model with its own original under the same window and text; perplexities of
other windows are not comparable.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import mxq  # registers the checkpoint format
from mxq.evaluation import (
    Score,
    load_model,
    load_tokenizer,
    require_counts,
    require_folder_of,
    require_same_vocabulary,
    score,
    window_length,
    windows,
)
from mxq.profiling.texts import encode_joined, file_texts, hub_texts

DEMO_DOCUMENTS = 200


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        report = _evaluate(arguments)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"perplexity: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    Console().print(_table(report))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Perplexity of a causal language model on a text.")
    parser.add_argument("model", help="hub id, folder, or demo")
    parser.add_argument("--text", required=True, help="a .txt or .jsonl file, wikitext2, or demo")
    parser.add_argument("--reference", help="model to compare with: hub id, folder, or demo")
    parser.add_argument("--window", type=int, help="tokens (2048, or what the model knows if less)")
    parser.add_argument("--limit", type=int, help="read no more than this many tokens of the text")
    parser.add_argument("--batch", type=int, default=1, help="windows at a time (1)")
    parser.add_argument("--device", help="cuda, cuda:1, cpu, auto (a GPU if there is one)")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    return parser


def _evaluate(arguments: argparse.Namespace) -> dict[str, object]:
    """The result as it is written to JSON."""
    require_counts(arguments.window, arguments.batch)
    require_folder_of(arguments.json)
    ids = _ids(arguments)
    model = load_model(arguments.model, device=arguments.device)
    window = window_length(model, arguments.window)
    batches = windows(ids, window, arguments.batch)
    reference = None
    if arguments.reference is not None:
        is_itself = arguments.reference == arguments.model
        reference = model if is_itself else load_model(arguments.reference, device=arguments.device)
    progress = track(batches, "scoring", console=Console(stderr=True), transient=True)
    return {
        **_numbers(score(model, progress, reference=reference)),
        "model": arguments.model,
        "text": arguments.text,
        "window": window,
        "versions": {
            "mxq": mxq.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _ids(arguments: argparse.Namespace) -> Tensor:
    """Token ids of the text; what can be wrong with it is found before a model is loaded."""
    limit = arguments.limit
    if limit is not None and limit < 2:
        raise ValueError(f"limit is {limit} tokens; scoring needs at least 2")
    texts = _texts(arguments.text)
    tokenizer = load_tokenizer(arguments.model)
    if arguments.reference is not None:
        other = load_tokenizer(arguments.reference)
        require_same_vocabulary(tokenizer, other, (arguments.model, arguments.reference))
    return encode_joined(tokenizer, texts)[:limit]


def _texts(name: str) -> Iterable[str]:
    """The documents to score."""
    if name == "wikitext2":
        return hub_texts(name, "test", otherwise="give a file: --text PATH, or use --text demo")
    if name == "demo":
        from mxq import demo

        return [document.text for document in demo.documents("heldout", DEMO_DOCUMENTS)]
    return file_texts(Path(name))


def _numbers(result: Score) -> dict[str, object]:
    numbers: dict[str, object] = {
        "tokens": result.tokens,
        "nll": result.nll,
        "perplexity": result.perplexity,
    }
    if result.agreement is not None:
        numbers["kl"] = result.agreement.kl
        numbers["top1_agreement"] = result.agreement.top1
        numbers["reference_nll"] = result.agreement.nll
    return numbers


_ROWS = {
    "nll": ("negative log-likelihood", "{:.4f} nats per token"),
    "perplexity": ("perplexity", "{:.4f}"),
    "reference_nll": ("the reference's", "{:.4f} nats per token"),
    "kl": ("KL(reference || model)", "{:.6f} nats per token"),
    "top1_agreement": ("same likeliest token", "{:.2%}"),
    "tokens": ("tokens scored", "{:,}"),
    "window": ("window", "{:,} tokens"),
}


def _table(report: Mapping[str, object]) -> Table:
    table = Table(title=f"{report['model']} on {report['text']}", show_header=False)
    for key, (label, form) in _ROWS.items():
        if key in report:
            table.add_row(label, form.format(report[key]))
    return table


if __name__ == "__main__":
    sys.exit(main())
