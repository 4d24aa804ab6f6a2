"""The second moments of gradients in a run: kept when it measures, given when it packs.

Only the leading process reads and writes the work folder; a layer's moments pass to the others when
they pack it.
"""

from collections.abc import Callable

import torch

from mxq.artifacts import Provenance
from mxq.compute import describe
from mxq.curvature import Curvature, CurvatureFiles, KeepCurvature, joined
from mxq.models.adapter import ModelAdapter
from mxq.profiling.measure import measure_curvature
from mxq.progress import Report, stage
from mxq.quantizers import Method
from mxq.workspace import CalibrationTokens, Workspace, make_provenance


def curvature_files(
    work: Workspace, adapter: ModelAdapter, tokens: CalibrationTokens, method: Method
) -> CurvatureFiles | None:
    """Where the moments are; None for a quantizer that makes no use of them."""
    if not method.reads_gradients:
        return None

    def make() -> Provenance:
        settings = {
            "scope": adapter.scope,
            "keep": list(adapter.keep),
            "compute": describe(adapter.source.device),
            "shrinkage": "ledoit-wolf",
        }
        return make_provenance(adapter.source.digest(), tokens.digest, settings)

    return CurvatureFiles(work.folder / "curvature", work.team.from_lead(Provenance, make))


def keeper(work: Workspace, files: CurvatureFiles | None) -> KeepCurvature | None:
    """What keeps the moments of a layer while losses are measured; None where nothing is kept."""
    return files.save if files is not None and work.team.leads else None


def complete(
    work: Workspace,
    adapter: ModelAdapter,
    tokens: CalibrationTokens,
    files: CurvatureFiles | None,
    report: Report | None,
) -> None:
    """Make the moments anew if they are not all there, though the losses are."""
    layers = range(len(adapter.source.layers))
    if files is None or not work.team.leads or all(files.has(layer) for layer in layers):
        return
    measure_curvature(
        adapter,
        tokens.batches(adapter.source.device, work.store),
        files.save,
        generator=torch.Generator().manual_seed(0),
        progress=stage(report, "measure gradients"),
    )


def giver(work: Workspace, files: CurvatureFiles | None) -> Callable[[int], Curvature] | None:
    """What gives the moments of a layer to every process when all of them ask."""
    if files is None:
        return None

    def give(layer: int) -> Curvature:
        stored = files.load(layer) if work.team.leads else {}
        return joined(work.team.exchange_tensors("", stored)[0][1])

    return give
