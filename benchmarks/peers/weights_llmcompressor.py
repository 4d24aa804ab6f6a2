"""llm-compressor: GPTQ of the job's linears, each with its own scheme; the weights it stores.

Run by the python of its own environment (requirements beside this file): a job (JSON) on the
standard input, a row to the file that the job names. The order of columns is "static", its best
setting and its default; everything else that the job does not name is at its default, too. The
model is in float32, so that scales are not rounded to bf16.
"""

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import Stopwatch, answer_job, fit_rows, save_weights, versions

BATCH_ROWS = 8


def quantize(job: dict[str, Any]) -> dict[str, Any]:
    """The row of a run."""
    fit = fit_rows(job)
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    linearize_moe(model)
    watch = Stopwatch()
    modifier = GPTQModifier(config_groups=_groups(job["schemes"]), actorder="static")
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": fit.tolist()}),
        recipe=modifier,
        max_seq_length=fit.shape[1],
        num_calibration_samples=len(fit),
        shuffle_calibration_samples=False,
        batch_size=BATCH_ROWS,
    )
    watch.step("calibrate and quantize")
    weights = {name: model.get_submodule(name).weight for name in job["schemes"]}
    save_weights(job, weights)
    schemes = {name: _stored(model.get_submodule(name)) for name in job["schemes"]}
    if schemes != job["schemes"]:
        wrong = [name for name in schemes if schemes[name] != job["schemes"][name]]
        raise SystemExit(
            f"{len(wrong)} linears have another scheme than they were to have, e.g. {wrong[0]}: "
            f"{schemes[wrong[0]]}, not {job['schemes'][wrong[0]]}"
        )
    return {
        "schemes": schemes,
        "settings": {
            "dtype": "float32",
            "actorder": "static",
            "samples": len(fit),
            "dampening_frac": modifier.dampening_frac,
            "block_size": modifier.block_size,
        },
        "quantize_s": watch.row()["total_s"],
        "versions": versions("llmcompressor", "compressed-tensors"),
    }


def _groups(schemes: dict[str, dict[str, Any]]) -> dict[str, QuantizationScheme]:
    """One group for each scheme, with the exact names of its linears."""
    names: dict[tuple[int, int | None, bool], list[str]] = defaultdict(list)
    for name, scheme in schemes.items():
        names[scheme["bits"], scheme["group_size"], scheme["symmetric"]].append(name)
    return {
        f"group_{at}": QuantizationScheme(targets=found, weights=_arguments(*scheme))
        for at, (scheme, found) in enumerate(names.items())
    }


def _arguments(bits: int, group: int | None, symmetric: bool) -> QuantizationArgs:
    strategy = "channel" if group is None else "group"
    return QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, group_size=group
    )


def _stored(linear: torch.nn.Module) -> dict[str, Any]:
    """The scheme that a linear has in the end."""
    scheme = getattr(linear, "quantization_scheme", None)
    if scheme is None:
        return {"bits": 16, "group_size": None, "symmetric": True}
    weights = scheme.weights
    group = weights.group_size if weights.strategy == "group" else None
    return {"bits": weights.num_bits, "group_size": group, "symmetric": weights.symmetric}


if __name__ == "__main__":
    answer_job(quantize)
