"""One judge for all rows: the original with the linears of a row in it, against the original."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from accuracy.bench import Bench, Evaluation
from mxq.artifacts import Allocation
from mxq.blocks import write_block
from mxq.checkpoint.pack import pack
from mxq.numerics import unrotate
from mxq.quantizers import Method


def judge_plan(
    bench: Bench, plan: Allocation, method: Method, target: str, reference: Sequence[Tensor]
) -> dict[str, Any]:
    """Pack a plan of mxq, load the checkpoint, decode it and compare.

    ``file_bytes`` are those of the weight files and their index.
    """
    folder = Path(tempfile.mkdtemp(prefix="mxq-bench-"))
    try:
        packed = pack(
            bench.adapter, bench.batches, plan, folder / "out", method=method, target=target
        )
        weights = _decoded(bench, folder / "out")
        file_bytes = sum(path.stat().st_size for path in (folder / "out").glob("*.safetensors*"))
    finally:
        shutil.rmtree(folder)
    return {
        "tensor_bytes": packed.tensor_bytes,
        "file_bytes": file_bytes,
        **judge_weights(bench, weights, reference),
    }


def judge_weights(
    bench: Bench, weights: Mapping[str, Tensor], reference: Sequence[Tensor]
) -> dict[str, Any]:
    """Compare the original with ``block name -> w_NK`` in it with the original, on every domain."""
    model = dense_model(bench)
    for block in bench.blocks:
        write_block(model.get_parameter(block.tensor), block, weights[block.name])
    domains = dict(_compare(model, bench.evaluations, reference))
    tokens = sum(int(d["tokens"]) for d in domains.values())

    def mean(key: str) -> float:
        return sum(d[key] * d["tokens"] for d in domains.values()) / tokens

    return {
        "kl": mean("kl"),
        "excess_nats": mean("excess_nats"),
        "top1_agreement": mean("top1_agreement"),
        "heldout_tokens": tokens,
        "domains": domains,
    }


def dense_model(bench: Bench) -> PreTrainedModel:
    """The original in float32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        bench.adapter.source.folder, dtype=torch.float32
    )
    return model.eval()


def log_probabilities(model: PreTrainedModel, evaluations: Sequence[Evaluation]) -> list[Tensor]:
    """Of every token of the vocabulary at every position, one tensor for each window."""
    with torch.no_grad():
        return [
            model(input_ids=window[None], use_cache=False).logits[0].float().log_softmax(-1)
            for evaluation in evaluations
            for window in evaluation.windows
        ]


def _decoded(bench: Bench, folder: Path) -> dict[str, Tensor]:
    """What every block of a written checkpoint decodes to."""
    packed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = {}
    for block in bench.blocks:
        linear = packed.get_submodule(block.module)
        w_NK = linear.decode(torch.float32)
        found[block.name] = unrotate(w_NK) if linear.rotated else w_NK
    return found


def _compare(
    model: PreTrainedModel, evaluations: Sequence[Evaluation], reference: Sequence[Tensor]
) -> Iterator[tuple[str, dict[str, float]]]:
    """``domain -> tokens, kl, excess_nats, top1_agreement``."""
    originals = iter(reference)
    for evaluation in evaluations:
        sums = torch.zeros(3, dtype=torch.float64)
        for window in evaluation.windows:
            p = next(originals)[:-1]
            with torch.no_grad():
                logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
            q, labels = logits.float().log_softmax(-1), window[1:, None]
            kl = (p.exp() * (p - q)).sum(-1)
            excess = (p - q).gather(1, labels).squeeze(1)
            same = p.argmax(-1) == q.argmax(-1)
            sums += torch.stack([part.double().sum() for part in (kl, excess, same)])
        tokens = evaluation.windows[:, 1:].numel()
        kl_mean, excess_mean, agreement = (sums / tokens).tolist()
        yield (
            evaluation.domain,
            {
                "tokens": tokens,
                "kl": kl_mean,
                "excess_nats": excess_mean,
                "top1_agreement": agreement,
            },
        )
