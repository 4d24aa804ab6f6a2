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
from mxq.models.source import file_digest
from mxq.scheme import Scheme

_COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja")
_OWN = ("config.json", "model.safetensors.index.json")


class CheckpointWriter:
    """Collects the shards of a checkpoint and finishes it with its index and configuration."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._keys: dict[str, str] = {}
        self._total_bytes = 0

    def add(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one shard."""
        file = f"model-{name}.safetensors"
        plain = {key: tensors[key].detach().contiguous() for key in sorted(tensors)}
        save_file(plain, self.folder / file, metadata={"format": "pt"})
        for key, tensor in plain.items():
            self._keys[key] = file
            self._total_bytes += tensor.numel() * tensor.element_size()

    def finish(
        self,
        source: Path,
        linears: Mapping[str, Scheme],
        experts: Mapping[str, Mapping[str, tuple[Scheme, ...]]],
        rotated: frozenset[str],
    ) -> int:
        """Write the index, the tokenizer's files and config.json; bytes of all tensors."""
        files = {name: file_digest(self.folder / name) for name in sorted(set(self._keys.values()))}
        plan = CheckpointPlan(linears, experts, rotated, files)
        index = {
            "metadata": {"total_size": self._total_bytes},
            "weight_map": dict(sorted(self._keys.items())),
        }
        _write_json(self.folder / "model.safetensors.index.json", index)
        for pattern in _COMPANIONS:
            for path in sorted(source.glob(pattern)):
                if path.name not in _OWN and not path.name.startswith("mxq"):
                    shutil.copyfile(path, self.folder / path.name)
        config: dict[str, Any] = json.loads((source / "config.json").read_text())
        config["quantization_config"] = plan.to_json()
        config["transformers_weights"] = GUARD
        _write_json(self.folder / "config.json", config)
        return self._total_bytes


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
