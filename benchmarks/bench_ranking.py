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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accuracy.bench import open_bench, read_evaluation
from accuracy.judge import dense_model, judge_plan, log_probabilities
from accuracy.plans import OWN, Tables
from bench_memory import commit
from scipy.stats import spearmanr
from transformers.utils import logging

from mxq.artifacts import Allocation, SensitivityTable
from mxq.config import CalibrationOptions
from mxq.search.allocate import allocate
from mxq.workspace import library_versions

MOST_NOISE = 3.0
"""Standard deviation of the noise's logarithm for the last plan; the first one has none."""


def main() -> None:
    """Judge what the results file lacks, one plan at a time."""
    args = _arguments()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    evaluations = [read_evaluation(args.model, e, args.window, args.windows) for e in args.evaluate]
    options = CalibrationOptions(args.calibration, args.samples, args.seqlen, args.seed)
    bench = open_bench(args.model, options, evaluations)
    recipe = OWN["mxq"]
    table = Tables(bench).get("fisher", recipe.method)
    reference = log_probabilities(dense_model(bench), bench.evaluations)
    results = _open_results(args)
    for number in range(len(results["rows"]), args.plans):
        started = time.perf_counter()
        noise = MOST_NOISE * number / max(1, args.plans - 1)
        plan = draw_plan(table, args.bits, noise, number)
        judged = judge_plan(bench, plan, recipe.method, recipe.target, reference)
        row = {
            "noise": noise,
            "bits": plan.bits_per_weight,
            "predicted": plan.predicted_loss,
            "kl": judged["kl"],
            "seconds": round(time.perf_counter() - started, 1),
        }
        results["rows"].append(row)
        results["summary"] = summary(results["rows"])
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
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


def _open_results(args: argparse.Namespace) -> dict[str, Any]:
    path = Path(args.json)
    if path.is_file():
        return dict(json.loads(path.read_text()))
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "model": Path(args.model).name,
        "bits": args.bits,
        "seed": args.seed,
        "samples": args.samples,
        "seqlen": args.seqlen,
        "window": args.window,
        "windows": args.windows,
        "versions": library_versions(),
        "rows": [],
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluate", action="append", required=True, help="NAME=FILE, repeatable")
    parser.add_argument("--json", required=True, help="results file, gone on with")
    parser.add_argument("--bits", type=float, default=2.5)
    parser.add_argument("--plans", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=10, help="held-out windows of each domain")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


if __name__ == "__main__":
    main()
