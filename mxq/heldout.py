"""Measured loss: held-out text through the original and through finished checkpoints.

The original is streamed, the checkpoints are loaded from their folders by ``from_pretrained``, so
what is measured is what was written; both compute in the type of the source, float32.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mxq.evaluation import compare_logits
from mxq.models.adapter import ModelAdapter
from mxq.models.lockstep import LayerCall, run_in_lockstep
from mxq.models.source import load_whole
from mxq.models.sweep import OnProgress


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
) -> dict[str, MeasuredLoss]:
    """The loss of each checkpoint on held-out batches [batch, sequence].

    Raises:
        ValueError: If a checkpoint's logits are not finite.
    """
    source = adapter.source
    models = {name: _load(path, source.dtype) for name, path in folders.items()}
    sums = {name: torch.zeros(4, dtype=torch.float64) for name in folders}
    counted = 0

    def on_layer(layer: int, calls: list[LayerCall]) -> list[object]:
        source.load_layer(layer)
        with torch.no_grad():
            outputs = [call.run() for call in calls]
        source.free_layer(layer)
        if progress is not None:
            progress("original", layer + 1, len(source.layers))
        return outputs

    def on_result(batch: int, result: object) -> None:
        nonlocal counted
        original = result.logits.detach()  # type: ignore[attr-defined]
        counted += heldout[batch][:, 1:].numel()
        for name, model in models.items():
            with torch.no_grad():
                logits = model(input_ids=heldout[batch], use_cache=False).logits
            sums[name] += compare_logits(logits[:, :-1], original[:, :-1], heldout[batch])
        if progress is not None:
            progress("checkpoints", batch + 1, len(heldout))

    run_in_lockstep(source.model, source.layers, heldout, on_layer, on_result)
    for name, total in sums.items():
        if not total.isfinite().all():
            raise ValueError(f"the logits of the {name} checkpoint are not finite on held-out text")
    return {name: _mean(total, counted) for name, total in sums.items()}


def _load(folder: Path, dtype: torch.dtype) -> nn.Module:
    model: nn.Module = load_whole(folder, dtype=dtype)
    return model.eval()


def _mean(sums: Tensor, tokens: int) -> MeasuredLoss:
    nll, original_nll, kl, same = (sums / tokens).tolist()
    return MeasuredLoss(tokens, original_nll, nll, kl, same)
