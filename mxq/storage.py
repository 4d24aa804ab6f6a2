"""Artifacts <-> disk: JSON with a kind, a version and a checksum, written whole or not at all.

Only dataclasses of plain values are stored, read back by their type hints; nothing is unpickled.
Every file of a run, tensors too, is written by ``write_whole``: under another name, flushed to
the disk, then renamed. A killed run leaves files that are whole, and temporaries that the next
run removes.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from mxq.json_values import decode
from mxq.scheme import Scheme

STORAGE_VERSION = 1

TEMPORARY_SUFFIX = ".mxq-part"
"""How the name of a folder ends whose files are not whole yet; it also starts with a dot."""

Artifact = TypeVar("Artifact")


def save_artifact(path: Path, artifact: object) -> None:
    """Write a dataclass as JSON; a reader sees the old file or the new one, never a part."""
    write_atomically(path, to_text(artifact))


def to_text(artifact: object) -> str:
    """The JSON document of a dataclass, with its kind, version and checksum."""
    content = _encode(artifact)
    document = {
        "kind": type(artifact).__name__,
        "version": STORAGE_VERSION,
        "sha256": _checksum(content),
        "content": content,
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def load_artifact(path: Path, kind: type[Artifact]) -> Artifact:
    """Read what ``save_artifact`` wrote.

    Raises:
        ValueError: If the file is absent, damaged, edited, of another kind or a newer version.
    """
    try:
        text = path.read_text()
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist; run the stage that makes it first") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not an mxq artifact: {error!r}") from error
    return from_text(text, kind, str(path))


def from_text(text: str, kind: type[Artifact], name: str) -> Artifact:
    """Inverse of ``to_text``; ``name`` says in messages where the text is from.

    Raises:
        ValueError: If the text is damaged, edited, of another kind or a newer version.
    """
    try:
        document = json.loads(text)
        content, found = document["content"], document["kind"]
        version, checksum = document["version"], document["sha256"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(
            f"{name} is not an mxq artifact: {error!r}; run its stage again"
        ) from error
    if found != kind.__name__ or version != STORAGE_VERSION:
        raise ValueError(
            f"{name} is {found} version {version}, expected {kind.__name__} version "
            f"{STORAGE_VERSION}; run its stage again"
        )
    if checksum != _checksum(content):
        raise ValueError(f"{name} was edited or damaged: its checksum differs; run its stage again")
    try:
        return decode(kind, content)
    except ValueError as error:
        raise ValueError(
            f"{name} lacks what this mxq needs ({error}); run its stage again"
        ) from error


def digest_of(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_whole(path, lambda temporary: temporary.write_text(text))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file in a hidden folder beside ``path``, flush it and move it there.

    The folder is there because safetensors writes under a random name beside the file it is given.

    Raises:
        OSError: If the disk does not take it; the old file stays, and no part of the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    room = path.with_name(f".write-{os.getpid()}-{path.name}{TEMPORARY_SUFFIX}")
    temporary = room / path.name
    try:
        room.mkdir(exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # what the user's umask gives; safetensors makes it 0600
        write(temporary)
        temporary.chmod(mode)
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        why = str(error).rpartition("I/O error: ")[2]  # safetensors says more words before
        raise OSError(
            f"{path} could not be written: {why}; what was finished before is kept: mend that and "
            "run the same command again"
        ) from error
    finally:
        shutil.rmtree(room, ignore_errors=True)


def move_whole(path: Path, target: Path) -> None:
    """Move a file, by way of a copy that is renamed where ``target`` is on another disk."""
    if path.stat().st_dev != target.parent.stat().st_dev:
        write_whole(target, lambda temporary: shutil.copyfile(path, temporary))
        path.unlink()
        return
    path.replace(target)
    _flush(target.parent)


def remove_temporaries(folder: Path) -> None:
    """Remove what killed runs left unfinished; for who alone writes to the folder."""
    for room in folder.glob(f".write-*{TEMPORARY_SUFFIX}"):
        shutil.rmtree(room, ignore_errors=True)


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(content: object) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return digest_of(text)


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
