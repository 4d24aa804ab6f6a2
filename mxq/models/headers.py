"""The tensors of a checkpoint as the headers of its safetensors files show them.

Nothing is loaded but ``weight_shape``: the two numbers that say how large a packed weight is.
"""

from collections import defaultdict
from dataclasses import dataclass
from math import prod
from pathlib import Path

from torch import Tensor

from mxq.models.files import checkpoint_files, open_safetensors

SHAPE = "weight_shape"
"""Name of the tensor beside a packed weight that holds its outputs and inputs."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file. ``values`` are those of a ``weight_shape``, None for all others."""

    shape: tuple[int, ...]
    dtype: str
    file: Path
    values: tuple[int, ...] | None = None

    @property
    def elements(self) -> int:
        """Numbers of the stored type."""
        return prod(self.shape)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors checkpoint by its name, file by file.

    Raises:
        ValueError: If there is none, or a file is absent or not whole.
    """
    keys: dict[str, list[str]] = defaultdict(list)
    for key, name in checkpoint_files(folder).items():
        keys[name].append(key)
    found = {}
    for name in sorted(keys):
        with open_safetensors(folder / name) as file:
            for key in keys[name]:
                part = file.get_slice(key)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                is_shape = key.rpartition(".")[2] == SHAPE
                values = _values(key, dtype, file.get_tensor(key)) if is_shape else None
                found[key] = StoredTensor(shape, dtype, folder / name, values)
    return found


def _values(key: str, dtype: str, tensor: Tensor) -> tuple[int, ...]:
    if not dtype.startswith(("I", "U")):
        raise ValueError(f"{key} is of type {dtype}, expected integers; download it again")
    return tuple(tensor.flatten().tolist())
