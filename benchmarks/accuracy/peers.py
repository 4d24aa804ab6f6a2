"""Rows of peers: jobs for the runners in their own environments, and what comes back, checked."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from speed.processes import python_of, run_job
from torch import Tensor

from accuracy.bench import Bench, budget_bits, count_schemes, stored_bits
from accuracy.judge import Answer, judge_weights
from mxq.artifacts import Allocation
from mxq.blocks import LinearBlock
from mxq.scheme import Scheme

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Peer:
    """A row of another tool.

    ``widths`` says who chooses them: ``uniform`` (the scheme of the size), ``own`` (the peer, given
    the budget) or ``mxq`` (the plan of the row ``mxq`` of that size, without its rotations).
    ``options`` go before those of its tool.
    """

    tool: str
    widths: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def runner(self) -> Path:
        """The script that the python of the tool's environment runs."""
        return HERE.parent / "peers" / f"weights_{self.tool}.py"


PEERS: Mapping[str, Peer] = {
    "llmcompressor": Peer("llmcompressor", "uniform"),
    "llmcompressor-mxq-plan": Peer("llmcompressor", "mxq"),
    "autoround": Peer("autoround", "own"),
    "autoround-untuned": Peer("autoround", "own", {"iters": 0}),
    "autoround-uniform": Peer("autoround", "uniform"),
    "modelopt": Peer("modelopt", "own"),
}


@dataclass(frozen=True, slots=True)
class Setting:
    """Where the environments are, the threads of a peer, and its options by tool."""

    environments: Path | None
    threads: int
    options: Mapping[str, Mapping[str, Any]]


class PeerError(Exception):
    """A peer gave no row; the message says what it said."""


def judge_peer(
    bench: Bench,
    peer: Peer,
    size: str,
    plan: Allocation | None,
    setting: Setting,
    reference: Sequence[Answer],
) -> dict[str, Any]:
    """Run a peer, check what it stored, and judge its weights; ``plan`` is that of mxq.

    Raises:
        PeerError: If its environment is absent, it failed, or its result is not what it says.
    """
    python = python_of(peer.tool, setting.environments)
    if python is None:
        raise PeerError(
            f"no environment {peer.tool} in --peers {setting.environments} "
            "(benchmarks/peers/make_environments.sh)"
        )
    room = Path(tempfile.mkdtemp(prefix="mxq-peer-"))
    try:
        job = _write_job(bench, peer, size, plan, setting, room)
        found = run_job(python, peer.runner, job, room)
        if "error" in found:
            raise PeerError(str(found["error"]))
        stored = load_file(job["weights"])
    finally:
        shutil.rmtree(room)
    schemes = _schemes(bench.blocks, found.pop("schemes"))
    weights = _weights(bench.blocks, stored)
    more_bits = found.pop("more_bits", 0)
    if not more_bits:
        check_grids(bench.blocks, weights, schemes)
    bits = stored_bits(bench.blocks, schemes, more_bits=more_bits)
    judged = judge_weights(bench, weights, reference)
    return {**bits, "schemes": count_schemes(schemes), **found, **judged}


def check_grids(
    blocks: Sequence[LinearBlock], weights: Mapping[str, Tensor], schemes: Mapping[str, Scheme]
) -> None:
    """Raise PeerError if a group has more values than its codes can tell apart, up to 4 bits."""
    for block in blocks:
        scheme, w_NK = schemes[block.name], weights[block.name]
        if scheme.w_bits > 4:
            continue
        groups = w_NK.reshape(-1, scheme.group_size or block.in_features).sort(-1).values
        # Two values of one code may differ by the rounding of (code - zero) * scale.
        step = 1e-5 * groups.abs().amax(-1, keepdim=True)
        most = int((groups.diff(dim=-1) > step).sum(-1).max()) + 1
        if most > 2**scheme.w_bits:
            raise PeerError(
                f"{block.module}: a group has {most} values, and {scheme} has {2**scheme.w_bits}"
            )


def _write_job(
    bench: Bench, peer: Peer, size: str, plan: Allocation | None, setting: Setting, room: Path
) -> dict[str, Any]:
    """The job of a runner, of plain JSON values; its tokens are written beside it."""
    tokens = room / "tokens.safetensors"
    save_file({"fit": bench.calibration}, tokens)
    scheme = Scheme.parse(size.partition("=")[0])
    chosen = {
        block.module: _fields(plan.schemes[block.name] if peer.widths == "mxq" and plan else scheme)
        for block in bench.blocks
    }
    return {
        "model": str(Path(bench.adapter.source.folder).resolve()),
        "tokens": str(tokens),
        "weights": str(room / "weights.safetensors"),
        "row": str(room / "row.json"),
        "threads": setting.threads,
        "seed": bench.seed,
        "bits": budget_bits(bench.blocks, size),
        "modules": [block.module for block in bench.blocks],
        "weights_in_all": sum(block.weights for block in bench.blocks),
        "schemes": None if peer.widths == "own" else chosen,
        "options": {**setting.options.get(peer.tool, {}), **peer.options},
    }


def _fields(scheme: Scheme) -> dict[str, Any]:
    return {
        "bits": scheme.w_bits,
        "group_size": scheme.group_size,
        "symmetric": scheme.symmetric,
    }


def _schemes(
    blocks: Sequence[LinearBlock], found: Mapping[str, Mapping[str, Any]]
) -> dict[str, Scheme]:
    """``block name -> scheme``; a width of 16 is bf16."""
    _check_modules(blocks, set(found))
    return {block.name: _scheme(found[block.module]) for block in blocks}


def _scheme(fields: Mapping[str, Any]) -> Scheme:
    if fields["bits"] == 16:
        return Scheme.parse("bf16")
    group = "row" if fields["group_size"] is None else fields["group_size"]
    kind = "sym" if fields["symmetric"] else "asym"
    return Scheme.parse(f"w{fields['bits']}a16_g{group}_{kind}")


def _weights(blocks: Sequence[LinearBlock], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    _check_modules(blocks, {name.removesuffix(".weight") for name in stored})
    found = {block.name: stored[f"{block.module}.weight"].float() for block in blocks}
    for block in blocks:
        w_NK = found[block.name]
        if w_NK.shape != (block.out_features, block.in_features) or not torch.isfinite(w_NK).all():
            raise PeerError(
                f"{block.module}: shape {tuple(w_NK.shape)}, expected "
                f"{(block.out_features, block.in_features)} finite values"
            )
    return found


def _check_modules(blocks: Sequence[LinearBlock], found: set[str]) -> None:
    wanted = {block.module for block in blocks}
    if found != wanted:
        wrong = sorted(found ^ wanted)
        raise PeerError(
            f"the peer was to quantize {len(wanted)} linears and gave {len(found)}: "
            f"{', '.join(wrong[:3])}{'' if len(wrong) <= 3 else f' and {len(wrong) - 3} more'}"
        )
