"""What the page is told: the table once, and the plan of each question, as plain JSON values.

Blocks and schemes are numbers on the page, places in the lists of ``table_facts``.
"""

from collections.abc import Mapping, Sequence
from math import ceil, floor, isfinite

import numpy as np

from mxq.artifacts import Allocation, BlockInfo
from mxq.config import GRANULARITIES, AllocateOptions
from mxq.engines import ENGINES
from mxq.explore.question import Setting, allocate_command
from mxq.explore.session import Explored, Session
from mxq.pinning import keep_wide

Fields = dict[str, object]

START_BITS = 4.0
"""Bits per weight that the page opens with where the work folder holds no plan."""


def table_facts(
    session: Session, setting: Setting, *, model: str, start_bits: float | None
) -> Fields:
    """All that does not change: model, blocks, schemes, uniform plans, range of the budget."""
    table = session.priced.table
    least, most = _range(session)
    return {
        "model": model,
        "work": str(setting.work),
        "metric": table.metric,
        "unit": table.unit,
        "weights": session.priced.weights,
        "calibrationTokens": table.calibration_tokens,
        "schemes": [str(scheme) for scheme in table.schemes],
        "blocks": _block_facts(table.blocks),
        "shapes": _shape_facts(session),
        "uniforms": [_uniform_facts(plan) for plan in session.uniforms],
        "bits": {
            "least": least,
            "most": most,
            "start": round(
                min(max(START_BITS if start_bits is None else start_bits, least), most), 2
            ),
        },
        "granularities": list(GRANULARITIES),
        "engines": _engine_facts(session),
        "device": setting.device,
        "tokens": setting.tokens,
        "latencySource": session.priced.latency_source,
    }


def plan_facts(
    session: Session, setting: Setting, options: AllocateOptions, explored: Explored
) -> Fields:
    """A solved question: scheme and loss of each block, sums, and how to have it again."""
    plan, table = explored.plan, session.priced.table
    place = {scheme: column for column, scheme in enumerate(table.schemes)}
    choice = [place[plan.schemes[block.name]] for block in table.blocks]
    return {
        "choice": choice,
        # Three digits, because a block's share is only looked at.
        "losses": [
            float(f"{row[column]:.3g}") for row, column in zip(table.loss, choice, strict=True)
        ],
        "asked": options.bits,
        "bits": plan.bits_per_weight,
        "bytes": plan.storage_bits / 8,
        "loss": plan.predicted_loss,
        "bound": plan.bound if isfinite(plan.bound) else None,
        "proven": plan.proven,
        "latencyUs": plan.predicted_latency_us,
        "groups": explored.groups,
        "seconds": explored.seconds,
        "uniform": None if explored.uniform is None else _uniform_facts(explored.uniform),
        "command": allocate_command(options, setting),
    }


def _range(session: Session) -> tuple[float, float]:
    """Least and most bits per weight of any plan, rounded inwards to hundredths."""
    priced = session.priced
    there = np.isfinite(np.array(keep_wide(priced.table, session.pins).loss))
    least = float(np.where(there, priced.storage, np.inf).min(axis=1).sum()) / priced.weights
    most = float(np.where(there, priced.storage, -np.inf).max(axis=1).sum()) / priced.weights
    return ceil(least * 100) / 100, max(floor(most * 100), ceil(least * 100)) / 100


def _engine_facts(session: Session) -> list[Fields]:
    """The engines, and of those whose rules no plan of the table keeps, why."""
    return [
        {"name": name, "refusal": session.refusal(AllocateOptions(bits=16, engine=name))}
        for name in ENGINES
    ]


def _block_facts(blocks: Sequence[BlockInfo]) -> Mapping[str, object]:
    shapes = _shapes(blocks)
    return {
        "name": [block.name for block in blocks],
        "layer": [block.layer for block in blocks],
        "expert": [block.expert for block in blocks],
        "projection": [_projection(block) for block in blocks],
        "tokens": [block.tokens for block in blocks],
        "shape": [shapes.index((block.out_features, block.in_features)) for block in blocks],
    }


def _shape_facts(session: Session) -> list[Fields]:
    """Weights and stored bits under each scheme, for blocks of each shape."""
    table = session.priced.table
    return [
        {
            "weights": rows * columns,
            "bits": [scheme.storage_bits(rows, columns) for scheme in table.schemes],
        }
        for rows, columns in _shapes(table.blocks)
    ]


def _shapes(blocks: Sequence[BlockInfo]) -> list[tuple[int, int]]:
    return sorted({(block.out_features, block.in_features) for block in blocks})


def _projection(block: BlockInfo) -> str:
    """Of an expert its projection, of a plain linear its path in the layer."""
    return block.projection if block.expert is not None else ".".join(block.name.split(".")[2:])


def _uniform_facts(plan: Allocation) -> Fields:
    return {
        "scheme": str(next(iter(plan.schemes.values()))),
        "bits": plan.bits_per_weight,
        "loss": plan.predicted_loss,
        "latencyUs": plan.predicted_latency_us,
    }
