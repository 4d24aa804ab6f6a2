"""Score models on text, one loaded at a time, each against the same reference."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mxq.counted import counted
from mxq.evaluation.domains import encode_texts, read_texts
from mxq.evaluation.loading import (
    find_baseline,
    free_memory,
    known_positions,
    load_model,
    require_decodable,
    resolve,
)
from mxq.evaluation.losses import ModelLosses, Scores, model_losses
from mxq.evaluation.reference import KEEP_CHOICES, ReferenceLogits, model_logits
from mxq.evaluation.statistics import Stratum, require_confidence
from mxq.scoring import compare_logits, require_counts, windows

DEFAULT_WINDOW = 2048

Other = Callable[[int, Tensor], Tensor]
"""From the number of a batch and a model's logits to the logits that these are compared with."""

Watch = Callable[[str, Sequence[int]], Iterable[int]]
"""Goes through the numbers of the batches and shows how far it is, under a title."""


@dataclass(frozen=True, slots=True)
class TextOptions:
    """What to score on, and how; None for ``window`` is what all models know, 2048 at most.

    ``limit`` is the most tokens of a domain. ``keep_logits`` says whether the reference's logits
    go to disk (``yes``), or the reference stays in memory and runs anew for each model (``no``).
    """

    text: str
    window: int | None = None
    limit: int | None = None
    batch: int = 1
    device: str | None = None
    confidence: float = 0.95
    keep_logits: str = "auto"

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be scored."""
        require_counts(self.window, self.batch)
        require_confidence(self.confidence)
        if self.keep_logits not in KEEP_CHOICES:
            menu = ", ".join(KEEP_CHOICES)
            raise ValueError(f"keep-logits is {self.keep_logits!r}; choose one of {menu}")


@dataclass(frozen=True, slots=True)
class Prepared:
    """Token ids by domain, cut for scoring; nothing in them depends on which model reads them."""

    names: tuple[str, ...]
    reference: str | None
    baseline: int
    window: int
    batches: tuple[tuple[str, Tensor], ...]
    options: TextOptions


def prepare(
    models: Sequence[str],
    options: TextOptions,
    *,
    reference: str | None = None,
    baseline: str | None = None,
) -> Prepared:
    """Everything that can be refused before a model is loaded; the reference comes first.

    ``baseline`` is the model that differences are to, None the first.

    Raises:
        ValueError: If a text or a tokenizer cannot be read, or the models cannot be compared.
        ConnectionError: If a text of the hub cannot be fetched.
    """
    names = list(models)
    if reference is not None:
        names = [reference, *(name for name in names if name != reference)]
    base = find_baseline(names, baseline)
    for name in names:
        require_decodable(name)
    window = _window(names, options.window)
    ids = encode_texts(read_texts(options.text), names, options.limit)
    batches = tuple(
        (domain, batch_BT)
        for domain, ids_T in ids.items()
        for batch_BT in windows(ids_T, window, options.batch)
    )
    return Prepared(tuple(names), reference, base, window, batches, options)


def _window(names: Sequence[str], asked: int | None) -> int:
    """The window asked for, else the smaller of 2048 and the positions that all models know."""
    known = {name: known_positions(name) for name in dict.fromkeys(names)}
    limits = {name: limit for name, limit in known.items() if limit is not None}
    if asked is None:
        return min([DEFAULT_WINDOW, *limits.values()])
    for name, limit in limits.items():
        if asked > limit:
            raise ValueError(
                f"window {asked} is longer than the {counted(limit, 'position')} of the "
                f"model {name}"
            )
    return asked


def measure(prepared: Prepared, watch: Watch) -> tuple[ModelLosses, ...]:
    """The losses of every model, in order.

    Raises:
        ValueError: If a model cannot be loaded, has another vocabulary, or gives no finite logits.
    """
    found = _score_all(prepared, watch)
    base = found[resolve(prepared.names[prepared.baseline])]
    return tuple(
        model_losses(
            name,
            found[resolve(name)],
            None if number == prepared.baseline else base,
            prepared.options.confidence,
        )
        for number, name in enumerate(prepared.names)
    )


def _score_all(prepared: Prepared, watch: Watch) -> dict[str, Scores]:
    """The scores of each model; one that is named twice runs once."""
    found: dict[str, Scores] = {}
    kept = ReferenceLogits([ids_BT for _, ids_BT in prepared.batches], prepared.options.keep_logits)
    for name in prepared.names:
        if resolve(name) in found:
            continue
        model = load_model(name, device=prepared.options.device)
        other: Other | None = None
        if prepared.reference is not None:
            other = kept.record if name == prepared.reference else kept.replay
        numbers = watch(f"scoring {name}", range(len(prepared.batches)))
        try:
            found[resolve(name)] = score(model, prepared.batches, numbers, other)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if name == prepared.reference:
            kept.finish(model)
        del model
        free_memory()
    return found


def score(
    model: PreTrainedModel,
    batches: Sequence[tuple[str, Tensor]],
    numbers: Iterable[int],
    other: Other | None = None,
) -> dict[str, Stratum]:
    """Sums over the windows of each domain, for the batches (domain, ids [B, T]) of ``numbers``.

    Raises:
        ValueError: If ``other`` has another vocabulary, or logits are not finite.
    """
    rows: dict[str, list[Tensor]] = {domain: [] for domain, _ in batches}
    for number in numbers:
        domain, ids_BT = batches[number]
        logits_BTV = model_logits(model, ids_BT)
        # A model is its own reference at distance 0, also where its kernels do not repeat exactly.
        other_BTV = logits_BTV if other is None else other(number, logits_BTV)
        rows[domain] += _window_sums(logits_BTV, other_BTV, ids_BT)
    sums = {domain: torch.stack(row) for domain, row in rows.items()}
    if not all(sums_U4.isfinite().all() for sums_U4 in sums.values()):
        raise ValueError("the logits are not finite somewhere in the text; the model is broken")
    return {domain: _stratum(sums_U4, other is not None) for domain, sums_U4 in sums.items()}


def _window_sums(logits_BTV: Tensor, other_BTV: Tensor, ids_BT: Tensor) -> list[Tensor]:
    """For each window: its tokens, and the sums over them of nll, KL and flips; float64 [4]."""
    found = []
    for window in range(len(ids_BT)):
        one = slice(window, window + 1)
        nll, _, kl, same = compare_logits(logits_BTV[one], other_BTV[one], ids_BT[one])
        tokens = torch.tensor(float(ids_BT.shape[1] - 1), dtype=torch.float64)
        found.append(torch.stack([tokens, nll, kl, tokens - same]))
    return found


def _stratum(sums_U4: Tensor, has_reference: bool) -> Stratum:
    tokens_U, *sums = sums_U4.T.numpy()
    return Stratum(tokens_U, np.stack(sums if has_reference else sums[:1]))
