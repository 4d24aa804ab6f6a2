"""Artifacts <-> disk: JSON with a kind, a version and a checksum, written whole or not at all.

Only dataclasses of plain values are stored, read back by their type hints; nothing is unpickled.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from mxq.scheme import Scheme

STORAGE_VERSION = 1

Artifact = TypeVar("Artifact")


def save_artifact(path: Path, artifact: object) -> None:
    """Write a dataclass as JSON; a reader sees the old file or the new one, never a part."""
    content = _encode(artifact)
    document = {
        "kind": type(artifact).__name__,
        "version": STORAGE_VERSION,
        "sha256": _checksum(content),
        "content": content,
    }
    write_atomically(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def load_artifact(path: Path, kind: type[Artifact]) -> Artifact:
    """Read what ``save_artifact`` wrote.

    Raises:
        ValueError: If the file is absent, damaged, edited, of another kind or a newer version.
    """
    try:
        document = json.loads(path.read_text())
        content, found = document["content"], document["kind"]
        version, checksum = document["version"], document["sha256"]
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist; run the stage that makes it first") from error
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not an mxq artifact: {error!r}") from error
    if found != kind.__name__ or version != STORAGE_VERSION:
        raise ValueError(
            f"{path} is {found} version {version}, expected {kind.__name__} version "
            f"{STORAGE_VERSION}; run its stage again"
        )
    if checksum != _checksum(content):
        raise ValueError(f"{path} was edited or damaged: its checksum differs; run its stage again")
    try:
        decoded = _decode(kind, content)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} lacks what this mxq needs ({error!r}); run its stage again"
        ) from error
    assert isinstance(decoded, kind)
    return decoded


def write_atomically(path: Path, text: str) -> None:
    """Write a text file by way of a temporary one in the same folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _checksum(content: object) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _encode(value: object) -> Any:
    if isinstance(value, Scheme):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_encode(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


def _decode(hint: Any, value: Any) -> Any:
    if hint is Any:
        return value
    if hint is Scheme:
        return Scheme.parse(value)
    if hint is float and isinstance(value, dict):
        return float(value["float"])
    if hint in (float, int, Path):
        return hint(value)
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        return cast(Any, hint)(
            **{f.name: _decode(hints[f.name], value[f.name]) for f in fields(hint)}
        )
    return _decode_generic(hint, value)


def _decode_generic(hint: Any, value: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        options = [option for option in arguments if option is not NoneType]
        return None if value is None else _decode(options[0], value)
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_decode(arguments[0], item) for item in value)
        return tuple(_decode(h, item) for h, item in zip(arguments, value, strict=True))
    if origin is not None and issubclass(origin, Mapping):
        return {key: _decode(arguments[1], item) for key, item in value.items()}
    return value
