"""Accuracy at equal bytes: mxq beside uniform plans, MxMoE's own mode, and peers.

Every method quantizes the same blocks of one model from the same calibration tokens and is judged
on the same held-out text by KL to the original, in nats per token. Bits count every stored bit of
the quantized linears. Checkpoints of mxq are written, loaded, and decoded to dense before
evaluation; peers run in environments of their own (benchmarks/peers/make_environments.sh FOLDER)
and hand over the dequantized weights. The file is written after each row, and the same command
goes on where it stopped.

    python benchmarks/bench_accuracy.py MODEL --calibration file:a=PATH,b=PATH \
        --evaluate a=PATH --evaluate b=PATH --peers FOLDER --json benchmarks/results/NAME.json
"""

import argparse
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accuracy.bench import Bench, count_schemes, open_bench, read_evaluation, stored_bits
from accuracy.judge import Answer, Packing, answers, dense_model, judge_plan
from accuracy.peers import PEERS, PeerError, Setting, judge_peer
from accuracy.plans import MXMOE_SCHEMES, OWN, Tables, make_plan
from accuracy.runs import make_parser, open_results, save_results
from bench_memory import commit
from transformers.utils import logging

from mxq.config import CalibrationOptions

SIZES = ("w2a16_g128_asym", "w2a16_g64_asym=2.5", "w3a16_g128_asym", "w4a16_g128_asym")
"""Uniform schemes whose size is the budget, or ``scheme=bits`` for a budget of its own."""

METHODS = (*OWN, *PEERS)


@dataclass(frozen=True, slots=True)
class Run:
    """A seed's bench, its tables, the settings of peers, and what the original answers.

    ``commit`` is that of the code as it was when the run started.
    """

    commit: str
    bench: Bench
    tables: Tables
    setting: Setting
    reference: list[Answer]


def main() -> None:
    """Run what the results file lacks, one row at a time."""
    args = _arguments()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    settings = {"mxmoe_schemes": MXMOE_SCHEMES}
    results = open_results(args, settings, {"rows": [], "skipped": []})
    for seed in args.seeds:
        todo = [row for row in _rows(args) if not _has(results, seed, *row)]
        if todo:
            run = _open_run(args, seed)
            for method, size in todo:
                _add(results, _row(run, method, size), args.json)


def _row(run: Run, method: str, size: str) -> dict[str, Any]:
    """One row; with ``skipped`` and the reason if a peer gave none."""
    row = {"seed": run.bench.seed, "method": method, "size": size, "commit": run.commit}
    started = time.perf_counter()
    try:
        found = _own(run, method, size) if method in OWN else _peer(run, method, size)
    except PeerError as error:
        return {**row, "skipped": str(error)}
    return {**row, **found, "seconds": round(time.perf_counter() - started, 1)}


def _own(run: Run, method: str, size: str) -> dict[str, Any]:
    """A row of mxq."""
    recipe = OWN[method]
    plan, measure_s = make_plan(run.tables, recipe, size)
    packing = Packing(recipe.method, recipe.target, run.tables.curvature(recipe))
    is_predicted = recipe.quantizer != "rtn" and not math.isnan(plan.predicted_loss)
    return {
        **stored_bits(run.bench.blocks, plan.schemes),
        "storage_bits": plan.storage_bits,
        "schemes": count_schemes(plan.schemes),
        "rotated_layers": list(plan.rotated_layers),
        "quantizer": recipe.quantizer,
        "target": recipe.target,
        "predicted": plan.predicted_loss if is_predicted else None,
        "unit": plan.unit,
        "measure_s": measure_s,
        **judge_plan(run.bench, plan, packing, run.reference),
    }


def _peer(run: Run, method: str, size: str) -> dict[str, Any]:
    """A row of a peer."""
    peer = PEERS[method]
    plan = make_plan(run.tables, OWN["mxq"], size)[0] if peer.widths == "mxq" else None
    return judge_peer(run.bench, peer, size, plan, run.setting, run.reference)


def _open_run(args: argparse.Namespace, seed: int) -> Run:
    evaluations = [
        read_evaluation(args.model, entry, args.window, args.windows) for entry in args.evaluate
    ]
    options = CalibrationOptions(args.calibration, args.samples, args.seqlen, seed)
    bench = open_bench(args.model, options, evaluations)
    setting = Setting(args.peers, args.threads, {"autoround": {"iters": args.autoround_iters}})
    reference = answers(dense_model(bench), bench.evaluations)
    return Run(commit(), bench, Tables(bench), setting, reference)


def _rows(args: argparse.Namespace) -> list[tuple[str, str]]:
    return [(method, size) for size in args.sizes for method in args.methods]


def _has(results: Mapping[str, Any], seed: int, method: str, size: str) -> bool:
    """Whether a row is there; one that was skipped is tried again."""
    return any(_key(row) == (seed, method, size) for row in results["rows"])


def _key(row: Mapping[str, Any]) -> tuple[int, str, str]:
    return row["seed"], row["method"], row["size"]


def _add(results: dict[str, Any], row: dict[str, Any], path: Path) -> None:
    """Keep a row, or the reason for none, and write the file."""
    results["skipped"] = [old for old in results["skipped"] if _key(old) != _key(row)]
    results["skipped" if "skipped" in row else "rows"].append(row)
    results["rows"].sort(key=_place)
    save_results(path, results)
    told = f"{row['seed']} {row['method']:22s} {row['size']:22s}"
    if "skipped" in row:
        print(f"{told} skipped: {row['skipped'][-300:]}", flush=True)
    else:
        print(
            f"{told} KL {row['kl']:.5f} at {row['bits']:.4f} bits, {row['seconds']:.0f} s",
            flush=True,
        )


def _place(row: Mapping[str, Any]) -> tuple[int, float, int]:
    """Rows lie by seed, budget and method, whenever they were made."""
    sizes, methods = list(SIZES), list(METHODS)
    size = sizes.index(row["size"]) if row["size"] in sizes else len(sizes)
    return row["seed"], size, methods.index(row["method"])


def _arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--peers", type=Path, help="folder of the peers' environments")
    parser.add_argument("--seeds", type=_numbers, default=(0, 1, 2))
    parser.add_argument("--sizes", type=_words, default=SIZES)
    parser.add_argument("--methods", type=_words, default=METHODS, help=", ".join(METHODS))
    parser.add_argument("--autoround-iters", type=int, default=200, help="its own default is 200")
    args = parser.parse_args()
    if unknown := sorted(set(args.methods) - set(METHODS)):
        parser.error(f"--methods {', '.join(unknown)}: unknown; choose of {', '.join(METHODS)}")
    return args


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    main()
