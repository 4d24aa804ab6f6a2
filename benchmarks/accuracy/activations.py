"""The section "Weights and inputs" of the results page, from a file alone."""

import math
from collections.abc import Mapping
from typing import Any

PAPER: Mapping[str, tuple[float, float, float]] = {
    "DeepSeek-V2-Lite": (5.92, 8.44, 6.16),
    "Qwen1.5-MoE-A2.7B": (6.79, 18.44, 7.01),
    "Qwen2-57B-A14B-Instruct": (5.84, 110.66, 6.25),
    "Mixtral-8x7B-Instruct": (3.88, 9.06, 4.20),
}
"""Perplexity of WikiText-2 in Table 1 of arXiv 2505.05799: FP16, QuaRot W4A4, MxMoE W5A5."""


def activation_section(name: str, results: Mapping[str, Any]) -> list[str]:
    """Each row with the bits of its weights and inputs, then what MxMoE's paper reports."""
    rows = results["rows"]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    versions = ", ".join(f"{library} {text}" for library, text in results["versions"].items())
    head = (
        *("plan", "schemes (blocks)", "quantizer, target", "weight bits", "input bits", "KL"),
        *("KL of weights", "excess nats", "top-1 same", "predicted KL"),
    )
    lines = [
        f"## Weights and inputs: {results['model']}",
        "",
        f"`{name}`, {results['date']}, commit {commits}; {versions}. Calibration "
        f"{results['samples']} x {results['seqlen']} tokens, seed {results['seed']}; "
        f"{rows[0]['heldout_tokens']:,} held-out tokens. Each checkpoint is judged by its own "
        "modules, inputs rounded for each token, after the rotation where there is one. Experts "
        "and shared experts are quantized. Bits of weights count every stored bit; bits of inputs "
        "are the mean over multiply-adds. Excess nats are ln(PPL / PPL of the original). KL of "
        "weights: the same weights with inputs as they are.",
        "",
        f"| {' | '.join(head)} |",
        f"|{' --- |' * 3}{' ---: |' * 7}",
    ]
    lines += [_line(row) for row in rows]
    return [*lines, "", *_mixes(results), *_paper(), ""]


def _line(row: Mapping[str, Any]) -> str:
    in_nats = row["predicted"] is not None and row["unit"] == "nats per token"
    cells = (
        row["row"],
        ", ".join(f"{scheme} ({count})" for scheme, count in row["schemes"].items()),
        f"{row['quantizer']}, {row['target']}",
        f"{row['bits']:.3f}",
        f"{row['input_bits']:.2f}",
        f"{row['kl']:.5f}",
        f"{row['kl_weights']:.5f}",
        f"{row['excess_nats']:.5f}",
        f"{row['top1_agreement']:.2%}",
        f"{row['predicted']:.5f}" if in_nats else "-",
    )
    return f"| {' | '.join(cells)} |"


def _mixes(results: Mapping[str, Any]) -> list[str]:
    """What the solved rows are."""
    return [
        f"`mxq at 5` and both rows of `mxmoe` choose of {results['w5a5']}; `8-bit inputs` of "
        f"{results['bytes']}. `mxmoe` is MxMoE's own mode: norm of the layer's output, a budget "
        "for each layer, gate = up, rotated GPTQ, and loss^r x time^(1-r) with r = 0.75 and the "
        f"predicted time of {results['tokens']} tokens in mxq's kernels on {results['device']}, "
        "or r = 1. `mxq` is one program over the whole model on losses in nats; it rotates the "
        "layers where that pays.",
        "",
    ]


def _paper() -> list[str]:
    """The paper's rows, as excess nats."""
    lines = [
        "In form, not in value: what MxMoE's paper reports of other and far larger models (arXiv "
        "2505.05799, Table 1, WikiText-2), as ln(PPL / PPL of FP16). Its bits do not count the "
        "scales of rows and count a quarter of a bit for groups of 128; inputs of its W4A4 groups "
        "have a scale for each 128, too.",
        "",
        "| model (not measured here) | QuaRot W4A4, uniform | MxMoE W5A5 |",
        "| --- | ---: | ---: |",
    ]
    for model, (original, uniform, mixed) in PAPER.items():
        excess = (math.log(found / original) for found in (uniform, mixed))
        lines.append(f"| {model} | {' | '.join(f'{nats:.3f}' for nats in excess)} |")
    return lines
