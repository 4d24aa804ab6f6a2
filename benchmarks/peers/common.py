"""What the runners of the peers share; needs torch and safetensors only, and nothing of mxq."""

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def read_job() -> dict[str, Any]:
    """The job on the standard input; the number of threads is set."""
    job: dict[str, Any] = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    return job


def answer_job(quantize: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Give the job to ``quantize``, with its seed set, and keep the row that it returns."""
    job = read_job()
    torch.manual_seed(job["seed"])
    write_row(job, quantize(job))


def write_row(job: dict[str, Any], row: dict[str, Any]) -> None:
    """The result goes to a file: peers write what they like to the standard output."""
    Path(job["row"]).write_text(json.dumps(row))


def calibration(job: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Token ids [samples, tokens] to calibrate on, and those held out."""
    return fit_rows(job), load_file(job["tokens"])["heldout"]


def fit_rows(job: dict[str, Any]) -> Tensor:
    """Token ids [samples, tokens] to calibrate on."""
    return load_file(job["tokens"])["fit"]


@torch.no_grad()
def mean_nll(model: nn.Module, ids: Tensor) -> float:
    """Nats per token of a model on rows of ids."""
    total = 0.0
    for row in ids:
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1].float()
        total += float(nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
    return total / ids[:, 1:].numel()


def versions(*names: str) -> dict[str, str]:
    """Installed versions."""
    return {name: version(name) for name in (*names, "torch", "transformers")}


def save_weights(job: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Write what linears decode to, ``name of the linear -> w_NK``, where the job says."""
    tensors = {f"{name}.weight": w.detach().float().contiguous() for name, w in weights.items()}
    save_file(tensors, job["weights"])


class Stopwatch:
    """Seconds of successive steps, on the wall and of the processors."""

    def __init__(self) -> None:
        self.steps: dict[str, float] = {}
        self._start = self._last = time.perf_counter()
        self._before = os.times()

    def step(self, name: str) -> None:
        """What ran since the last call was this step."""
        now = time.perf_counter()
        self.steps[name], self._last = now - self._last, now

    def row(self) -> dict[str, Any]:
        """Steps, their sum, and the seconds of the processors since the start."""
        after, before = os.times(), self._before
        return {
            "steps": self.steps,
            "total_s": self._last - self._start,
            "processor_s": after.user + after.system - before.user - before.system,
            "system_s": after.system - before.system,
        }
