"""One judge for all rows: the original with the linears of a row in it, against the original.

Decoded to dense weights a checkpoint no longer rounds its inputs: ``judge_plan`` is for schemes
that leave them alone, ``judge_inputs`` runs the checkpoint's own modules.
"""

import shutil
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from accuracy.bench import Bench, Evaluation
from mxq.artifacts import Allocation
from mxq.blocks import write_block
from mxq.checkpoint.expert_choices import count_kept
from mxq.checkpoint.modules import MxqLinear
from mxq.checkpoint.pack import pack
from mxq.curvature import Curvature
from mxq.models.experts import expert_count, is_fused_experts
from mxq.numerics import unrotate
from mxq.quantizers import Method


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model makes of one window.

    ``logp_TV`` are log probabilities of the whole vocabulary at every position, ``choices`` the
    experts [T, R] that each position goes to, by the path of the experts.
    """

    logp_TV: Tensor
    choices: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Packing:
    """How a plan is packed: quantizer, target, and for some quantizers what gradients say."""

    method: Method
    target: str
    curvature: Mapping[int, Curvature] | None = None


def judge_plan(
    bench: Bench, plan: Allocation, packing: Packing, reference: Sequence[Answer]
) -> dict[str, Any]:
    """Pack a plan of mxq, load the checkpoint, decode it and compare.

    ``file_bytes`` are those of the weight files and their index.
    """
    with _packed(bench, plan, packing) as (stored, packed):
        weights = _decoded(bench, packed)
    return {**stored, **judge_weights(bench, weights, reference)}


def judge_inputs(
    bench: Bench, plan: Allocation, packing: Packing, reference: Sequence[Answer]
) -> dict[str, Any]:
    """Pack a plan of mxq, load the checkpoint and compare it as it runs, its inputs rounded.

    ``kl_weights`` is that of the decoded weights alone, with inputs as they are.
    """
    with _packed(bench, plan, packing) as (stored, packed):
        weights = _decoded(bench, packed)
        decode_once(packed)
        found = judge_model(bench, packed, reference)
    alone = judge_weights(bench, weights, reference)
    return {**stored, "kl_weights": alone["kl"], **found}


def judge_weights(
    bench: Bench, weights: Mapping[str, Tensor], reference: Sequence[Answer]
) -> dict[str, Any]:
    """Compare the original with ``block name -> w_NK`` in it with the original, on every domain."""
    model = dense_model(bench)
    for block in bench.blocks:
        write_block(model.get_parameter(block.tensor), block, weights[block.name])
    return judge_model(bench, model, reference)


def judge_model(
    bench: Bench, model: PreTrainedModel, reference: Sequence[Answer]
) -> dict[str, Any]:
    """Compare a model with the original on every domain.

    ``choices_kept`` is the share of the original's choices of experts that are the same, the mean
    over layers; only dense weights behind the experts interface of transformers tell them.
    """
    domains = dict(_compare(model, bench.evaluations, reference))
    tokens = sum(int(d["tokens"]) for d in domains.values())

    def mean(key: str) -> float:
        return sum(d[key] * d["tokens"] for d in domains.values()) / tokens

    measured = [key for key in next(iter(domains.values())) if key != "tokens"]
    return {**{key: mean(key) for key in measured}, "heldout_tokens": tokens, "domains": domains}


def dense_model(bench: Bench) -> PreTrainedModel:
    """The original in float32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        bench.adapter.source.folder, dtype=torch.float32
    )
    return model.eval()


def answers(model: PreTrainedModel, evaluations: Sequence[Evaluation]) -> list[Answer]:
    """One for each window of all evaluations, in their order."""
    return [ask(model, window) for evaluation in evaluations for window in evaluation.windows]


def ask(model: PreTrainedModel, window: Tensor) -> Answer:
    """What a model of transformers makes of the token ids of a window."""
    choices: dict[str, Tensor] = {}

    def keep(path: str, module: nn.Module) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
            choices[path] = inputs[1]  # (hidden, index, weights), what the router gave

        undo.callback(module.register_forward_pre_hook(hook).remove)

    with ExitStack() as undo, torch.no_grad():
        for path, module in _experts(model):
            keep(path, module)
        logits = model(input_ids=window[None], use_cache=False).logits[0]
    return Answer(logits.float().log_softmax(-1), choices)


def _experts(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    return [(path, module) for path, module in model.named_modules() if is_fused_experts(module)]


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
    bench: Bench, plan: Allocation, packing: Packing
) -> Iterator[tuple[dict[str, int], PreTrainedModel]]:
    """A plan packed and loaded again; with the bytes of its tensors and of its weight files."""
    known = None if packing.curvature is None else packing.curvature.__getitem__
    folder = Path(tempfile.mkdtemp(prefix="mxq-bench-"))
    try:
        report = pack(
            bench.adapter,
            bench.batches,
            plan,
            folder / "out",
            method=packing.method,
            target=packing.target,
            curvature=known,
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
    model: PreTrainedModel, evaluations: Sequence[Evaluation], reference: Sequence[Answer]
) -> Iterator[tuple[str, dict[str, float]]]:
    """``domain -> tokens, kl, excess_nats, top1_agreement``, with experts ``choices_kept`` too."""
    originals = iter(reference)
    for evaluation in evaluations:
        sums: Counter[str] = Counter()
        for window in evaluation.windows:
            original, found = next(originals), ask(model, window)
            p, q, labels = original.logp_TV[:-1], found.logp_TV[:-1], window[1:, None]
            kl = (p.exp() * (p - q)).sum(-1)
            excess = (p - q).gather(1, labels).squeeze(1)
            same = p.argmax(-1) == q.argmax(-1)
            for key, part in (("kl", kl), ("excess_nats", excess), ("top1_agreement", same)):
                sums[key] += float(part.double().sum())
            if found.choices:
                sums["choices_kept"] += len(p) * _kept_share(model, found, original)
        tokens = evaluation.windows[:, 1:].numel()
        yield evaluation.domain, {"tokens": tokens, **{k: v / tokens for k, v in sums.items()}}


def _kept_share(model: PreTrainedModel, found: Answer, original: Answer) -> float:
    """The mean over layers for one window, without the last position, which predicts nothing."""
    shares = []
    for path, origin_TR in original.choices.items():
        experts = expert_count(model.get_submodule(path))
        kept, choices = count_kept(found.choices[path][:-1], origin_TR[:-1], experts)
        shares.append(kept / choices)
    return statistics.mean(shares)
