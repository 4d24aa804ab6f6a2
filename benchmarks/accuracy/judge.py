"""One judge for all rows: the original with the linears of a row in it, against the original.

Decoded to dense weights a checkpoint no longer rounds its inputs: ``judge_plan`` is for schemes
that leave them alone, ``judge_inputs`` runs the checkpoint's own modules.
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from accuracy.bench import Bench, Evaluation
from mxq.artifacts import Allocation
from mxq.blocks import write_block
from mxq.checkpoint.modules import MxqLinear
from mxq.checkpoint.pack import pack
from mxq.numerics import unrotate
from mxq.quantizers import Method


def judge_plan(
    bench: Bench, plan: Allocation, method: Method, target: str, reference: Sequence[Tensor]
) -> dict[str, Any]:
    """Pack a plan of mxq, load the checkpoint, decode it and compare.

    ``file_bytes`` are those of the weight files and their index.
    """
    with _packed(bench, plan, method, target) as (stored, packed):
        weights = _decoded(bench, packed)
    return {**stored, **judge_weights(bench, weights, reference)}


def judge_inputs(
    bench: Bench, plan: Allocation, method: Method, target: str, reference: Sequence[Tensor]
) -> dict[str, Any]:
    """Pack a plan of mxq, load the checkpoint and compare it as it runs, its inputs rounded.

    ``kl_weights`` is that of the decoded weights alone, with inputs as they are.
    """
    with _packed(bench, plan, method, target) as (stored, packed):
        weights = _decoded(bench, packed)
        decode_once(packed)
        found = judge_model(bench, packed, reference)
    alone = judge_weights(bench, weights, reference)
    return {**stored, "kl_weights": alone["kl"], **found}


def judge_weights(
    bench: Bench, weights: Mapping[str, Tensor], reference: Sequence[Tensor]
) -> dict[str, Any]:
    """Compare the original with ``block name -> w_NK`` in it with the original, on every domain."""
    model = dense_model(bench)
    for block in bench.blocks:
        write_block(model.get_parameter(block.tensor), block, weights[block.name])
    return judge_model(bench, model, reference)


def judge_model(
    bench: Bench, model: PreTrainedModel, reference: Sequence[Tensor]
) -> dict[str, Any]:
    """Compare a model with the original on every domain."""
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


def decode_once(packed: PreTrainedModel) -> None:
    """Keep the decoded weight of every packed linear of a loaded checkpoint, in float32.

    Its modules run as they do, but do not decode for every window.
    """
    for module in packed.modules():
        if isinstance(module, MxqLinear):
            w_NK = module.decode(torch.float32)
            module.decode = lambda dtype, w_NK=w_NK: w_NK.to(dtype)


@contextmanager
def _packed(
    bench: Bench, plan: Allocation, method: Method, target: str
) -> Iterator[tuple[dict[str, int], PreTrainedModel]]:
    """A plan packed and loaded again; with the bytes of its tensors and of its weight files."""
    folder = Path(tempfile.mkdtemp(prefix="mxq-bench-"))
    try:
        report = pack(
            bench.adapter, bench.batches, plan, folder / "out", method=method, target=target
        )
        packed = AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32)
        files = sum(path.stat().st_size for path in (folder / "out").glob("*.safetensors*"))
        yield {"tensor_bytes": report.tensor_bytes, "file_bytes": files}, packed.eval()
    finally:
        shutil.rmtree(folder)


def _decoded(bench: Bench, packed: PreTrainedModel) -> dict[str, Tensor]:
    """What every block of a loaded checkpoint decodes to."""
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
