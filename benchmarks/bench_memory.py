"""Memory benchmark: quantize a random checkpoint larger than memory and watch the resident set.

    python benchmarks/bench_memory.py --gb 16 --layers 40 --kind moe --folder FOLDER

Writes a checkpoint of that size shard by shard, says what disk the run will take, then runs
``mxq.quantize`` in a child process while this one samples the child's resident memory ten times a
second, and what it holds on disk: files in its folders, and files without a name that it maps.
Everything is deleted at the end but the result.
"""

import argparse
import contextlib
import itertools
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from mxq.config import (
    AllocateOptions,
    CalibrationOptions,
    MeasureOptions,
    ModelOptions,
    OutputOptions,
    QuantizeOptions,
    ResourceOptions,
    parse_size,
)
from mxq.machine import Machine
from mxq.pipeline import run_quantize
from mxq.resources import Needs
from mxq.scheme import parse_schemes

RESULTS = Path(__file__).parent / "results"
SAMPLE_SECONDS = 0.1
SAMPLES_PER_LOOK_AT_DISK = 10

KINDS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "moe": (
        "mixtral",
        {
            "hidden_size": 2048,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
        },
    ),
    "dense": (
        "llama",
        {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8},
    ),
}
"""Family and fields by kind; the intermediate size follows from the size asked for."""


@dataclass(frozen=True, slots=True)
class Case:
    """One checkpoint and how it is quantized."""

    kind: str
    gb: float
    layers: int
    samples: int
    seqlen: int
    vocabulary: int
    quantizer: str
    schemes: str
    sensitivity: str
    memory: str
    bits: float
    rotation: str
    guard: bool
    seed: int


def main() -> None:
    """Run one case and write its result."""
    arguments = vars(make_parser().parse_args())
    folder, output, keep = (arguments.pop(name) for name in ("folder", "output", "keep"))
    case = Case(**arguments)
    room = Path(tempfile.mkdtemp(prefix="mxq-bench-", dir=folder))
    try:
        result = run(case, room)
    finally:
        if not keep:
            shutil.rmtree(room, ignore_errors=True)
    path = output or RESULTS / f"memory-{case.kind}-{case.gb:g}gb-{case.layers}l.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")


def make_parser() -> argparse.ArgumentParser:
    """The options of a case, and of the run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=sorted(KINDS), default="moe")
    parser.add_argument("--gb", type=float, default=16.0, help="weights in 10^9 bytes of bf16")
    numbers = {"layers": 40, "samples": 4, "seqlen": 128, "vocabulary": 32000, "seed": 0}
    for name, number in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--bits", type=float, default=6.0)
    parser.add_argument("--quantizer", default="rtn")
    parser.add_argument("--schemes", default="w4a16_g128_asym,fp8")
    parser.add_argument("--sensitivity", default="fisher")
    parser.add_argument("--memory", default="64MiB", help="limit of activations in memory")
    parser.add_argument("--rotation", default="off", help="auto tries every layer both ways")
    parser.add_argument("--guard", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--folder", type=Path, default=None, help="where there is room")
    parser.add_argument("--output", type=Path, default=None, help="JSON file; default in results/")
    parser.add_argument("--keep", action="store_true", help="do not delete the checkpoint")
    return parser


def run(case: Case, room: Path) -> dict[str, Any]:
    """The figures of one case."""
    config = make_config(case)
    started = time.monotonic()
    written = write_checkpoint(config, case, room / "model")
    print(f"wrote {written / 1e9:.2f} GB in {time.monotonic() - started:.0f} s", flush=True)
    watch = watch_child(case, room)
    peak = max(stage["peak_rss_bytes"] for stage in watch["stages"])
    print(f"peak {peak / 2**30:.2f} GiB", flush=True)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "case": asdict(case),
        "model": {
            "family": config.model_type,
            "checkpoint_bytes": written,
            "parameters": written // 2,
            "config": {k: v for k, v in config.to_dict().items() if isinstance(v, int | float)},
        },
        "machine": {
            "processor": platform.machine(),
            "cores": psutil.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_bytes": psutil.virtual_memory().total,
        },
        "versions": {name: version(name) for name in ("torch", "transformers", "safetensors")},
        "peak_rss_bytes": peak,
        **watch,
    }


def make_config(case: Case) -> PreTrainedConfig:
    """A configuration whose decoder layers and embeddings come to the size asked for."""
    family, fields = KINDS[case.kind]
    fixed = {
        **fields,
        "vocab_size": case.vocabulary,
        "num_hidden_layers": case.layers,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    hidden = fixed["hidden_size"]
    per_layer = (case.gb * 1e9 / 2 - 2 * case.vocabulary * hidden) / case.layers
    attention = 2.5 * hidden**2
    inner = (per_layer - attention) / (3 * hidden * fixed.get("num_local_experts", 1))
    return CONFIG_MAPPING[family](**fixed, intermediate_size=max(128, round(inner / 128) * 128))


def write_checkpoint(config: PreTrainedConfig, case: Case, folder: Path) -> int:
    """Write random weights of a layer at a time, under the names of the hub; bytes in all."""
    folder.mkdir(parents=True)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    groups: dict[str, list[str]] = {}
    for name in shapes:
        part = name.split(".")
        group = f"layer-{int(part[2]):05d}" if part[1] == "layers" else "outside"
        groups.setdefault(group, []).append(name)
    generator = torch.Generator().manual_seed(case.seed)
    weight_map: dict[str, str] = {}
    total = 0
    for group, names in sorted(groups.items()):
        tensors: dict[str, torch.Tensor] = {}
        for name in names:
            tensors |= hub_tensors(name, shapes[name], generator)
        file = f"model-{group}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures = [type(skeleton).__name__]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    return total


def hub_tensors(
    name: str, shape: tuple[int, ...], generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Random values of a parameter; fused experts as the one tensor per expert of the hub."""
    if len(shape) == 1:
        return {name: torch.ones(shape, dtype=torch.bfloat16)}
    if "experts" not in name:
        name = name.replace(".mlp.gate.", ".block_sparse_moe.gate.")
        return {name: noise(shape, generator)}
    experts, rows, columns = shape
    base = name.rpartition(".")[0].replace(".mlp.", ".block_sparse_moe.")
    parts = ("w1", "w3") if name.endswith("gate_up_proj") else ("w2",)
    return {
        f"{base}.{expert}.{part}.weight": noise((rows // len(parts), columns), generator)
        for expert in range(experts)
        for part in parts
    }


def noise(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Uniform values, which are made quickly, with the spread of a usual initialization."""
    values = torch.rand(shape, generator=generator).sub_(0.5)
    return values.mul_(3.5 / shape[-1] ** 0.5).to(torch.bfloat16)


def watch_child(case: Case, room: Path) -> dict[str, Any]:
    """Run the quantization in a child and sample it; peaks by stage, disk said and taken."""
    request = {**asdict(case), "room": str(room)}
    started = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, __file__, "--child", json.dumps(request)],
        stdout=subprocess.PIPE,
        text=True,
    )
    outcome: dict[str, Any] = {}
    stated: dict[str, Any] = {}
    sampler = Sampler(child.pid, room)
    assert child.stdout is not None
    for line in child.stdout:
        event = json.loads(line) if line.startswith("{") else {"text": line.rstrip()}
        if "text" in event:
            print(event["text"], flush=True)
            continue
        if "stated" in event:
            stated = event
            print(f"stated: {json.dumps(event)}", flush=True)
            continue
        if "outcome" in event:
            outcome = event["outcome"]
        sampler.enter(event.get("stage", "end"))
    status = child.wait()
    stages = sampler.stop()
    if status != 0:
        raise SystemExit(f"the quantization ended with status {status}")
    return {
        "seconds": round(time.monotonic() - started, 1),
        "stages": stages,
        **stated,
        "stated_disk_bytes": sum(stated["stated"]["disk_bytes"].values()),
        "stated_memory_bytes": sum(stated["stated"]["memory_bytes"].values()),
        "measured_disk_bytes": sampler.peak_disk,
        "outcome": outcome,
    }


class Sampler:
    """Reads the resident set of a process ten times a second, and says its peak by stage."""

    def __init__(self, pid: int, room: Path) -> None:
        self.process, self.room = psutil.Process(pid), room
        self.stage, self.peaks = "", dict[str, int]()
        self.seconds: dict[str, float] = defaultdict(float)
        self.peak_disk = 0
        self.enter("start")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def enter(self, stage: str) -> None:
        """A stage begins, or goes on where it was left."""
        if stage != self.stage:
            self.stage = stage
            self.peaks.setdefault(stage, 0)
            print(f"{time.strftime('%H:%M:%S')} {stage}", flush=True)

    def stop(self) -> list[dict[str, Any]]:
        """Seconds and peak of each stage."""
        self._ended.set()
        self._thread.join()
        return [
            {"stage": name, "seconds": round(self.seconds[name], 1), "peak_rss_bytes": peak}
            for name, peak in self.peaks.items()
        ]

    def _sample(self) -> None:
        last = time.monotonic()
        for sample in itertools.count():
            if self._ended.wait(SAMPLE_SECONDS):
                return
            try:
                resident = self.process.memory_info().rss
                if sample % SAMPLES_PER_LOOK_AT_DISK == 0:
                    self.peak_disk = max(self.peak_disk, self._disk_bytes())
            except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                return
            self.peaks[self.stage] = max(self.peaks[self.stage], resident)
            now = time.monotonic()
            self.seconds[self.stage] += now - last
            last = now

    def _disk_bytes(self) -> int:
        """Bytes of the files in the output and work folder, and of mapped files without a name."""
        held = 0
        for path in (self.room / "out").rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                held += path.stat().st_size if path.is_file() else 0
        for line in Path(f"/proc/{self.process.pid}/maps").read_text().splitlines():
            if str(self.room) in line and line.endswith("(deleted)"):
                start, stop = line.split(" ", 1)[0].split("-")
                held += int(stop, 16) - int(start, 16)
        return held


def child(request: Mapping[str, Any]) -> None:
    """In the child process: quantize, and tell the parent of every stage."""
    room = Path(request["room"])
    rows = int(request["samples"]) * 9 // 8 + 1
    generator = torch.Generator().manual_seed(int(request["seed"]))
    ids = torch.randint(request["vocabulary"], (rows, request["seqlen"]), generator=generator)

    def report(stage: str, step: str, done: int, total: int) -> None:
        print(json.dumps({"stage": f"{stage}: {step}"}), flush=True)

    def announce(needs: Needs, found: Machine) -> None:
        print(json.dumps({"stated": asdict(needs), "free": asdict(found)}), flush=True)

    options = QuantizeOptions(
        ModelOptions(str(room / "model")),
        AllocateOptions(bits=request["bits"]),
        OutputOptions(room / "out", guard=request["guard"]),
        CalibrationOptions("random ids", request["samples"], request["seqlen"], expert_floor=0),
        MeasureOptions(
            parse_schemes(request["schemes"]),
            request["sensitivity"],
            request["quantizer"],
            request["rotation"],
        ),
        ResourceOptions(parse_size(request["memory"])),
    )
    result = run_quantize(options, data=ids, report=report, announce=announce)
    outcome = {
        "written": result.written,
        "bits": {name: plan.bits_per_weight for name, plan in result.plans.items()},
        "kl": {name: loss.kl for name, loss in result.losses.items()},
        "tensor_bytes": {name: pack.tensor_bytes for name, pack in result.packs.items()},
        "peak_rss_bytes": peak_of_kernel(),
    }
    print(json.dumps({"outcome": outcome}), flush=True)


def peak_of_kernel() -> int:
    """The largest resident set of this process by the kernel's own count."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def commit() -> str:
    """The commit of the working tree, marked if files other than results were changed."""
    git = ["git", "-C", str(Path(__file__).parent)]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = [
        *git,
        "status",
        "--porcelain",
        "-uno",
        "--",
        ":/",
        ":(top,exclude)benchmarks/results",
    ]
    dirty = subprocess.run(changed, capture_output=True, text=True)
    return found.stdout.strip() + ("+" if dirty.stdout.strip() else "")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]))
    else:
        main()
