"""What a model folder claims, held against what its files hold, before anything is built from it.

A folder may come from anyone. Sizes in config.json decide how much is built and allocated, so they
are compared with the files first. Code is never taken from a folder.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers import __version__ as transformers_version

from mxq.counted import counted
from mxq.models.files import check_links, checkpoint_files, read_json

_LAYERS = re.compile(r"^(n|num)_(\w+_)?(layers?|blocks?)$|^depths?$")
_EXPERTS = re.compile(r"^(n|num)_(\w+_)?experts$")
_SIZE = re.compile(r"_(size|dim|rank|heads)$|^(n|d)_(embd|inner|heads?|model|ff|kv|ctx)$")

LEAST_COUNT = 1024
"""Layers or experts that are built without looking for them in the files."""

LARGEST_SIZE = 2**31
"""No dimension of a model is that large."""

LEAST_BYTES = 2**30
"""Bytes that a model may need beside what its files hold."""


def check_folder(folder: Path) -> dict[str, str]:
    """The files of a model folder by tensor, as ``checkpoint_files`` gives them, once checked.

    Raises:
        ValueError: If the folder is incomplete, leaves itself or claims more than it holds.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: it is not a Hugging Face model folder")
    check_links(folder)
    files = checkpoint_files(folder)
    check_config(folder / "config.json", read_json(folder / "config.json"), files)
    return files


def check_config(path: Path, fields: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Raise ValueError for a configuration that needs code, or is larger than the files.

    ``keys`` are the names of the tensors in the files.
    """
    family = fields.get("model_type")
    if not isinstance(family, str) or family not in CONFIG_MAPPING:
        needs = "needs code of its own (auto_map)" if "auto_map" in fields else "is"
        raise ValueError(
            f"{path} cannot be read by transformers: it {needs} for model type {family!r}, which "
            f"transformers {transformers_version} does not know; install a version that does (mxq "
            "runs no code of a checkpoint)"
        )
    named = fields.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ValueError(f"{path} says architectures is {named!r}, expected a list of names")
    held = max(LEAST_COUNT, 4 * _longest_list(keys))
    for name, number in _integers(fields):
        limit = LARGEST_SIZE if _SIZE.search(name) else None
        # The name of a field tells what it counts; experts may be fused, so their limit is loose.
        limit = held if _LAYERS.search(name) else limit
        limit = 64 * held if _EXPERTS.search(name) else limit
        if limit is not None and abs(number) > limit:
            raise ValueError(
                f"{path} says {name} is {number}, and nothing in the model's files is that many; "
                "it was edited or damaged: download it again"
            )


def check_skeleton(folder: Path, held: Sequence[Tensor], made: Sequence[Tensor]) -> None:
    """Raise ValueError if a model on the meta device is larger than its files.

    ``held`` are its tensors that come from the files, ``made`` those that have to be made.
    """
    file_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    elements = sum(tensor.numel() for tensor in held)
    # A weight of a file has at least one bit.
    if elements > 8 * file_bytes:
        raise ValueError(
            f"{folder}/config.json describes {elements:,} weights, but the files have "
            f"{file_bytes:,} bytes; it is of another model, or damaged"
        )
    made_bytes = sum(tensor.numel() * tensor.element_size() for tensor in made)
    if made_bytes > max(LEAST_BYTES, file_bytes):
        raise ValueError(
            f"{folder}/config.json describes {made_bytes:,} bytes that no file holds; it is of "
            "another model, or damaged"
        )


def check_depth(
    folder: Path, keys: Iterable[str], layers_name: str, model: PreTrainedModel, layers: int
) -> None:
    """Raise ValueError if the files hold decoder layers that the configuration leaves out.

    Layers that predict further tokens are not part of the model, and transformers says so.
    """
    ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_unexpected or ()]
    layers += getattr(model.config.get_text_config(), "num_nextn_predict_layers", None) or 0
    numbered = re.compile(re.escape(layers_name) + r"\.(\d{1,9})\.")
    for key in keys:
        place = numbered.match(key)
        if place and int(place[1]) >= layers and not any(p.search(key) for p in ignored):
            raise ValueError(
                f"{folder}: the files hold layer {place[1]} ({key}), but config.json describes "
                f"{counted(layers, 'layer')}; num_hidden_layers there was edited, or is of "
                "another model"
            )


def check_parts(folder: Path, target: str, experts: int, keys: Sequence[str]) -> None:
    """Raise ValueError if fused experts are stored one by one, and not each of them."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "#", key) for key in keys)  # not the 1 of w1
    for pattern, count in counts.items():
        if max(counts.values()) > 1 and count != experts:
            raise ValueError(
                f"{folder}: {target} is made from {counted(count, 'tensor')} {pattern} in the "
                f"files, but config.json needs {experts}; the checkpoint is incomplete, or its "
                "config.json is of another model"
            )


def check_floating(folder: Path, key: str, stored: str) -> None:
    """Raise ValueError if a tensor is stored as signed integers; the type as in safetensors."""
    if stored in ("I8", "I16", "I32", "I64", "BOOL"):
        raise ValueError(
            f"{folder}: {key} is stored as {stored}, but mxq needs the original model in floating "
            "point"
        )


def non_persistent_buffers(model: nn.Module) -> list[Tensor]:
    """Buffers that no file holds."""
    return [
        module._buffers[name]  # type: ignore[misc]  # None is left out
        for module in model.modules()
        for name in module._non_persistent_buffers_set
        if module._buffers.get(name) is not None
    ]


def _longest_list(keys: Iterable[str]) -> int:
    """Members of the longest list of modules: numbers that follow the same path."""
    members: dict[str, set[str]] = defaultdict(set)
    for key in keys:
        parts = key.split(".")
        for place, part in enumerate(parts):
            if part.isdecimal():
                members[".".join(parts[:place])].add(part)
    return max(map(len, members.values()), default=0)


def _integers(value: object, name: str = "") -> Iterator[tuple[str, int]]:
    """All integers of a JSON value, each with the name of its field."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _integers(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from _integers(item, name)
    elif isinstance(value, int | float) and abs(value) >= LEAST_COUNT:
        yield name, int(value) if abs(value) < float("inf") else 2**63
