"""AutoRound: rounding tuned by signed gradients, with given widths or those of AutoScheme.

Run by the python of its own environment (requirements beside this file): a job (JSON) on the
standard input, a row to the file that the job names. All linears that the job does not name stay
at 16 bits. Everything that the job does not name is at its default; the model is in float32, so
that scales are not rounded to bf16.
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound, AutoScheme
from auto_round.schemes import QuantizationScheme
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import answer_job, fit_rows, save_weights, versions
from run_autoround import serve

OPTIONS = ((2, 128, False), (2, 64, False), (3, 128, False), (4, 128, False), (8, 128, True))
"""Bits, group and symmetry that AutoScheme chooses from; it refuses 8 bits with zero points."""


def quantize(job: dict[str, Any]) -> dict[str, Any]:
    """The row of a run."""
    fit = fit_rows(job)
    serve(fit)
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    bits = _average_bits(model, job)
    started = time.perf_counter()
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job["model"]),
        scheme=_scheme(job, bits, fit),
        iters=job["options"]["iters"],
        nsamples=len(fit),
        seqlen=fit.shape[1],
        seed=job["seed"],
        device_map="cpu",
        ignore_layers="self_attn",
        enable_torch_compile=False,
    )
    rounded, found = rounder.quantize()
    seconds = time.perf_counter() - started
    schemes = {name: _fields(config) for name, config in found.items() if config["bits"] < 16}
    save_weights(job, {name: rounded.get_submodule(name).weight for name in schemes})
    return {
        "schemes": schemes,
        "settings": {
            "dtype": "float32",
            "iters": job["options"]["iters"],
            "samples": len(fit),
            "avg_bits": bits if job["schemes"] is None else None,
        },
        "quantize_s": seconds,
        "versions": versions("auto-round"),
    }


def _average_bits(model: torch.nn.Module, job: dict[str, Any]) -> float:
    """The job's bits per weight as AutoScheme counts: linears that stay are in it, at 16 bits."""
    linears = {
        name: module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    }
    stay = sum(weights for name, weights in linears.items() if name not in job["modules"])
    return (job["bits"] * job["weights_in_all"] + 16 * stay) / (job["weights_in_all"] + stay)


def _scheme(job: dict[str, Any], bits: float, fit: torch.Tensor) -> AutoScheme | QuantizationScheme:
    """AutoScheme at the budget, scored on all rows; or the one scheme of the job."""
    if job["schemes"] is None:
        return AutoScheme(
            avg_bits=bits,
            options=[_option(*option) for option in OPTIONS],
            nsamples=len(fit),
            seqlen=fit.shape[1],
        )
    schemes = {tuple(scheme.values()) for scheme in job["schemes"].values()}
    if len(schemes) != 1:
        raise SystemExit("AutoRound gets one scheme or chooses for itself; the job has several")
    return _option(*schemes.pop())


def _option(bits: int, group: int, symmetric: bool) -> QuantizationScheme:
    return QuantizationScheme(
        bits=bits, group_size=group, sym=symmetric, data_type="int", act_bits=16
    )


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "bits": config["bits"],
        "group_size": config["group_size"],
        "symmetric": config["sym"],
    }


if __name__ == "__main__":
    answer_job(quantize)
