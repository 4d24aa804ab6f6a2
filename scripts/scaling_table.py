"""What two large models need, by the arithmetic of ``mxq.resources``: tables of docs/scaling.md.

    python scripts/scaling_table.py [--same-speeds]

Builds module trees without weights from the dimensions in the models' published config.json, and
counts. Speeds are those of this machine, kept with the date in benchmarks/results/scaling.json, or
with ``--same-speeds`` those in that file. No weight is read and no model is fetched.
"""

import argparse
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from mxq.choices import measure_settings
from mxq.config import CalibrationOptions, MeasureOptions, ResourceOptions
from mxq.machine import Rates, measure_rates
from mxq.models.adapter import ModelAdapter
from mxq.models.skeleton import build_skeleton, find_decoder_layers
from mxq.models.source import ModelSource
from mxq.quantizers.choose import BATCH_BYTES
from mxq.resources import FLOAT_BYTES, Needs, Workload, estimate, sizes_of, workload

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "scaling.json"
BITS = 3.25
GPU_OPERATIONS_PER_SECOND = 67e12
"""NVIDIA's figure for float32 on an H100 SXM (data sheet); no run reaches it."""

ABOUT = ("date", "machine", "threads", "versions")
PROCESSES = (1, 8)

MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Qwen3-235B-A22B": (
        "qwen3_moe",
        {
            "hidden_size": 4096,
            "num_hidden_layers": 94,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "vocab_size": 151936,
        },
    ),
    "DeepSeek-V3": (
        "deepseek_v3",
        {
            "hidden_size": 7168,
            "num_hidden_layers": 61,
            "first_k_dense_replace": 3,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "n_shared_experts": 1,
            "n_group": 8,
            "topk_group": 4,
            "vocab_size": 129280,
        },
    ),
}


@dataclass(frozen=True, slots=True)
class Unread:
    """Stands in for a source whose files are not here: two bytes a weight, all of them stored."""

    model: PreTrainedModel
    layers_name: str
    layers: tuple[nn.Module, ...]
    folder: Path = field(default_factory=Path)
    files: Mapping[str, str] = field(default_factory=dict)

    def layer_path(self, layer: int) -> str:
        """Path of a decoder layer in the module tree."""
        return f"{self.layers_name}.{layer}"

    def stored_dtype(self, target: str) -> torch.dtype:
        """As published, but that DeepSeek-V3's blocks are in fp8."""
        return torch.bfloat16

    def is_stored(self, target: str) -> bool:
        """Everything is."""
        return True


def main() -> None:
    """Print the table and write the file that it is from."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--same-speeds", action="store_true", help="those in the results file")
    if parser.parse_args().same_speeds:
        kept = json.loads(RESULT.read_text())
        about = {name: kept[name] for name in ABOUT}
        rates = Rates(**kept["rates"])
    else:
        rates = measure_rates()
        about = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("torch", "transformers")},
        }
    found: dict[str, Any] = {}
    on_gpus: dict[str, GPUNeeds] = {}
    for name, (family, fields) in MODELS.items():
        adapter = ModelAdapter(cast(ModelSource, unread(family, fields)))
        for processes in PROCESSES:
            needs = needs_of(adapter, processes, rates)
            found[f"{name}, {processes}"] = asdict(needs)
            on_gpus[f"{name} | {processes}"] = gpu_needs_of(adapter, processes)
            print(row(name, processes, needs))
    for name, gpu_needs in on_gpus.items():
        print(gpu_row(name, gpu_needs))
    result = {
        **about,
        "rates": asdict(rates),
        "bits": BITS,
        "calibration": asdict(CalibrationOptions()),
        "needs": found,
        "gpu_operations_per_second": GPU_OPERATIONS_PER_SECOND,
        "on_gpus": {name.replace(" |", ","): asdict(needs) for name, needs in on_gpus.items()},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


def unread(family: str, fields: Mapping[str, Any]) -> Unread:
    """A model of those dimensions, without weights."""
    model = build_skeleton(CONFIG_MAPPING[family](**fields), torch.float32)
    return Unread(model, *find_decoder_layers(model))


def needs_of(adapter: ModelAdapter, processes: int, rates: Rates) -> Needs:
    """Of ``mxq quantize`` with its defaults, shared by that many processes."""
    sizes = sizes_of(adapter)
    stored = 2 * (sum(sizes.layer_elements) + sizes.outside_elements)
    work = replace(default_workload(adapter), processes=processes)
    return estimate(replace(sizes, stored_bytes=stored), work, rates)


def default_workload(adapter: ModelAdapter) -> Workload:
    """Of ``mxq quantize`` with its defaults."""
    settings = measure_settings(adapter, MeasureOptions(), None)
    return workload(CalibrationOptions(), settings, ResourceOptions(), plans=2, bits=BITS)


@dataclass(frozen=True, slots=True)
class GPUNeeds:
    """Of one GPU and its process; ``operations`` are those of matrix products, all stages."""

    gpu_bytes: int
    host_bytes: int
    operations: float


def gpu_needs_of(adapter: ModelAdapter, processes: int) -> GPUNeeds:
    """Memory is that of the list in docs/scaling.md; operations are those that ``estimate`` counts.

    On the GPU: embeddings and head, the largest layer and what quantizing takes, the outputs of the
    embeddings twice, one matrix's inputs, one batch. On the host: a fused parameter and its parts
    while they are merged, and the kept activations.
    """
    sizes, work = sizes_of(adapter), default_workload(adapter)
    counted = needs_of(adapter, processes, Rates(1.0, 1e30, 1e30))  # a second is an operation
    parts = counted.memory_bytes
    widest = max(block.in_features for layer in sizes.blocks for block in layer)
    fused = 2 * FLOAT_BYTES * max(sizes.layer_elements) // 3
    outputs = FLOAT_BYTES * work.tokens * (2 * sizes.hidden + widest)
    on_gpu = ("largest layer", "one batch in it")
    host = ("Python and libraries", "freed memory, kept for reuse", "kept activations")
    return GPUNeeds(
        FLOAT_BYTES * sizes.outside_elements
        + sum(parts[name] for name in on_gpu)
        + BATCH_BYTES
        + outputs,
        sum(parts[name] for name in host) + 2 * fused,
        sum(counted.seconds.values()),
    )


def gpu_row(name: str, needs: GPUNeeds) -> str:
    """One line of the table for GPUs in Markdown."""
    hours = needs.operations / GPU_OPERATIONS_PER_SECOND / 3600
    gib = f"{needs.gpu_bytes / 2**30:,.0f} GiB | {needs.host_bytes / 2**30:,.0f} GiB"
    return f"| {name} | {gib} | {needs.operations / 1e18:,.1f} | {hours:,.1f} h |"


def row(name: str, processes: int, needs: Needs) -> str:
    """One line of the table in Markdown."""
    memory, disk = sum(needs.memory_bytes.values()), sum(needs.disk_bytes.values())
    layer = needs.memory_bytes["largest layer"]
    hours = sum(needs.seconds.values()) / 3600
    cells = [f"{count / 2**30:,.0f} GiB" for count in (layer, memory, processes * memory, disk)]
    return f"| {name} | {processes} | {' | '.join(cells)} | {hours:,.0f} h |"


if __name__ == "__main__":
    main()
