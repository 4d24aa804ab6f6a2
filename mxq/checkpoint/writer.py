"""Write a checkpoint folder one layer at a time: a file for each layer, config.json last.

A folder without config.json is not a model to any tool, so an interrupted run leaves nothing that
could be mistaken for a result.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mxq.checkpoint.format import GUARD, CheckpointPlan
from mxq.models.files import tensor_lengths
from mxq.models.source import file_digest
from mxq.scheme import Scheme
from mxq.storage import remove_temporaries, write_atomically, write_whole

_COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja")
_OWN = ("config.json", "model.safetensors.index.json")
_NAMES_CODE = (
    "auto_map",
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
)
"""Fields of a configuration that name code to fetch and run: not passed on."""


class CheckpointWriter:
    """Collects the shards of a checkpoint and finishes it with its index and configuration."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._digests: dict[str, str] = {}

    def start(self, finished: Mapping[str, str]) -> None:
        """Remove the shards of an earlier run but for the finished ones, given with digests."""
        self._digests = {shard_file(name): digest for name, digest in finished.items()}
        remove_temporaries(self.folder)
        for name in _OWN:
            (self.folder / name).unlink(missing_ok=True)
        for path in self.folder.glob("*.safetensors"):
            if path.name not in self._digests:
                path.unlink()

    def add(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        """Write one shard; its SHA-256."""
        file = shard_file(name)
        plain = {key: tensors[key].detach().contiguous() for key in sorted(tensors)}
        write_whole(
            self.folder / file,
            lambda temporary: save_file(plain, temporary, metadata={"format": "pt"}),
        )
        self._digests[file] = file_digest(self.folder / file)
        return self._digests[file]

    def finish(
        self,
        source: Path,
        linears: Mapping[str, Scheme],
        experts: Mapping[str, Mapping[str, tuple[Scheme, ...]]],
        rotated: frozenset[str],
    ) -> int:
        """Write the index, the tokenizer's files and config.json; bytes of all tensors."""
        plan = CheckpointPlan(linears, experts, rotated, dict(sorted(self._digests.items())))
        total_bytes, weight_map = 0, {}
        for file in self._digests:
            for key, length in tensor_lengths(self.folder / file).items():
                weight_map[key] = file
                total_bytes += length
        index = {
            "metadata": {"total_size": total_bytes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        _write_json(self.folder / "model.safetensors.index.json", index)
        copy_companions(source, self.folder)
        config = _read_config(source)
        config["quantization_config"] = plan.to_json()
        config["transformers_weights"] = GUARD
        _write_json(self.folder / "config.json", config)
        return total_bytes


def copy_companions(source: Path, target: Path) -> None:
    """Copy the files of a model folder beside weights and configuration, such as a tokenizer's."""
    for pattern in _COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.name not in _OWN and not path.name.startswith("mxq"):
                _copy(path, target / path.name)


def shard_file(name: str) -> str:
    """File name of the shard of that name."""
    return f"model-{name}.safetensors"


def _read_config(source: Path) -> dict[str, Any]:
    """The configuration of a source without what is not true of its checkpoint."""
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    for field in _NAMES_CODE:
        config.pop(field, None)
    for part in config.values():
        if isinstance(part, dict):  # a language part may say how its source was quantized
            part.pop("quantization_config", None)
    return config


def _copy(path: Path, target: Path) -> None:
    write_whole(target, lambda temporary: shutil.copyfile(path, temporary))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=1, sort_keys=True) + "\n")
