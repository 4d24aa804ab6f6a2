"""NVIDIA Model-Optimizer: auto_quantize at the budget, with integer weight-only formats.

Run by the python of its own environment (requirements beside this file): a job (JSON) on the
standard input, a row to the file that the job names. The formats are its INT4_BLOCKWISE_WEIGHT_ONLY
with 2, 3, 4 and 8 bits (it has presets of 4 and 8 only), weights calibrated by its "mse" search,
and "do not quantize", which it always adds. AWQ is left out: it has none for fused experts.
``effective_bits`` of a format is what is stored, scales included.
"""

import copy
import sys
import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import answer_job, fit_rows, save_weights, versions

BITS = (2, 3, 4, 8)
GROUP = 128
SCALE_BITS = 16


def quantize(job: dict[str, Any]) -> dict[str, Any]:
    """The row of a run."""
    fit = fit_rows(job)
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.float32, experts_implementation="eager"
    ).eval()
    stay = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in job["modules"]
    ]
    started = time.perf_counter()
    model, search = mtq.auto_quantize(
        model,
        constraints={
            "effective_bits": job["bits"],
            "cost": {"excluded_module_name_patterns": stay},
        },
        quantization_formats=[_format(bits) for bits in BITS],
        data_loader=[{"input_ids": row[None]} for row in fit],
        forward_step=lambda model, batch: model(**batch, use_cache=False).logits,
        loss_func=_loss,
        disabled_layers=stay,
        num_calib_steps=len(fit),
        num_score_steps=len(fit),
        method="gradient",
    )
    seconds = time.perf_counter() - started
    found = dict(_linears(model, job["modules"]))
    save_weights(job, {name: w_NK for name, (w_NK, _) in found.items()})
    return {
        "schemes": {name: scheme for name, (_, scheme) in found.items()},
        "settings": {
            "dtype": "float32",
            "samples": len(fit),
            "formats": [f"int{bits} g{GROUP} symmetric" for bits in BITS],
            "algorithm": "mse",
            "method": "gradient",
            "effective_bits": float(search["best"]["constraints"]["effective_bits"]),
        },
        "quantize_s": seconds,
        "versions": versions("nvidia-modelopt"),
    }


def _format(bits: int) -> dict[str, Any]:
    """A preset of its own with another width."""
    found = copy.deepcopy(mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)
    for entry in found["quant_cfg"]:
        if fnmatchcase("weight_quantizer", entry["quantizer_name"]) and "cfg" in entry:
            entry["cfg"] |= {"num_bits": bits, "block_sizes": {-1: GROUP, "type": "static"}}
    return {**found, "algorithm": "mse", "effective_bits": bits + SCALE_BITS / GROUP}


def _loss(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(logits[0, :-1], batch["input_ids"][0, 1:])


def _linears(
    model: nn.Module, names: list[str]
) -> Iterator[tuple[str, tuple[Tensor, dict[str, Any]]]]:
    """``name of the linear -> (w_NK as it is stored, scheme)``; fused experts are taken apart."""
    for name in names:
        parent, _, projection = name.rpartition(".")
        experts_path, _, expert = parent.rpartition(".")
        if not expert.isdigit():
            linear = model.get_submodule(name)
            yield name, _stored(linear.weight, linear.weight_quantizer)
            continue
        experts, at = model.get_submodule(experts_path), int(expert)
        if projection == "down_proj":
            yield name, _stored(experts.down_proj[at], experts.down_proj_weight_quantizers[at])
            continue
        w_NK, scheme = _stored(experts.gate_up_proj[at], experts.gate_up_proj_weight_quantizers[at])
        yield name, (w_NK.chunk(2)[projection == "up_proj"], scheme)


@torch.no_grad()
def _stored(w_NK: Tensor, quantizer: nn.Module) -> tuple[Tensor, dict[str, Any]]:
    if not quantizer.is_enabled:
        return w_NK, {"bits": 16, "group_size": None, "symmetric": True}
    scheme = {
        "bits": quantizer.num_bits,
        "group_size": quantizer.block_sizes[-1],
        "symmetric": True,
    }
    return quantizer(w_NK), scheme


if __name__ == "__main__":
    answer_job(quantize)
