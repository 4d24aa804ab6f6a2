"""Activations in memory up to a limit, the rest in files that are read as memory maps.

A tensor on the host keeps its values, its identity and its type; beyond the limit only the place
of its values changes. Of a tensor on a GPU its copy on the host is kept: one layer's inputs, let
alone those of all layers, need not fit there. The files have no name from the start, so nothing
is left behind by a run that fails, is interrupted or is killed: their space is freed with the last
tensor that reads them.
"""

import ctypes
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

COLD_SHARE = 0.5
"""Part of the limit that cold tensors may take: they are read once, so a file costs them least."""

SPAN_BYTES = 64 * 2**20
"""Bytes of a file that are resident at a time while rows are gathered from it."""


@dataclass(slots=True)
class _Map:
    """A mapped file: its bytes, and the version of its tensor when the file was written."""

    nbytes: int
    version: int


class ActivationStore:
    """Keeps tensors in memory up to ``limit_bytes``, the others in files under ``folder``.

    ``limit_bytes`` None keeps all of them in memory. ``peak_memory_bytes``, ``disk_bytes`` and
    ``peak_disk_bytes`` say what was and is in use.
    """

    def __init__(self, limit_bytes: int | None = None, folder: Path | None = None) -> None:
        self.limit_bytes, self.folder = limit_bytes, folder
        self.memory_bytes = self.peak_memory_bytes = 0
        self.disk_bytes = self.peak_disk_bytes = 0
        self._held: set[int] = set()
        self._maps: dict[int, _Map] = {}

    def keep(self, tensor: Tensor, *, cold: bool = False) -> Tensor:
        """The same tensor, its values in memory or in a file; views made before stay in memory.

        Of a tensor that is not on the host, its copy there, without a graph. ``cold``: it is read
        once or twice, later, so it leaves memory to the others.
        """
        tensor = tensor if is_on_host(tensor) else tensor.detach().cpu()
        place = _address(tensor)
        if place in self._held or place in self._maps or tensor.numel() == 0:
            return tensor
        if not tensor.is_contiguous():
            tensor.data = tensor.detach().contiguous()  # one layout, in memory and on disk
        if self._fits(tensor.nbytes, cold):
            self._hold(tensor)
        else:
            with _file(self.folder) as file:
                _write(file.fileno(), tensor)
                tensor.data = self._map(file.fileno(), tensor.dtype, tuple(tensor.shape))
            self._maps[_address(tensor)].version = tensor._version
        return tensor

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """The pieces one after the other along their first dimension, kept."""
        if len(pieces) == 1:
            return self.keep(pieces[0])
        shape = (sum(len(piece) for piece in pieces), *pieces[0].shape[1:])
        nbytes = sum(piece.nbytes for piece in pieces)
        if nbytes == 0 or self._fits(nbytes, cold=False):
            return self.keep(torch.cat(list(pieces)))
        with _file(self.folder) as file:
            for piece in pieces:
                _write(file.fileno(), piece)
                self.release(piece)
            return self._map(file.fileno(), pieces[0].dtype, shape)

    def release(self, tensor: Tensor) -> None:
        """Give back the memory that reading a tensor's file took; nothing for one in memory."""
        entry = self._maps.get(_address(tensor))
        # A tensor that was written to since differs from its file and must stay.
        if entry is not None and tensor._version == entry.version:
            _drop_pages(_address(tensor), entry.nbytes)

    def rows(self, tensor: Tensor, rows: Tensor) -> Tensor:
        """``tensor[rows]`` for ascending rows, with little of a file in memory at a time."""
        if _address(tensor) not in self._maps or len(rows) == 0:
            return tensor[rows]
        found = tensor.new_empty(len(rows), *tensor.shape[1:])
        for start, stop in _spans(tensor, rows):
            found[start:stop] = tensor[rows[start:stop]]
            self.release(tensor)
        return found

    def is_on_disk(self, tensor: Tensor) -> bool:
        """Whether the values are in a file."""
        return _address(tensor) in self._maps

    def _fits(self, nbytes: int, cold: bool) -> bool:
        if self.limit_bytes is None:
            return True
        return self.memory_bytes + nbytes <= self.limit_bytes * (COLD_SHARE if cold else 1)

    def _hold(self, tensor: Tensor) -> None:
        place, nbytes = _address(tensor), tensor.nbytes
        self._held.add(place)
        self.memory_bytes += nbytes
        self.peak_memory_bytes = max(self.peak_memory_bytes, self.memory_bytes)

        def forget() -> None:
            self._held.discard(place)
            self.memory_bytes -= nbytes

        weakref.finalize(tensor.untyped_storage(), forget).atexit = False

    def _map(self, descriptor: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        nbytes = torch.empty(shape, dtype=dtype, device="meta").nbytes
        # The map is private: what a model writes into its hidden states stays out of the file.
        storage = torch.UntypedStorage.from_file(f"/dev/fd/{descriptor}", False, nbytes)
        place = storage.data_ptr()
        self._maps[place] = _Map(nbytes, 0)
        self.disk_bytes += nbytes
        self.peak_disk_bytes = max(self.peak_disk_bytes, self.disk_bytes)

        def forget() -> None:
            del self._maps[place]
            self.disk_bytes -= nbytes

        weakref.finalize(storage, forget).atexit = False
        tensor = torch.empty(0, dtype=dtype)
        tensor.set_(storage, 0, shape)  # type: ignore[call-overload]  # torch's stub lacks it
        self._maps[place].version = tensor._version
        return tensor


def is_on_host(tensor: Tensor) -> bool:
    """Whether the values are in the memory of the CPU."""
    return tensor.device.type == "cpu"


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _file(folder: Path | None) -> "tempfile._TemporaryFileWrapper[bytes]":
    """A file without a name.

    Raises:
        ValueError: If the folder cannot hold one.
    """
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=folder, buffering=0)  # type: ignore[return-value]  # raw file, same methods
    except OSError as error:
        raise ValueError(f"no activations can be written to {folder}: {error}") from error


def _write(descriptor: int, tensor: Tensor) -> None:
    """Append the values of a tensor to a file.

    Raises:
        ValueError: If the disk is full.
    """
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    left = memoryview(flat.numpy().data)
    try:
        while left:
            left = left[os.write(descriptor, left[:SPAN_BYTES]) :]
    except OSError as error:
        raise ValueError(
            f"activations of {tensor.nbytes:,} bytes cannot be written: {error}; free disk space, "
            "raise --memory, or take fewer --samples"
        ) from error


def _spans(tensor: Tensor, rows: Tensor) -> Iterator[tuple[int, int]]:
    """Ranges of ``rows`` whose rows lie within SPAN_BYTES of the file."""
    step = max(1, SPAN_BYTES // max(tensor[0].nbytes, 1))
    edges = torch.arange(0, len(tensor) + step, step)
    cuts = torch.searchsorted(rows, edges).tolist()
    yield from ((start, stop) for start, stop in pairwise(cuts) if stop > start)


def _drop_pages(address: int, nbytes: int) -> None:
    """Take clean pages of a map out of memory; reading them again reads the file."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), mmap.MADV_DONTNEED)
