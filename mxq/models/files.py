"""The files of a model folder: which there are, that they are whole and that none lies elsewhere.

A folder may come from anyone. Names in an index and links decide what is read, so each is held
against the folder before a file is opened; and only safetensors and JSON are read, never pickle.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from safetensors import SafetensorError, safe_open

_WANTED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja")


def resolve_folder(model: str | Path, *, revision: str | None = None) -> Path:
    """Local folder of a model; a hub id is downloaded (safetensors and configuration only)."""
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"{model} is a folder, which has no --revision; leave it out")
        return path.resolve()
    if isinstance(model, Path) or str(model).startswith((".", "/", "~")) or path.exists():
        raise ValueError(f"{model} is not a folder; give a model folder or a hub id")
    try:
        return Path(snapshot_download(str(model), revision=revision, allow_patterns=list(_WANTED)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{model!r} is neither a local folder nor a model that the hub gives out: "
            f"{str(error).splitlines()[0]}"
        ) from error


def checkpoint_files(folder: Path) -> dict[str, str]:
    """``{tensor key: file name}`` of a safetensors checkpoint.

    Raises:
        ValueError: If there is none, the index is damaged, or a file is absent or truncated.
    """
    # transformers takes the single file first where both are there.
    single = folder / "model.safetensors"
    if single.is_file():
        with open_safetensors(single) as file:
            return dict.fromkeys(file.keys(), single.name)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return _indexed_files(index)
    raise ValueError(
        f"{folder} has no model.safetensors and no index; only safetensors are read "
        "(convert other formats with save_pretrained)"
    )


def check_links(folder: Path) -> None:
    """Raise ValueError if a file of the folder is a link to somewhere else.

    The hub's cache links a snapshot to its ``blobs``; those belong to the model.
    """
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and path.is_file() and not is_inside(folder, path):
            raise ValueError(
                f"{path} is a link to {path.resolve()}, outside of the folder; put the file itself "
                "there"
            )


def is_inside(folder: Path, path: Path) -> bool:
    """Whether a file of a model folder lies there, or in the blobs of a snapshot of the hub."""
    homes = [folder.resolve()]
    if homes[0].parent.name == "snapshots":
        homes.append(homes[0].parent.parent / "blobs")
    try:
        return any(path.resolve().is_relative_to(home) for home in homes)
    except (OSError, ValueError, RuntimeError):  # no path at all, or links in a circle
        return False


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: If it is not one.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is nested as no configuration is; download it again") from error
    except ValueError as error:
        why = str(error).partition(";")[0]  # the rest is about Python
        raise ValueError(f"{path} is not JSON: {why}; download it again") from error
    if isinstance(fields, dict):
        return fields
    raise ValueError(f"{path} holds no JSON object but a {type(fields).__name__}")


def open_safetensors(path: Path) -> Any:
    """An open file, to be used as a context.

    Raises:
        ValueError: If it is absent or not whole.
    """
    try:
        if not path.is_file():
            raise ValueError(f"{path} is named by the index but absent; the download is incomplete")
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a whole safetensors file: {error}; copy or download it again"
        ) from error


def tensor_lengths(path: Path) -> dict[str, int]:
    """Bytes of each tensor of a safetensors file, from its header."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return {
        key: entry["data_offsets"][1] - entry["data_offsets"][0] for key, entry in header.items()
    }


def _indexed_files(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is not a safetensors index: {error!r}") from error
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{index} is not a safetensors index: weight_map names no files")
    held: dict[str, set[str]] = {}
    for name in sorted(set(weight_map.values())):
        path = index.parent / name
        if Path(name).name != name or name in ("", "..") or not is_inside(index.parent, path):
            raise ValueError(f"{index} names {name!r}, which is outside the folder")
        with open_safetensors(path) as file:
            held[name] = set(file.keys())
    for key, name in weight_map.items():
        if key not in held[name]:
            raise ValueError(f"{index} says that {name} holds {key}, but it does not")
    return dict(weight_map)
