"""The model, the calibration tokens and the held-out text that every row has in common."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from mxq.blocks import LinearBlock
from mxq.config import CalibrationOptions
from mxq.models.adapter import ModelAdapter
from mxq.models.source import open_source
from mxq.models.sweep import Batches, make_batches
from mxq.profiling.draw import draw_calibration
from mxq.scheme import Scheme


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Held-out windows [windows, window] of one domain."""

    domain: str
    windows: Tensor


@dataclass(frozen=True, slots=True)
class Bench:
    """One model with its blocks, calibration tokens and held-out text.

    ``calibration`` is every row that mxq sees, those that it holds out for its own choices too.
    """

    adapter: ModelAdapter
    batches: Batches
    calibration: Tensor
    evaluations: tuple[Evaluation, ...]
    seed: int

    @property
    def blocks(self) -> tuple[LinearBlock, ...]:
        """The linears that every tool quantizes; all others stay as they are."""
        return self.adapter.blocks()


def open_bench(
    model: str,
    options: CalibrationOptions,
    evaluations: Sequence[Evaluation],
    *,
    scope: str = "auto",
) -> Bench:
    """Draw the calibration rows of a seed."""
    adapter = ModelAdapter(open_source(model), scope=scope)
    base, spare, heldout = draw_calibration(adapter, options)
    fit = base.input_ids if spare is None else torch.cat([base.input_ids, spare.input_ids])
    batches = make_batches(fit, heldout.input_ids)
    rows = torch.cat([fit, heldout.input_ids])
    return Bench(adapter, batches, rows, tuple(evaluations), options.seed)


def read_evaluation(model: str, entry: str, window: int, count: int) -> Evaluation:
    """Evenly spaced windows of the file of an entry ``domain=path``."""
    domain, _, path = entry.partition("=")
    tokenizer: Callable[..., Mapping[str, object]] = AutoTokenizer.from_pretrained(model)
    ids = torch.tensor(tokenizer(Path(path).read_text(), verbose=False)["input_ids"])
    step = max(window, (len(ids) - window) // max(1, count - 1))
    starts = range(0, min(len(ids) - window, step * (count - 1)) + 1, step)
    return Evaluation(domain, torch.stack([ids[start : start + window] for start in starts]))


def budget_bits(blocks: Sequence[LinearBlock], size: str) -> float:
    """Bits per weight of a size: its own number, or that of its uniform scheme."""
    scheme, _, bits = size.partition("=")
    if bits:
        return float(bits)
    return stored_bits(blocks, {b.name: Scheme.parse(scheme) for b in blocks})["bits"]


def stored_bits(
    blocks: Sequence[LinearBlock], schemes: Mapping[str, Scheme], *, more_bits: int = 0
) -> dict[str, float]:
    """Bits per weight in all and of codes, scales, zero points; ``more_bits`` are of other kinds.

    Scales have 16 bits and zero points the width of the codes, for every tool.
    """
    total = sum(block.weights for block in blocks)
    bits = more_bits + sum(
        schemes[b.name].storage_bits(b.out_features, b.in_features) for b in blocks
    )
    codes = sum(schemes[b.name].w_bits * b.weights for b in blocks)
    zeros = sum(
        schemes[b.name].w_bits * b.out_features * schemes[b.name].groups(b.in_features)
        for b in blocks
        if not schemes[b.name].symmetric
    )
    parts = {"codes": codes, "zeros": zeros, "scales": bits - more_bits - codes - zeros}
    parts |= {"other": more_bits} if more_bits else {}
    return {"bits": bits / total, **{kind: part / total for kind, part in parts.items()}}


def count_schemes(schemes: Mapping[str, Scheme]) -> dict[str, int]:
    """``scheme -> blocks that have it``, from few bits to many."""
    return {str(scheme): count for scheme, count in sorted(Counter(schemes.values()).items())}
