"""Accuracy at equal bytes: mxq's default beside uniform plans and MxMoE's own mode.

Every method quantizes the same blocks of one model from the same calibration tokens and is judged
on the same held-out text by KL to the original, in nats per token. Bits count every stored bit of
the quantized linears. Checkpoints are written, loaded, and decoded to dense before evaluation.

    python benchmarks/bench_accuracy.py MODEL --calibration file:a=PATH,b=PATH \
        --evaluate a=PATH --evaluate b=PATH --json benchmarks/results/NAME.json
"""

import argparse
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from mxq.artifacts import Allocation, SensitivityTable
from mxq.blocks import write_block
from mxq.checkpoint.pack import pack
from mxq.config import CalibrationOptions, default_schemes
from mxq.models.adapter import ModelAdapter
from mxq.models.source import open_source
from mxq.models.sweep import Batches, make_batches
from mxq.numerics import unrotate
from mxq.profiling.draw import draw_calibration
from mxq.profiling.losses import MeasureSettings
from mxq.profiling.measure import measure
from mxq.profiling.sensitivity import SENSITIVITY
from mxq.quantizers import QUANTIZERS, Method
from mxq.scheme import Scheme, parse_schemes
from mxq.search.allocate import allocate, uniform
from mxq.workspace import library_versions, make_provenance

SIZES = (
    "w2a16_g128_asym",
    "w2a16_g64_asym=2.5",
    "w2a16_g32_asym",
    "w3a16_g128_asym",
    "w3a16_g64_asym=3.5",
    "w4a16_g128_asym",
)
"""Uniform schemes whose size is the budget, or ``scheme=bits`` for a budget of its own."""

MXMOE_SCHEMES = "w2a16_g128_asym,w3a16_g128_asym,w4a16_grow_asym,w4a16_g128_asym,w8a16_grow_asym"
"""The weight-only candidates of MxMoE's 2.25 and 3.25 bit rows that have a storage format here."""

METHODS = ("rtn", "gptq", "gptq-rotated", "mxmoe", "mxq")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Held-out windows [windows, window] of one domain."""

    domain: str
    windows: Tensor


@dataclass(frozen=True, slots=True)
class Bench:
    """One model with its blocks, calibration tokens and held-out text."""

    adapter: ModelAdapter
    batches: Batches
    evaluations: tuple[Evaluation, ...]
    seed: int


def main() -> None:
    """Run what the results file lacks, one row at a time."""
    args = _arguments()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    results = _load(args)
    reference: list[Tensor] = []
    for seed in args.seeds:
        todo = [row for row in _rows(args) if not _has(results, seed, *row)]
        if not todo:
            continue
        bench = _open(args, seed)
        tables: dict[str, SensitivityTable] = {}
        reference = reference or _log_probs(_dense(bench), bench.evaluations)
        for method, size in todo:
            started = time.perf_counter()
            plan, method_used, seconds = _plan(bench, tables, method, size)
            row = {"seed": seed, "method": method, "size": size}
            row |= _judge(bench, plan, method_used, reference)
            row |= {"seconds": round(time.perf_counter() - started, 1), "measure_s": seconds}
            results["rows"].append(row)
            Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
            print(f"{seed} {method:13s} {size:22s} KL {row['kl']:.5f} at {row['bits']:.4f} bits")


def _plan(
    bench: Bench, tables: dict[str, SensitivityTable], method: str, size: str
) -> tuple[Allocation, Method, float]:
    """The plan of a method at a size, the quantizer to pack it with, seconds of measuring."""
    scheme = Scheme.parse(size.partition("=")[0])
    gptq, rtn = Method("gptq", QUANTIZERS["gptq"]), Method("rtn", QUANTIZERS["rtn"])
    widths = {block.in_features for block in bench.adapter.blocks()}
    started = time.perf_counter()
    if method == "mxmoe":
        # MxMoE: rotated GPTQ, norm of the layer's output, a budget for each layer, gate = up.
        table = _table(bench, tables, "layer_out", parse_schemes(MXMOE_SCHEMES), gptq)
        seconds = time.perf_counter() - started
        bits = _budget(table, size)
        plan = allocate(table, bits=bits, objective="mxmoe", r=1.0, tie_gate_up=True)
        return plan, gptq, seconds
    table = _table(bench, tables, "fisher", default_schemes(widths), gptq)
    seconds = time.perf_counter() - started
    if method == "mxq":
        return allocate(table, bits=_budget(table, size)), gptq, seconds
    rotated = table.rotated_layers
    if method == "gptq-rotated":
        rotated = tuple(sorted({block.layer for block in table.blocks}))
    elif method in ("gptq", "rtn"):
        rotated = ()
    plan = replace(_uniform(table, scheme), rotated_layers=rotated)
    return plan, rtn if method == "rtn" else gptq, 0.0


def _table(
    bench: Bench,
    tables: dict[str, SensitivityTable],
    metric: str,
    schemes: tuple[Scheme, ...],
    method: Method,
) -> SensitivityTable:
    if metric not in tables:
        settings = MeasureSettings(
            schemes, SENSITIVITY[metric], metric, method, "on" if metric == "layer_out" else "auto"
        )
        tables[metric] = measure(
            bench.adapter,
            bench.batches,
            settings,
            make_provenance("", "", {}),
            generator=torch.Generator().manual_seed(bench.seed),
        )
    return tables[metric]


def _uniform(table: SensitivityTable, scheme: Scheme) -> Allocation:
    """The uniform plan; its loss is not predicted where the table lacks the scheme."""
    if scheme in table.schemes:
        return uniform(table, scheme)
    shapes = [(block.out_features, block.in_features) for block in table.blocks]
    return Allocation(
        schemes={block.name: scheme for block in table.blocks},
        predicted_loss=math.nan,
        bound=math.nan,
        proven=False,
        storage_bits=sum(scheme.storage_bits(*shape) for shape in shapes),
        weights=sum(n * k for n, k in shapes),
        asked_bits=0.0,
        unit=table.unit,
        description=f"uniform {scheme}",
    )


def _budget(table: SensitivityTable, size: str) -> float:
    """Bits per weight of a size: its own number, or that of its uniform scheme."""
    scheme, _, bits = size.partition("=")
    if bits:
        return float(bits)
    stored = sum(
        Scheme.parse(scheme).storage_bits(b.out_features, b.in_features) for b in table.blocks
    )
    return stored / sum(b.out_features * b.in_features for b in table.blocks)


def _judge(
    bench: Bench, plan: Allocation, method: Method, reference: Sequence[Tensor]
) -> dict[str, object]:
    """Pack, load, decode, and compare with the original on every domain."""
    folder = Path(tempfile.mkdtemp(prefix="mxq-bench-"))
    try:
        packed = pack(bench.adapter, bench.batches, plan, folder / "out", method=method)
        model = _decoded(bench, folder / "out")
    finally:
        shutil.rmtree(folder)
    domains = dict(_compare(model, bench.evaluations, reference))
    tokens = sum(int(d["tokens"]) for d in domains.values())

    def mean(key: str) -> float:
        return sum(d[key] * d["tokens"] for d in domains.values()) / tokens

    return {
        "bits": plan.bits_per_weight,
        "storage_bits": plan.storage_bits,
        "tensor_bytes": packed.tensor_bytes,
        "predicted": None if math.isnan(plan.predicted_loss) else plan.predicted_loss,
        "unit": plan.unit,
        "kl": mean("kl"),
        "excess_nats": mean("excess_nats"),
        "top1_agreement": mean("top1_agreement"),
        "heldout_tokens": tokens,
        "domains": domains,
    }


def _dense(bench: Bench) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        bench.adapter.source.folder, dtype=torch.float32
    )
    return model.eval()


def _decoded(bench: Bench, folder: Path) -> PreTrainedModel:
    """The original with every block replaced by what the written checkpoint decodes to."""
    packed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = _dense(bench)
    for block in bench.adapter.blocks():
        linear = packed.get_submodule(block.module)
        w_NK = linear.decode(torch.float32)
        w_NK = unrotate(w_NK) if linear.rotated else w_NK
        write_block(model.get_parameter(block.tensor), block, w_NK)
    return model


def _log_probs(model: PreTrainedModel, evaluations: Sequence[Evaluation]) -> list[Tensor]:
    with torch.no_grad():
        return [
            model(input_ids=window[None], use_cache=False).logits[0].float().log_softmax(-1)
            for evaluation in evaluations
            for window in evaluation.windows
        ]


def _compare(
    model: PreTrainedModel, evaluations: Sequence[Evaluation], reference: Sequence[Tensor]
) -> Iterator[tuple[str, dict[str, float]]]:
    """``domain -> tokens, kl, excess_nats, top1_agreement``."""
    originals = iter(reference)
    for evaluation in evaluations:
        sums = torch.zeros(3, dtype=torch.float64)
        for window in evaluation.windows:
            p = next(originals)[:-1]
            with torch.no_grad():
                logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
            q, labels = logits.float().log_softmax(-1), window[1:, None]
            kl = (p.exp() * (p - q)).sum(-1)
            excess = (p - q).gather(1, labels).squeeze(1)
            same = p.argmax(-1) == q.argmax(-1)
            sums += torch.stack([part.double().sum() for part in (kl, excess, same)])
        tokens = evaluation.windows[:, 1:].numel()
        kl_mean, excess_mean, agreement = (sums / tokens).tolist()
        yield (
            evaluation.domain,
            {
                "tokens": tokens,
                "kl": kl_mean,
                "excess_nats": excess_mean,
                "top1_agreement": agreement,
            },
        )


def _open(args: argparse.Namespace, seed: int) -> Bench:
    adapter = ModelAdapter(open_source(args.model))
    options = CalibrationOptions(args.calibration, args.samples, args.seqlen, seed)
    base, spare, heldout = draw_calibration(adapter, options)
    fit = base.input_ids if spare is None else torch.cat([base.input_ids, spare.input_ids])
    batches = make_batches(fit, heldout.input_ids)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    evaluations = tuple(
        _evaluation(entry, tokenizer, args.window, args.windows) for entry in args.evaluate
    )
    return Bench(adapter, batches, evaluations, seed)


def _evaluation(
    entry: str, tokenizer: Callable[..., Mapping[str, object]], window: int, count: int
) -> Evaluation:
    domain, _, path = entry.partition("=")
    ids = torch.tensor(tokenizer(Path(path).read_text(), verbose=False)["input_ids"])
    step = max(window, (len(ids) - window) // max(1, count - 1))
    starts = range(0, min(len(ids) - window, step * (count - 1)) + 1, step)
    return Evaluation(domain, torch.stack([ids[start : start + window] for start in starts]))


def _rows(args: argparse.Namespace) -> list[tuple[str, str]]:
    return [(method, size) for size in args.sizes for method in args.methods]


def _has(results: Mapping[str, object], seed: int, method: str, size: str) -> bool:
    rows = results["rows"]
    assert isinstance(rows, list)
    return any((r["seed"], r["method"], r["size"]) == (seed, method, size) for r in rows)


def _load(args: argparse.Namespace) -> dict[str, object]:
    path = Path(args.json)
    if path.is_file():
        return dict(json.loads(path.read_text()))
    facts = {
        "date": datetime.now(UTC).date().isoformat(),
        "model": Path(args.model).name,
        "samples": args.samples,
        "seqlen": args.seqlen,
        "window": args.window,
        "mxmoe_schemes": MXMOE_SCHEMES,
        "versions": library_versions(),
    }
    return {**facts, "rows": []}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluate", action="append", required=True, help="NAME=FILE, repeatable")
    parser.add_argument("--json", required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=10, help="held-out windows of each domain")
    parser.add_argument("--seeds", type=_numbers, default=(0, 1, 2))
    parser.add_argument("--sizes", type=_words, default=SIZES)
    parser.add_argument("--methods", type=_words, default=METHODS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    main()
