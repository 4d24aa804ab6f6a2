"""Does it pay to quantize attention too? ``--scope experts`` beside ``--scope all`` at equal bytes.

Bits per weight of the two are of different weights, so the files are made equal instead: a plan of
the experts with some bits per weight fixes the size of all weight files, and the plans of all
linears are solved for that size, as ``--size`` does. With ``experts`` attention stays in the 16
bits of the original; ``all`` lets the program choose; ``all-attention-8`` leaves attention at least
8 bits. Plans are packed and judged like the rows of ``bench_accuracy.py``, on the same text.

    python benchmarks/bench_scope.py MODEL --calibration file:a=PATH,b=PATH \
        --evaluate a=PATH --evaluate b=PATH --json benchmarks/results/NAME.json
"""

import argparse
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import torch
from accuracy.bench import Bench, count_schemes, open_bench, read_evaluation
from accuracy.judge import Answer, Packing, answers, dense_model, judge_plan
from accuracy.plans import OWN, Tables
from accuracy.runs import make_parser, open_results, save_results
from bench_memory import commit
from transformers.utils import logging

from mxq.artifacts import Allocation, SensitivityTable
from mxq.blocks import LinearBlock
from mxq.checkpoint.size import block_budget, kept_bytes
from mxq.config import CalibrationOptions
from mxq.search.allocate import allocate

PLANS = ("experts", "all", "all-attention-8")

ATTENTION_BITS = 8
"""Least bits of attention in the rows that protect it."""

RECIPE = OWN["mxq"]


@dataclass(frozen=True, slots=True)
class Run:
    """Both scopes on the same tokens, and what the original answers."""

    commit: str
    benches: Mapping[str, Bench]
    tables: Mapping[str, Tables]
    reference: list[Answer]

    @property
    def attention(self) -> tuple[LinearBlock, ...]:
        """The linears that only the wider scope quantizes."""
        inside = {block.name for block in self.benches["experts"].blocks}
        return tuple(b for b in self.benches["all"].blocks if b.name not in inside)

    def table(self, scope: str) -> SensitivityTable:
        """The losses of a scope's blocks, measured when they are first asked for."""
        return self.tables[scope].get("fisher", RECIPE.method)


def main() -> None:
    """Judge what the results file lacks, one plan at a time."""
    args = _arguments()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    results = open_results(args, {"seed": args.seed}, {"rows": []})
    there = {(row["expert_bits_asked"], row["plan"]) for row in results["rows"]}
    todo = [(bits, name) for bits in args.bits for name in PLANS if (bits, name) not in there]
    if not todo:
        return
    run = _open_run(args)
    for bits, name in todo:
        row = _row(run, bits, name)
        results["rows"].append(row)
        results["rows"].sort(key=lambda r: (r["expert_bits_asked"], PLANS.index(r["plan"])))
        save_results(args.json, results)
        print(
            f"{bits:g} {name:16s} KL {row['kl']:.5f} in {row['file_bytes']:,} bytes, attention "
            f"{row['attention_bits']:.2f} bits, {row['seconds']:.0f} s",
            flush=True,
        )


def solve(run: Run, expert_bits: float, name: str) -> tuple[Allocation, int]:
    """The plan of a row, and the bytes of all weight files that it was solved for."""
    experts = allocate(run.table("experts"), bits=expert_bits)
    limit = int(expert_bits * experts.weights)
    size_bytes = kept_bytes(run.benches["experts"].adapter) + limit // 8
    if name == "experts":
        return experts, size_bytes
    table = run.table("all")
    if name == "all-attention-8":
        table = at_least(table, {block.name for block in run.attention}, ATTENTION_BITS)
    budget = block_budget(run.benches["all"].adapter, size_bytes)
    return allocate(table, storage_bits=budget), size_bytes


def at_least(table: SensitivityTable, names: set[str], bits: int) -> SensitivityTable:
    """The table without narrower schemes for those blocks."""
    rows = (
        tuple(
            inf if block.name in names and scheme.w_bits < bits else loss
            for scheme, loss in zip(table.schemes, row, strict=True)
        )
        for block, row in zip(table.blocks, table.loss, strict=True)
    )
    return replace(table, loss=tuple(rows))


def mean_bits(blocks: Sequence[LinearBlock], plan: Allocation) -> float:
    """Stored bits per weight of those blocks; 16 where the plan has none of them."""
    stored = sum(
        plan.schemes[b.name].storage_bits(b.out_features, b.in_features)
        if b.name in plan.schemes
        else 16 * b.weights
        for b in blocks
    )
    return stored / sum(b.weights for b in blocks)


def _row(run: Run, expert_bits: float, name: str) -> dict[str, Any]:
    started = time.perf_counter()
    plan, size_bytes = solve(run, expert_bits, name)
    bench = run.benches["experts" if name == "experts" else "all"]
    judged = judge_plan(bench, plan, Packing(RECIPE.method, RECIPE.target), run.reference)
    attention = Counter(
        plan.schemes[block.name] for block in run.attention if block.name in plan.schemes
    )
    return {
        "expert_bits_asked": expert_bits,
        "plan": name,
        "commit": run.commit,
        "size_bytes": size_bytes,
        "expert_bits": mean_bits(run.benches["experts"].blocks, plan),
        "attention_bits": mean_bits(run.attention, plan),
        "attention_schemes": {str(scheme): attention[scheme] for scheme in sorted(attention)},
        "schemes": count_schemes(plan.schemes),
        "rotated_layers": list(plan.rotated_layers),
        "predicted": plan.predicted_loss,
        "unit": plan.unit,
        **judged,
        "seconds": round(time.perf_counter() - started, 1),
    }


def _open_run(args: argparse.Namespace) -> Run:
    evaluations = [read_evaluation(args.model, e, args.window, args.windows) for e in args.evaluate]
    options = CalibrationOptions(args.calibration, args.samples, args.seqlen, args.seed)
    benches = {
        scope: open_bench(args.model, options, evaluations, scope=scope)
        for scope in ("experts", "all")
    }
    reference = answers(dense_model(benches["all"]), evaluations)
    tables = {scope: Tables(bench) for scope, bench in benches.items()}
    return Run(commit(), benches, tables, reference)


def _arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--bits", type=_numbers, default=(2.5, 3.0, 4.0), help="of the experts")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


if __name__ == "__main__":
    main()
