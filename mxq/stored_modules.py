"""The linears of a checkpoint as its safetensors headers show them, in any of three layouts."""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mxq.artifacts import BlockInfo
from mxq.engines import DENSE, StoredFormat
from mxq.models.headers import SHAPE, StoredTensor, stored_tensors
from mxq.scheme import WORD_BITS

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.([^.]+)", re.ASCII)
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)", re.ASCII)
_EMBEDDING = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe)$", re.ASCII)

_WEIGHTS = ("weight_packed", "qweight", "weight_fp8", "weight")
"""Tensors that hold a weight, in the order in which they are looked for."""


@dataclass(frozen=True, slots=True)
class StoredModule:
    """A weight of two dimensions. ``is_quantized`` says that a scale or packed codes go with it.

    ``words`` are those of a packed row, ``groups`` the scales along the inputs; None where there
    are none. ``has_zeros`` is about stored zero points.
    """

    out_features: int
    in_features: int
    is_quantized: bool
    is_linear: bool = True
    words: int | None = None
    groups: int | None = None
    has_zeros: bool = False


def read_modules(
    folder: Path, *, gptq_bits: Callable[[str], int] | None = None
) -> dict[str, StoredModule]:
    """Every weight of two dimensions in a checkpoint, by the path of its module.

    ``gptq_bits`` gives the bits of a module, which GPTQ's layout does not show.

    Raises:
        ValueError: If a file is damaged or a shape makes no sense.
    """
    modules: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for key, stored in stored_tensors(folder).items():
        name, _, part = key.rpartition(".")
        modules[name][part] = stored
    read = ((name, _module(name, modules[name], gptq_bits)) for name in sorted(modules))
    return {name: module for name, module in read if module is not None}


def with_neighbours(
    modules: Mapping[str, StoredModule], planned: Mapping[str, StoredFormat]
) -> dict[str, StoredFormat]:
    """Formats of the planned modules and of unquantized ones beside them.

    Beside are linears of the same parent, and experts of the same layer: an engine may hold them
    in one tensor.
    """
    homes = {_home(name) for name in planned}
    beside = {
        name: DENSE
        for name, module in modules.items()
        if name not in planned and not module.is_quantized and _home(name) in homes
    }
    return {**planned, **beside}


def block_of(name: str, module: StoredModule) -> BlockInfo:
    """A module as a block; its site is the experts that it belongs to, else itself."""
    expert, layer = _EXPERT.fullmatch(name), _LAYER.search(name)
    return BlockInfo(
        name=name,
        layer=0 if layer is None else int(layer[1]),
        expert=None if expert is None else int(expert[2]),
        projection=name.rpartition(".")[2],
        out_features=module.out_features,
        in_features=module.in_features,
        tokens=0,
        site=name if expert is None else expert[1],
    )


def _home(name: str) -> str:
    expert = _EXPERT.fullmatch(name)
    return name.rpartition(".")[0] if expert is None else expert[1]


Parts = Mapping[str, StoredTensor]
"""The tensors of a module by the last part of their names."""


def _module(
    module: str, parts: Parts, gptq_bits: Callable[[str], int] | None
) -> StoredModule | None:
    weight = next((name for name in _WEIGHTS if name in parts), None)
    if weight is None:
        return None
    if gptq_bits is not None and weight not in ("qweight", "weight"):
        raise ValueError(f"{module} is no module of the GPTQ format: it has a {weight}")
    shape = parts[weight].shape
    if len(shape) != 2:
        return None
    is_quantized = weight != "weight" or "weight_scale" in parts
    n, k = shape
    words = None
    if weight == "weight_packed":
        n, k = _stored_shape(module, parts)
        words = shape[1]
    if weight == "qweight":
        if gptq_bits is None:
            raise ValueError(f"{module} is packed as GPTQ does, which its configuration denies")
        n, k = shape[1], shape[0] * WORD_BITS // max(1, gptq_bits(module))
    is_linear = _EMBEDDING.search(module) is None
    has_zeros = not parts.keys().isdisjoint(("weight_zero_point", "qzeros"))
    return StoredModule(n, k, is_quantized, is_linear, words, _groups(parts), has_zeros)


def _groups(parts: Parts) -> int | None:
    """Scales along the inputs: columns of compressed-tensors' scales, rows of GPTQ's."""
    name, axis = ("scales", 0) if "qweight" in parts else ("weight_scale", 1)
    if name not in parts:
        return None
    shape = parts[name].shape
    return shape[axis] if len(shape) == 2 else None


def _stored_shape(module: str, parts: Parts) -> tuple[int, int]:
    shape = parts[SHAPE].values if SHAPE in parts else None
    if shape is None:
        raise ValueError(f"{module} has no {SHAPE}, so its inputs are not known")
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"{module}.{SHAPE} holds {list(shape)}, expected outputs and inputs")
    return shape[0], shape[1]
