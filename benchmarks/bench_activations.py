"""Schemes that round inputs as well: uniform plans, MxMoE's W5A5 mix, mixes over w3a8 to fp8.

Each plan is packed, loaded and judged as the loaded checkpoint runs, its inputs rounded token by
token, by KL to the original and by excess loss, ln(PPL / PPL of the original). Budgets count every
stored bit of the weights; the bits of inputs are what falls out, a mean over multiply-adds. The
file is written after each row, and the same command goes on where it stopped.

    python benchmarks/bench_activations.py MODEL --calibration file:a=PATH,b=PATH \
        --evaluate a=PATH --evaluate b=PATH --json benchmarks/results/activations-NAME.json
"""

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from accuracy.bench import Bench, count_schemes, open_bench, read_evaluation, stored_bits
from accuracy.judge import Packing, answers, dense_model, judge_inputs
from accuracy.plans import measure_table, method_of, uniform_plan
from accuracy.runs import make_parser, open_results, save_results
from bench_memory import commit
from transformers.utils import logging

from mxq.artifacts import Allocation, BlockInfo, SensitivityTable
from mxq.config import EFFORTS, CalibrationOptions
from mxq.latency import load_pricing
from mxq.quantizers import Method
from mxq.scheme import Scheme, parse_schemes
from mxq.search.allocate import allocate

W5A5 = "w4a4_grow_sym,w4a4_g128_sym,w8a8_grow_sym"
"""MxMoE's candidates of its W5A5 rows. Here an input always has one scale for each token; MxMoE's
w4a4_g128 has one for each 128 inputs as well."""

BYTES = "w3a8_g128_sym,w4a8_g128_sym,w8a8_grow_sym,fp8"
"""Schemes whose inputs have 8 bits."""

DEVICE, TOKENS = "rtx4090", 8192
"""What MxMoE's W5A5 rows are optimised for, with r = 0.75."""

SCHEMES = (
    "w4a4_grow_sym",
    "w4a4_g128_sym",
    "w4a8_g128_sym",
    "w8a8_grow_sym",
    "fp8",
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a row is made; ``r`` is that of MxMoE's objective, None for mxq's global program."""

    menu: str
    bits: float | None = None
    r: float | None = None
    rotation: str = "auto"
    quantizer: str = "gptq"
    target: str = "local"

    @property
    def method(self) -> Method:
        """The quantizer to measure and to pack with."""
        return method_of(self.quantizer)

    @property
    def metric(self) -> str:
        """What losses are measured by."""
        return "fisher" if self.r is None else "layer_out"


DEFAULT = dict(zip(("quantizer", "target"), EFFORTS["balanced"], strict=True))
"""What mxq does when nothing is said."""

RECIPES: Mapping[str, Recipe] = {
    **{
        f"{scheme}{', rotated' if rotation == 'on' else ''}": Recipe(scheme, rotation=rotation)
        for scheme in SCHEMES
        for rotation in ("off", "on")
    },
    "w4a4_grow_sym, rotated, refined": Recipe("w4a4_grow_sym", rotation="on", **DEFAULT),
    "mxmoe at 5": Recipe(W5A5, 5, 0.75, "on"),
    "mxmoe at 5, r = 1": Recipe(W5A5, 5, 1.0, "on"),
    "mxq at 5": Recipe(W5A5, 5, **DEFAULT),
    "mxq at 5, 8-bit inputs": Recipe(BYTES, 5, **DEFAULT),
    "mxq at 4.25, 8-bit inputs": Recipe(BYTES, 4.25, **DEFAULT),
    "mxq at 3.5, 8-bit inputs": Recipe(BYTES, 3.5, **DEFAULT),
}


@dataclass(slots=True)
class Tables:
    """The tables of one bench, each measured when it is first asked for."""

    bench: Bench
    found: dict[tuple[str, str, str], SensitivityTable] = field(default_factory=dict)

    def get(self, recipe: Recipe) -> SensitivityTable:
        """The table that a recipe's plan is solved on."""
        key = recipe.menu, recipe.metric, recipe.quantizer
        if key not in self.found:
            schemes = parse_schemes(recipe.menu)
            self.found[key] = measure_table(
                self.bench, recipe.metric, recipe.method, schemes, recipe.rotation
            )
        return self.found[key]


def main() -> None:
    """Judge what the results file lacks, one row at a time."""
    args = _arguments()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    told = {"seed": args.seed, "device": DEVICE, "tokens": TOKENS, "w5a5": W5A5, "bytes": BYTES}
    results = open_results(args, told, {"rows": []})
    evaluations = [read_evaluation(args.model, e, args.window, args.windows) for e in args.evaluate]
    options = CalibrationOptions(args.calibration, args.samples, args.seqlen, args.seed)
    bench = open_bench(args.model, options, evaluations)
    tables = Tables(bench)
    reference = answers(dense_model(bench), bench.evaluations)
    code = commit()
    known = {row["row"] for row in results["rows"]}
    for name in (name for name in args.rows if name not in known):
        started = time.perf_counter()
        recipe = RECIPES[name]
        plan, bits = make_plan(tables, recipe)
        row = {
            "row": name,
            "commit": code,
            **stored_bits(bench.blocks, plan.schemes),
            "input_bits": bits,
            "schemes": count_schemes(plan.schemes),
            "rotated_layers": list(plan.rotated_layers),
            "quantizer": recipe.quantizer,
            "target": recipe.target,
            "predicted": None if math.isnan(plan.predicted_loss) else plan.predicted_loss,
            "unit": plan.unit,
            **judge_inputs(bench, plan, Packing(recipe.method, recipe.target), reference),
            "seconds": round(time.perf_counter() - started, 1),
        }
        results["rows"].append(row)
        results["rows"].sort(key=lambda row: list(RECIPES).index(row["row"]))
        save_results(args.json, results)
        print(f"{name:34s} {row['bits']:.3f} / {bits:.2f} bits, KL {row['kl']:.5f}", flush=True)


def make_plan(tables: Tables, recipe: Recipe) -> tuple[Allocation, float]:
    """The plan of a recipe, and the mean bits of its inputs."""
    if recipe.bits is None:
        scheme, blocks = Scheme.parse(recipe.menu), tables.bench.blocks
        layers = sorted({block.layer for block in blocks}) if recipe.rotation == "on" else ()
        plan = uniform_plan(blocks, scheme, "nats per token")
        return replace(plan, rotated_layers=tuple(layers)), float(scheme.a_bits)
    table = tables.get(recipe)
    if recipe.r is None:
        plan = allocate(table, bits=recipe.bits)
    else:
        plan = allocate(
            table,
            bits=recipe.bits,
            objective="mxmoe",
            r=recipe.r,
            tie_gate_up=True,
            cost_model=load_pricing(DEVICE).cost,
            tokens=TOKENS,
        )
    return plan, input_bits(table.blocks, plan.schemes)


def input_bits(blocks: Sequence[BlockInfo], schemes: Mapping[str, Scheme]) -> float:
    """Mean bits of inputs over the multiply-adds of the calibration tokens."""
    products = [block.tokens * block.out_features * block.in_features for block in blocks]
    bits = [schemes[block.name].a_bits for block in blocks]
    return sum(n * b for n, b in zip(products, bits, strict=True)) / sum(products)


def _arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    return parser.parse_args()


if __name__ == "__main__":
    main()
