"""The sensitivity table, from the losses of all layers."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from mxq.artifacts import BlockInfo, Provenance, SensitivityTable
from mxq.blocks import LinearBlock
from mxq.models.adapter import ModelAdapter
from mxq.models.sweep import Batches
from mxq.profiling.losses import BlockLosses, LayerLosses, MeasureSettings
from mxq.scheme import Scheme

UNROUTED_TOKENS = 0.5
"""An expert that no token reached is priced as if half a token had."""


def check_fit(blocks: Sequence[LinearBlock], settings: MeasureSettings) -> None:
    """Raise ValueError unless every block has a candidate, and every list of them a block."""
    projections = {block.projection for block in blocks}
    unknown = sorted(set(settings.offered) - projections)
    if unknown:
        raise ValueError(
            f"schemes are listed for the projection {unknown[0]!r}, which no block has; this model "
            f"has {', '.join(sorted(projections))}"
        )
    for block in blocks:
        if not settings.candidates(block):
            offered = settings.offered.get(block.projection, settings.schemes)
            menu = ", ".join(str(scheme) for scheme in offered)
            raise ValueError(
                f"{block.name} has {block.in_features} input features and none of {menu} has a "
                "group size that divides them; add a scheme with a smaller group or 'grow'"
            )


def unmeasured_table(adapter: ModelAdapter, settings: MeasureSettings) -> SensitivityTable:
    """The table before anything is measured: no loss for each candidate of a block."""
    blocks, schemes = adapter.blocks(), settings.schemes
    offered = [set(settings.candidates(block)) for block in blocks]
    return SensitivityTable(
        blocks=block_infos(adapter),
        schemes=schemes,
        loss=tuple(tuple(0.0 if s in may else math.inf for s in schemes) for may in offered),
        quantizer=tuple(("",) * len(schemes) for _ in blocks),
        metric=settings.metric_name,
        unit=settings.sensitivity.unit,
        calibration_tokens=0,
        rotated_layers=(),
        provenance=Provenance("", "", {}, {}),
    )


def make_table(
    adapter: ModelAdapter,
    batches: Batches,
    settings: MeasureSettings,
    layers: Mapping[int, LayerLosses],
    provenance: Provenance,
) -> SensitivityTable:
    """The table of a model; losses made monotone, experts without tokens priced.

    Raises:
        ValueError: If a block was never run.
    """
    found = {row.block: row for layer in sorted(layers) for row in layers[layer].blocks}
    rates = _rates_per_token(adapter, settings.schemes, found)
    rows, quantizers, infos = [], [], []
    for block in adapter.blocks():
        if block.name not in found:
            raise ValueError(
                f"the model runs without {block.name}, so nothing is known of its inputs; keep it "
                "in its type with --keep"
            )
        measured = found[block.name]
        row: Sequence[float] = measured.loss
        if measured.tokens == 0:
            row = [
                loss if math.isinf(loss) else UNROUTED_TOKENS * rates.get(_kind(block, s), 0.0)
                for s, loss in zip(settings.schemes, row, strict=True)
            ]
        rows.append(_monotone(block, settings.schemes, row))
        quantizers.append(measured.quantizer)
        infos.append(block_info(adapter, block, measured.tokens))
    return SensitivityTable(
        blocks=tuple(infos),
        schemes=settings.schemes,
        loss=tuple(rows),
        quantizer=tuple(quantizers),
        metric=settings.metric_name,
        unit=settings.sensitivity.unit,
        calibration_tokens=batches.all_tokens,
        rotated_layers=tuple(layer for layer in sorted(layers) if layers[layer].is_rotated),
        provenance=provenance,
    )


def _rates_per_token(
    adapter: ModelAdapter, schemes: Sequence[Scheme], found: Mapping[str, BlockLosses]
) -> dict[tuple[int, str, Scheme], float]:
    """Mean loss per routed token of a layer's experts, by projection and scheme."""
    totals: dict[tuple[int, str, Scheme], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, row in found.items():
        block = adapter.block(name)
        if block.expert is None or row.tokens == 0:
            continue
        for scheme, loss in zip(schemes, row.loss, strict=True):
            if math.isfinite(loss):
                total = totals[_kind(block, scheme)]
                total[0] += loss
                total[1] += row.tokens
    return {key: loss / tokens for key, (loss, tokens) in totals.items()}


def _kind(block: LinearBlock, scheme: Scheme) -> tuple[int, str, Scheme]:
    return block.layer, block.projection, scheme


def _monotone(
    block: LinearBlock, schemes: Sequence[Scheme], row: Sequence[float]
) -> tuple[float, ...]:
    """Each loss lowered to that of any scheme that stores no more and rounds inputs no less."""
    bits = [scheme.storage_bits(block.out_features, block.in_features) for scheme in schemes]
    return tuple(
        min(
            row[t]
            for t in range(len(schemes))
            if t == s or (bits[t] <= bits[s] and _reads_no_less(schemes[s], schemes[t]))
        )
        if math.isfinite(row[s])
        else math.inf
        for s in range(len(schemes))
    )


def _reads_no_less(scheme: Scheme, other: Scheme) -> bool:
    """Whether a scheme reads inputs at least as exactly as another one.

    Integers and floats of 8 bits are not comparable: one is finer near a token's peak, the other
    far below it.
    """
    if scheme.a_bits == 16:
        return True
    return scheme.kind == other.kind and other.a_bits <= scheme.a_bits


def block_infos(adapter: ModelAdapter) -> tuple[BlockInfo, ...]:
    """The blocks of a model that was not run, so without tokens."""
    return tuple(block_info(adapter, block, 0) for block in adapter.blocks())


def block_info(adapter: ModelAdapter, block: LinearBlock, tokens: int) -> BlockInfo:
    """The numbers of a block that an allocation needs."""
    return BlockInfo(
        name=block.name,
        layer=block.layer,
        expert=block.expert,
        projection=block.projection,
        out_features=block.out_features,
        in_features=block.in_features,
        tokens=tokens,
        site=adapter.site_of(block),
    )
