"""Measured loss: held-out text through the original and through finished checkpoints.

All of them are streamed side by side, a decoder layer of each at a time, the checkpoints from the
files that were written; all compute in the type of the source, float32.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mxq.checkpoint.stream import open_packed, share_equal
from mxq.models.activations import ActivationStore
from mxq.models.adapter import ModelAdapter
from mxq.models.lockstep import (
    LayerCall,
    OnLayer,
    Track,
    hidden_of,
    run_calls,
    run_in_lockstep,
    run_side_by_side,
    with_hidden_of,
)
from mxq.models.source import ModelSource
from mxq.models.sweep import OnProgress
from mxq.scoring import compare_logits

FEW_TOKENS = 2000
"""Held-out tokens below which the measured losses come with a warning."""


@dataclass(frozen=True, slots=True)
class MeasuredLoss:
    """Means over held-out positions: nats per token of each model, and between the two.

    ``kl`` is KL(original || checkpoint), ``top1_agreement`` the share of positions where both
    predict the same token.
    """

    tokens: int
    original_nll: float
    nll: float
    kl: float
    top1_agreement: float

    @property
    def perplexity(self) -> float:
        """Of the checkpoint."""
        return math.exp(self.nll)

    @property
    def original_perplexity(self) -> float:
        """Of the original."""
        return math.exp(self.original_nll)


def measure_loss(
    adapter: ModelAdapter,
    heldout: Sequence[Tensor],
    folders: Mapping[str, Path],
    progress: OnProgress | None = None,
    *,
    store: ActivationStore | None = None,
) -> dict[str, MeasuredLoss]:
    """The loss of each checkpoint on held-out batches [batch, sequence].

    Raises:
        ValueError: If a checkpoint's files are not what was written, or its logits not finite.
    """
    store = store or ActivationStore()
    sources = [adapter.source]
    for folder in folders.values():
        sources.append(open_packed(folder, adapter.source.dtype, adapter.source.device))
        share_equal(sources[-1].model, adapter.source.model)
    sums = {name: torch.zeros(4, dtype=torch.float64) for name in folders}
    counted = 0

    def on_results(batch: int, results: Sequence[object]) -> None:
        nonlocal counted
        counted += heldout[batch][:, 1:].numel()
        original, *others = (result.logits.detach()[:, :-1] for result in results)  # type: ignore[attr-defined]
        for name, logits in zip(folders, others, strict=True):
            sums[name] += compare_logits(logits, original, heldout[batch])
        if progress is not None:
            progress("logits", batch + 1, len(heldout))

    tracks = [
        Track(source.model, source.layers, _streamed(source, name, store, progress))
        for name, source in zip(("original", *folders), sources, strict=True)
    ]
    run_side_by_side(tracks, heldout, on_results, store=store)
    for name, total in sums.items():
        if not total.isfinite().all():
            raise ValueError(f"the logits of the {name} checkpoint are not finite on held-out text")
    return {name: _mean(total, counted) for name, total in sums.items()}


def measure_layers(
    adapter: ModelAdapter,
    heldout: Sequence[Tensor],
    folder: Path,
    progress: OnProgress | None = None,
    *,
    store: ActivationStore | None = None,
) -> tuple[float, ...]:
    """KL(original || original with one layer of a checkpoint), in nats per token, by layer.

    All of these models go through the layers together, so each layer is read once; up to the
    layer that differs, a model has the activations of the original.

    Raises:
        ValueError: If the checkpoint's files are not what was written, or logits not finite.
    """
    store = store or ActivationStore()
    source = adapter.source
    packed = open_packed(folder, source.dtype, source.device)
    models = 1 + len(source.layers)  # the original, then one for each layer
    sums = torch.zeros(len(source.layers), dtype=torch.float64)
    original = torch.empty(0)

    def on_result(call: int, result: object) -> None:
        nonlocal original
        batch, model = divmod(call, models)
        logits = result.logits.detach()[:, :-1]  # type: ignore[attr-defined]
        if model == 0:
            original = logits
        else:
            sums[model - 1] += compare_logits(logits, original, heldout[batch])[2]

    calls = [batch for batch in heldout for _ in range(models)]
    on_layer = _one_layer_each(source, packed, store, progress)
    run_in_lockstep(source.model, source.layers, calls, on_layer, on_result, store=store)
    if not sums.isfinite().all():
        raise ValueError("the logits with a layer of the checkpoint are not finite")
    return tuple((sums / sum(batch[:, 1:].numel() for batch in heldout)).tolist())


def _one_layer_each(
    source: ModelSource, packed: ModelSource, store: ActivationStore, progress: OnProgress | None
) -> OnLayer:
    """Run the calls of the original and of each model with one layer of ``packed``, in turn."""
    models = 1 + len(source.layers)

    def on_layer(layer: int, calls: list[LayerCall]) -> list[object]:
        source.load_layer(layer)
        packed.load_layer(layer)
        outputs: list[object] = []
        with torch.no_grad():
            for first in range(0, len(calls), models):
                differing = calls[first + layer + 1]
                swapped = replace(differing, forward=packed.layers[layer].forward)
                found = run_calls([*calls[first : first + layer + 1], swapped], store)
                same = (_copied(found[0], store) for _ in range(models - len(found)))
                outputs += [*found, *same]
        source.free_layer(layer)
        packed.free_layer(layer)
        if progress is not None:
            progress("layers", layer + 1, len(source.layers))
        return outputs

    return on_layer


def _copied(output: object, store: ActivationStore) -> object:
    """A layer's output with hidden states of its own, which the model's code may write to."""
    hidden = store.keep(hidden_of(output).clone(), cold=True)
    store.release(hidden)
    return with_hidden_of(output, hidden)


def _streamed(
    source: ModelSource, name: str, store: ActivationStore, progress: OnProgress | None
) -> OnLayer:
    """Read a layer, run it for all batches and drop it."""

    def on_layer(layer: int, calls: list[LayerCall]) -> list[object]:
        source.load_layer(layer)
        with torch.no_grad():
            outputs = run_calls(calls, store)
        source.free_layer(layer)
        if progress is not None:
            progress(name, layer + 1, len(source.layers))
        return outputs

    return on_layer


def _mean(sums: Tensor, tokens: int) -> MeasuredLoss:
    nll, original_nll, kl, same = (sums / tokens).tolist()
    return MeasuredLoss(tokens, original_nll, nll, kl, same)
