"""What each layer of a finished checkpoint costs by itself, kept in the work folder."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from mxq.artifacts import Allocation, MeasuredLayers
from mxq.checkpoint.pack import plan_digest
from mxq.compute import describe
from mxq.heldout import measure_layers
from mxq.pipeline import open_adapter
from mxq.progress import Report, stage
from mxq.publish import PLAN, find_record
from mxq.storage import load_artifact
from mxq.workspace import Workspace, make_provenance

LAYER_TOKENS = 2048
"""Held-out tokens for the loss of single layers: as many passes are made as there are layers."""


def run_measure_layers(
    work: Workspace,
    folder: Path,
    *,
    tokens: int = LAYER_TOKENS,
    report: Report | None = None,
) -> MeasuredLayers:
    """The measured loss of each layer of the checkpoint in ``folder``, that of its plan.

    ``tokens`` bounds the held-out tokens, in whole samples and at least one.

    Raises:
        ValueError: If the model or the checkpoint is not that of the work folder.
    """
    settings = work.settings()
    adapter = open_adapter(settings.model, work.device)
    if adapter.source.digest() != settings.model_digest:
        raise ValueError(
            f"{settings.model.model} is not the model that {work.folder} was measured on; give "
            "the folder of the original model back, or leave --measure-layers out"
        )
    record = find_record(folder)
    if record is None or record.provenance.model_digest != settings.model_digest:
        raise ValueError(
            f"{folder} holds no checkpoint of {settings.model.model}, the model of {work.folder}; "
            "give its own work folder with --work"
        )
    allocation = load_artifact(folder / PLAN, Allocation)
    calibration = work.tokens()
    batches = _few(calibration.batches(work.device).heldout, tokens)
    plan = plan_digest(allocation)
    made_from = {
        "plan": plan,
        "tokens": tokens,
        "compute": describe(adapter.source.device),
    }
    provenance = make_provenance(settings.model_digest, calibration.digest, made_from)
    cached = work.cached("layer_losses", MeasuredLayers, provenance)
    if cached is not None:
        return cached
    with work.locked():
        tell = stage(report, "measure layers")
        kl = measure_layers(adapter, batches, folder, tell, store=work.store)
        counted = sum(batch[:, 1:].numel() for batch in batches)
        found = MeasuredLayers(counted, kl, plan, provenance)
        work.save("layer_losses", found)
    return found


def _few(batches: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """The first samples with no more than that many tokens, at least one sample."""
    found: list[Tensor] = []
    for batch in batches:
        left = tokens - sum(taken.numel() for taken in found)
        rows = left // batch.shape[1] if found else max(1, left // batch.shape[1])
        if rows < 1:
            break
        found.append(batch[:rows])
    return found
