"""Does the predicted loss order plans as the measured one does?

Plans of one size are drawn: the program is solved again and again on losses that are multiplied
by noise, from none to so much that they hardly count, so plans lie between the best and a drawn
one. Each is packed and judged like the rows of ``bench_accuracy.py``. The sum of the true table's
losses predicts; KL to the original on held-out text is what was measured.

    python benchmarks/bench_ranking.py MODEL --calibration file:a=PATH,b=PATH \
        --evaluate a=PATH --evaluate b=PATH --json benchmarks/results/NAME.json
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from accuracy.bench import open_bench, read_evaluation
from accuracy.judge import Packing, answers, dense_model, judge_plan
from accuracy.plans import OWN, Tables
from accuracy.runs import make_parser, open_results, save_results
from bench_memory import commit
from scipy.stats import spearmanr
from transformers.utils import logging

from mxq.artifacts import Allocation, SensitivityTable
from mxq.config import CalibrationOptions
from mxq.search.allocate import allocate

SETTINGS = ("bits", "plans", "seed")
"""Options that every plan depends on, beside those of all accuracy benchmarks."""

MOST_NOISE = 3.0
"""Standard deviation of the noise's logarithm for the last plan; the first one has none."""


def main() -> None:
    """Judge what the results file lacks, one plan at a time."""
    args = _arguments()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    settings = {"commit": commit(), **{key: getattr(args, key) for key in SETTINGS}}
    results = open_results(args, settings, {"rows": []})
    evaluations = [read_evaluation(args.model, e, args.window, args.windows) for e in args.evaluate]
    options = CalibrationOptions(args.calibration, args.samples, args.seqlen, args.seed)
    bench = open_bench(args.model, options, evaluations)
    recipe = OWN["mxq"]
    table = Tables(bench).get("fisher", recipe.method)
    reference = answers(dense_model(bench), bench.evaluations)
    for number in range(len(results["rows"]), args.plans):
        started = time.perf_counter()
        noise = MOST_NOISE * number / max(1, args.plans - 1)
        plan = draw_plan(table, args.bits, noise, number)
        judged = judge_plan(bench, plan, Packing(recipe.method, recipe.target), reference)
        row = {
            "noise": noise,
            "bits": plan.bits_per_weight,
            "predicted": plan.predicted_loss,
            "kl": judged["kl"],
            "seconds": round(time.perf_counter() - started, 1),
        }
        results["rows"].append(row)
        results["summary"] = summary(results["rows"])
        save_results(args.json, results)
        print(
            f"{number:3d} noise {noise:.2f} predicted {row['predicted']:.5f} KL {row['kl']:.5f}",
            flush=True,
        )
    print(json.dumps(results["summary"]))


def draw_plan(table: SensitivityTable, bits: float, noise: float, seed: int) -> Allocation:
    """The plan that is best on noisy losses, with what the true losses predict of it."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(table.blocks), 1
    factors = (noise * torch.randn(shape, generator=generator, dtype=torch.float64)).exp()
    noisy = torch.tensor(table.loss, dtype=torch.float64) * factors
    plan = allocate(replace(table, loss=tuple(map(tuple, noisy.tolist()))), bits=bits)
    places = {scheme: place for place, scheme in enumerate(table.schemes)}
    predicted = math.fsum(
        losses[places[plan.schemes[block.name]]]
        for block, losses in zip(table.blocks, table.loss, strict=True)
    )
    return replace(plan, predicted_loss=predicted, bound=0.0, proven=False)


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Rank correlation, and the measured KL as a multiple of the predicted one."""
    predicted, measured = ([row[key] for row in rows] for key in ("predicted", "kl"))
    factors = [kl / loss for kl, loss in zip(measured, predicted, strict=True)]
    found = {
        "plans": len(rows),
        "factor_median": statistics.median(factors),
        "factor_least": min(factors),
        "factor_most": max(factors),
    }
    if len(rows) > 2:
        found["spearman"] = float(spearmanr(predicted, measured).statistic)
    return found


def _arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--bits", type=float, default=2.5)
    parser.add_argument("--plans", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
