"""Time what `mxq explore` does for each move of its slider, at the size of Qwen1.5-MoE-A2.7B.

24 layers of 60 experts, a shared expert and attention: 4,488 blocks, with the default candidates.
Losses and token counts are heavy-tailed, drawn by a fixed seed. A move is the whole way from a
query to the bytes of its answer; "solver" is the part that the page shows, and "processor" the
processor's time of a move, which other work on the machine hardly changes.

    python benchmarks/bench_explore.py --json benchmarks/results/explore-2cores.json
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mxq.artifacts import BlockInfo, Provenance, SensitivityTable
from mxq.config import GRANULARITIES, default_schemes
from mxq.engines import ENGINES
from mxq.explore.question import Setting, parse_question
from mxq.explore.run import solved, within_rules
from mxq.explore.server import json_resource
from mxq.explore.session import SOLVER_SECONDS, Session
from mxq.search import load_device
from mxq.search.cost import CostModel

LAYERS, EXPERTS, HIDDEN, EXPERT_WIDTH, SHARED_WIDTH = 24, 60, 2048, 1408, 5632
CALIBRATION_TOKENS = 65_536
EXPERTS_OF_A_TOKEN = 4


def synthetic_table(seed: int = 2026) -> SensitivityTable:
    """Losses that fall by about four for each bit, times heavy-tailed factors."""
    rng = np.random.default_rng(seed)
    blocks = tuple(_blocks(rng))
    schemes = default_schemes({HIDDEN, EXPERT_WIDTH, SHARED_WIDTH})
    layer_B = np.array([block.layer for block in blocks])
    share_B = np.array([block.tokens for block in blocks]) / CALIBRATION_TOKENS
    scale_B = np.exp(rng.normal(0, 1, LAYERS))[layer_B] * share_B * rng.lognormal(0, 1, len(blocks))
    steps_S = np.array([4.0**-s.w_bits * (1.6 if s.group_size is None else 1) for s in schemes])
    noise_BS = rng.lognormal(0, 0.2, (len(blocks), len(schemes)))
    loss_BS = 1e-3 * scale_B[:, None] * steps_S * noise_BS
    return SensitivityTable(
        blocks=blocks,
        schemes=schemes,
        loss=tuple(map(tuple, loss_BS.tolist())),
        quantizer=tuple(("gptq",) * len(schemes) for _ in blocks),
        metric="fisher",
        unit="nats per token",
        calibration_tokens=CALIBRATION_TOKENS,
        rotated_layers=(),
        provenance=Provenance("synthetic", "synthetic"),
    )


def _blocks(rng: np.random.Generator) -> Iterator[BlockInfo]:
    routed = CALIBRATION_TOKENS * EXPERTS_OF_A_TOKEN
    for layer in range(LAYERS):
        path = f"layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield _linear(layer, f"{path}.self_attn.{name}", HIDDEN, HIDDEN)
        weight_E = rng.pareto(1.1, EXPERTS) + 0.02
        tokens_E = np.minimum(routed * weight_E / weight_E.sum(), CALIBRATION_TOKENS).astype(int)
        for expert, tokens in enumerate(tokens_E.tolist()):
            for name, shape in _projections(EXPERT_WIDTH):
                place = f"{path}.experts.{expert}.{name}"
                yield BlockInfo(place, layer, expert, name, *shape, tokens, f"{path}.experts")
        for name, shape in _projections(SHARED_WIDTH):
            yield _linear(layer, f"{path}.mlp.shared_expert.{name}_proj", *shape)


def _projections(width: int) -> tuple[tuple[str, tuple[int, int]], ...]:
    return ("gate", (width, HIDDEN)), ("up", (width, HIDDEN)), ("down", (HIDDEN, width))


def _linear(layer: int, name: str, outputs: int, inputs: int) -> BlockInfo:
    projection = name.rpartition(".")[2]
    return BlockInfo(name, layer, None, projection, outputs, inputs, CALIBRATION_TOKENS, name)


def time_moves(
    session: Session, setting: Setting, rules: str, bits: Sequence[float]
) -> dict[str, Any]:
    """Milliseconds of the moves to each budget under these rules; the first one prepares them."""
    moves, busy, solver, gaps, unproven, impossible = [], [], [], [], 0, 0
    for budget in bits:
        start, start_busy = time.perf_counter(), time.process_time()
        options = parse_question(f"bits={budget:g}{rules}", setting)
        plan: Any = solved(session, setting, options)
        json_resource(plan)
        moves.append(1000 * (time.perf_counter() - start))
        busy.append(1000 * (time.process_time() - start_busy))
        if "impossible" in plan:
            impossible += 1
            continue
        solver.append(1000 * plan["seconds"])
        gaps.append((plan["loss"] - plan["bound"]) / plan["loss"])
        unproven += not plan["proven"]
    return {
        "rules": rules.removeprefix("&") or "none",
        "budgets": len(bits),
        "impossible": impossible,
        "unproven": unproven,
        "worst_gap": max(gaps, default=None),
        "first_move_ms": round(moves[0], 1),
        "median_move_ms": round(median(moves), 1),
        "worst_move_ms": round(max(moves), 1),
        "median_processor_ms": round(median(busy), 1),
        "worst_processor_ms": round(max(busy), 1),
        "median_solver_ms": round(median(solver), 1) if solver else None,
        "worst_solver_ms": round(max(solver), 1) if solver else None,
    }


def all_rules() -> list[str]:
    """Each granularity, then ties, engines, and floors under the finest one and the coarsest."""
    rules = [f"&granularity={name}" for name in GRANULARITIES]
    rules += ["&tie-gate-up=1", *(f"&engine={name}" for name in ENGINES)]
    rules += ["&floor-bits=2.2", "&floor-bits=2.2&granularity=layer"]
    return rules


def run(step: float) -> dict[str, Any]:
    """All rows, printed as they come."""
    table = synthetic_table()
    about = _about(table)
    start = time.perf_counter()
    session = Session(table, restrict=within_rules)
    opened = time.perf_counter() - start
    bits = [round(2.2 + step * index, 4) for index in range(round(4.3 / step) + 1)]
    free = Setting(Path("work"))
    rows = [_shown(time_moves(session, free, rules, bits)) for rules in all_rules()]
    timed = Session(table, cost_model=CostModel(load_device("h200")), tokens=64)
    setting = Setting(Path("work"), "h200", 64)
    rows.append(_shown(time_moves(timed, setting, f"&max-latency={_latency_ms(timed):.3f}", bits)))
    return {**about, "open_session_ms": round(1000 * opened, 1), "rows": rows}


def _latency_ms(session: Session) -> float:
    """A limit that binds: between the fastest plan and the slowest one."""
    latency = session.priced.latency
    assert latency is not None
    return float(0.7 * latency.min(axis=1).sum() + 0.3 * latency.max(axis=1).sum()) / 1000


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return row


def _about(table: SensitivityTable) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "commit": _commit(),
        "blocks": len(table.blocks),
        "schemes": [str(scheme) for scheme in table.schemes],
        "cpus": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 1),
        "solver_seconds": SOLVER_SECONDS,
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
    }


def _commit() -> str:
    command = ["git", "describe", "--always", "--abbrev=10", "--dirty", "--exclude", "*"]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    ).stdout.strip()


def main() -> None:
    """Run, print, and write the JSON file if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--step", type=float, default=0.1, help="bits between budgets")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = run(arguments.step)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
