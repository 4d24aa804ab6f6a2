"""The folder that an export writes: under another name until it is whole, config.json last."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mxq.checkpoint.writer import copy_companions
from mxq.locks import LOCK, hold
from mxq.machine import free_disk
from mxq.models.files import read_json
from mxq.storage import TEMPORARY_SUFFIX, move_whole, write_atomically, write_whole

_REPLACED = (
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*", "mxq_*.json"),
    *("generation_config.json", "quantize_config.json", "quant_config.json", "adapter_config.json"),
    *("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "chat_template.*"),
)
"""What --overwrite removes: all that says something of an earlier checkpoint."""


def check_destination(source: Path, destination: Path, *, overwrite: bool) -> None:
    """Raise ValueError if an export would spoil something."""
    inside, outside = source.resolve(), destination.resolve()
    if destination.exists() and not destination.is_dir():
        raise ValueError(f"{destination} is a file; give a folder to write")
    if outside == inside or outside.is_relative_to(inside):
        raise ValueError(
            f"{destination} is the checkpoint's own folder or inside of it; give another"
        )
    if inside.is_relative_to(outside):
        raise ValueError(f"{destination} holds the checkpoint {source}; give another folder")
    taken = sorted(destination.iterdir()) if destination.is_dir() and not overwrite else []
    if taken:
        raise ValueError(
            f"{destination} is not empty (it holds {taken[0].name}); choose another folder, or "
            "allow --overwrite"
        )


def check_disk(destination: Path, needed_bytes: int) -> None:
    """Raise ValueError if the disk of a folder that may not exist yet lacks room."""
    free = free_disk(destination.resolve())
    if needed_bytes > free:
        raise ValueError(
            f"the export needs {needed_bytes:,} bytes and {free:,} are free for {destination}; "
            "choose another disk, or make room"
        )


@contextmanager
def whole_folder(destination: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``destination`` at the end, or goes if that is not reached.

    It lies beside the destination and is held as long as it exists, so that one export at a time
    writes there. What killed exports left beside the destination is removed. An old checkpoint
    stays until the new one is whole; then its configuration goes first.

    Raises:
        ValueError: If another export to the destination is at work.
    """
    target = destination.resolve()
    part = target.with_name(f".{target.name}{TEMPORARY_SUFFIX}")
    try:
        with hold(part, at=f"an export to {destination}", instead="another folder to write"):
            _remove_left(target.parent)
            yield from _filled(part, target)
    finally:
        # Another export to the same folder may hold it by now; then it is not empty.
        with suppress(OSError):
            part.rmdir()


def _filled(part: Path, target: Path) -> Iterator[Path]:
    try:
        _empty(part)
        yield part
        _move(part, target)
    finally:
        _empty(part)


def _remove_left(parent: Path) -> None:
    """Remove the folders of killed exports; one that a process still holds is left alone."""
    for folder in parent.glob(f".*{TEMPORARY_SUFFIX}"):
        if not (folder / LOCK).is_file():
            continue
        with suppress(ValueError), hold(folder, at=str(folder), instead="another"):
            _empty(folder)
        with suppress(OSError):  # it is not empty while it is held
            folder.rmdir()


def _empty(part: Path) -> None:
    """Remove all but the lock."""
    for path in part.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK:
            path.unlink()


class FolderWriter:
    """Numbered shards, then everything else; the tensors' bytes and names are counted."""

    def __init__(self, folder: Path, files: int) -> None:
        self.folder, self.files = folder, files
        self.total_bytes = 0
        self._weight_map: dict[str, str] = {}

    def add(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write one shard, counted from 0."""
        file = f"model-{number + 1:05d}-of-{self.files:05d}.safetensors"
        plain = {name: tensors[name].contiguous() for name in sorted(tensors)}
        write_whole(
            self.folder / file, lambda path: save_file(plain, path, metadata={"format": "pt"})
        )
        twice = sorted(self._weight_map.keys() & plain.keys())
        if twice:
            raise ValueError(f"{twice[0]} is in two files of the checkpoint; it was edited")
        self._weight_map |= dict.fromkeys(plain, file)
        self.total_bytes += sum(tensor.nbytes for tensor in plain.values())

    def finish(self, source: Path, quantization_config: Mapping[str, Any] | None) -> None:
        """Write the index, the tokenizer's files and config.json."""
        index = {
            "metadata": {"total_size": self.total_bytes},
            "weight_map": dict(sorted(self._weight_map.items())),
        }
        _write_json(self.folder / "model.safetensors.index.json", index)
        copy_companions(source, self.folder)
        config = read_json(source / "config.json")
        # Both are about mxq's own checkpoint; the second makes other tools stop.
        for field in ("quantization_config", "transformers_weights"):
            config.pop(field, None)
        if quantization_config is not None:
            config["quantization_config"] = dict(quantization_config)
        _write_json(self.folder / "config.json", config)


def _move(part: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").unlink(missing_ok=True)
    for pattern in _REPLACED:
        for stale in target.glob(pattern):
            stale.unlink()
    page = target / "report.html"
    if page.is_file() and b"mxq" in page.read_bytes():
        page.unlink()  # about the earlier checkpoint; README.md is replaced by the new card
    paths = [path for path in part.iterdir() if path.name != LOCK]
    for path in sorted(paths, key=lambda path: (path.name == "config.json", path.name)):
        move_whole(path, target / path.name)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=1) + "\n")
