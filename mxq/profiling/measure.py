"""Measure: a sweep over the layers, the losses of each kept as soon as they are known.

Layers whose losses are known already are passed without fitting anything. Several processes take
the layers in turn: each sweeps over all of them, and fits its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from mxq.artifacts import Provenance, SensitivityTable
from mxq.curvature import KeepCurvature
from mxq.distributed import Team
from mxq.models.adapter import ModelAdapter
from mxq.models.lockstep import LayerCall
from mxq.models.probes import SiteInputs
from mxq.models.sweep import Batches, OnProgress, sweep_backward, sweep_forward
from mxq.profiling.gradients import curvature_of
from mxq.profiling.losses import LayerLosses, LayerVisit, MeasureSettings, measure_layer
from mxq.profiling.table import check_fit, make_table
from mxq.records import Records


@dataclass(frozen=True, slots=True)
class Sharing:
    """Who measures, and where finished layers are kept; without ``records`` they are not."""

    team: Team = field(default_factory=Team.alone)
    records: Records[LayerLosses] | None = None


@dataclass(frozen=True, slots=True)
class _Layers:
    """Losses of several layers, as they pass between processes."""

    layers: tuple[LayerLosses, ...]


def measure(  # noqa: PLR0913  (who measures, and who watches, changes no loss)
    adapter: ModelAdapter,
    batches: Batches,
    settings: MeasureSettings,
    provenance: Provenance,
    *,
    generator: torch.Generator,
    keep: KeepCurvature | None = None,
    progress: OnProgress | None = None,
    sharing: Sharing | None = None,
) -> SensitivityTable:
    """The sensitivity table of a model.

    Each layer is read once for a forward-only metric, twice for one with gradients. Losses are
    made monotone: a scheme that stores more, with inputs at least as exact, never costs more.
    ``keep``, only for a metric with gradients, is given what is found of every layer's.

    Raises:
        ValueError: If a weight or activation is not finite (names the block), or no scheme fits
            a block.
    """
    check_fit(adapter.blocks(), settings)
    sharing = sharing or Sharing()
    done = _known(sharing)
    backwards = settings.sensitivity.needs_gradients
    order = range(len(adapter.source.layers))
    turn = [layer for layer in (reversed(order) if backwards else order) if layer not in done]
    fresh: list[LayerLosses] = []

    def on_sites(layer: int, sites: dict[str, SiteInputs], calls: list[LayerCall]) -> None:
        if keep is not None:
            keep(layer, curvature_of(sites, adapter.source.device))
        if layer in done:
            return
        place = turn.index(layer)
        if sharing.team.takes(place):
            visit = LayerVisit(layer, sites, calls)
            fresh.append(measure_layer(adapter, batches, settings, visit, provenance))
        if place % sharing.team.size == sharing.team.size - 1 or layer == turn[-1]:
            done.update(_exchange(sharing, fresh))
            fresh.clear()

    if turn and backwards:
        sweep_backward(adapter, batches, on_sites, generator=generator, progress=progress)
    elif turn:
        sweep_forward(adapter, batches, on_sites, progress)
    return make_table(adapter, batches, settings, done, provenance)


def measure_curvature(
    adapter: ModelAdapter,
    batches: Batches,
    keep: KeepCurvature,
    *,
    generator: torch.Generator,
    progress: OnProgress | None = None,
) -> None:
    """Only the second moments of every layer's gradients, where its losses are known already."""

    def on_sites(layer: int, sites: dict[str, SiteInputs], calls: list[LayerCall]) -> None:
        keep(layer, curvature_of(sites, adapter.source.device))

    sweep_backward(adapter, batches, on_sites, generator=generator, progress=progress)


def _known(sharing: Sharing) -> dict[int, LayerLosses]:
    """The layers that an earlier run has finished, known to every process."""

    def load() -> _Layers:
        found = {} if sharing.records is None else sharing.records.load()
        return _Layers(tuple(found.values()))

    return {found.layer: found for found in sharing.team.from_lead(_Layers, load).layers}


def _exchange(sharing: Sharing, fresh: list[LayerLosses]) -> Mapping[int, LayerLosses]:
    """The layers that all processes have just finished; kept on disk by the one that leads."""
    found = {
        finished.layer: finished
        for part in sharing.team.gather(_Layers, _Layers(tuple(fresh)))
        for finished in part.layers
    }
    if sharing.records is not None and sharing.team.leads:
        for layer, finished in sorted(found.items()):
            sharing.records.save(f"layer-{layer:05d}", finished)
    return found
