"""The models and the tokens of the benchmark, written to a folder where every tool reads them."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_memory import Case, make_config, write_checkpoint
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from mxq.demo import model_path
from mxq.profiling.calibration import CalibrationSet, load_calibration


@dataclass(frozen=True, slots=True)
class RandomShape:
    """A random mixture of experts: 10^9 bytes of bf16, layers, vocabulary."""

    gb: float = 2.0
    layers: int = 8
    vocabulary: int = 32000

    def write(self, folder: Path, seed: int) -> None:
        """Write the checkpoint, one shard for each layer."""
        case = Case(
            kind="moe",
            gb=self.gb,
            layers=self.layers,
            samples=0,
            seqlen=0,
            vocabulary=self.vocabulary,
            quantizer="",
            schemes="",
            sensitivity="",
            memory="",
            bits=0.0,
            rotation="",
            guard=False,
            seed=seed,
        )
        write_checkpoint(make_config(case), case, folder)


def small_model(name: str) -> Path:
    """The folder of a model; the embedded one for ``demo``."""
    folder = model_path() if name == "demo" else Path(name).resolve()
    if not (folder / "config.json").is_file():
        raise SystemExit(f"{name} holds no config.json; give a model folder, or demo")
    return folder


def about_model(folder: Path) -> dict[str, Any]:
    """Name, family and number of parameters, from the headers of the files."""
    config: Mapping[str, Any] = json.loads((folder / "config.json").read_text())
    parameters = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  (not a dict)
                shape = file.get_slice(key).get_shape()
                parameters += int(torch.Size(shape).numel())
    return {"name": folder.name, "family": config["model_type"], "parameters": parameters}


def text_ids(folder: Path, calibration: str, samples: int, seqlen: int, seed: int) -> Tensor:
    """Windows of text; one more for every eight samples, which mxq holds out."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = samples * 9 // 8
    found = load_calibration(
        calibration, tokenizer, samples=rows, seqlen=seqlen, seed=seed, disjoint=True
    )
    return found.input_ids


def random_ids(vocabulary: int, samples: int, seqlen: int, seed: int) -> Tensor:
    """Ids without meaning, for a model without one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (samples * 9 // 8, seqlen), generator=generator)


def save_tokens(ids: Tensor, path: Path) -> None:
    """Write all rows, and apart those that are fitted to and those that mxq holds out of them.

    The runner of mxq checks that mxq has split them so.
    """
    whole = CalibrationSet(ids, ("own data",) * len(ids), "own data")
    fit, heldout = whole.split(max(1, len(ids) // 9))
    parts = {"all": ids, "fit": fit.input_ids, "heldout": heldout.input_ids}
    save_file({name: part.contiguous() for name, part in parts.items()}, path)


def forget_pages(folder: Path) -> None:
    """Ask the system to drop the files of a model from its page cache, so that they are read."""
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
