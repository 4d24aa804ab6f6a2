"""What a model weighs on disk, and the stored bits of each quantized weight, of any format here.

Nothing is loaded: an mxq checkpoint says it in its plan, for the others the headers of the files
do. Of compressed-tensors, GPTQ, AWQ, fp8 and mxfp4 checkpoints the quantized modules are counted:
codes, scales, zero points and the order of the inputs, without biases. The matrices of a model that
is not quantized have the bits of their type.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mxq.artifacts import Allocation
from mxq.evaluation.loading import resolve
from mxq.models.files import read_json, resolve_folder
from mxq.models.headers import SHAPE, StoredTensor, stored_tensors
from mxq.publish import PLAN
from mxq.storage import load_artifact


@dataclass(frozen=True, slots=True)
class Weight:
    """Bytes of a model's safetensors, and stored bits for each of its ``weights`` weights.

    ``source`` says where the bits come from: ``plan``, ``files`` or ``type``. Bits, weights and
    source are None where the format is not known, or the model has no plan and no matrices.
    """

    file_bytes: int
    bits_per_weight: float | None
    weights: int | None
    source: str | None


def weigh(name: str) -> Weight:
    """The weight of a model: a hub id, a folder, or ``demo``.

    Raises:
        ValueError: If it holds no safetensors, or they are not whole.
    """
    folder = resolve_folder(resolve(name))
    tensors = stored_tensors(folder)
    file_bytes = sum(path.stat().st_size for path in {held.file for held in tensors.values()})
    if (folder / PLAN).is_file():
        plan = load_artifact(folder / PLAN, Allocation)
        return Weight(file_bytes, plan.bits_per_weight, plan.weights, "plan")
    modules = _quantized_modules(tensors)
    if modules:
        return _of_modules(modules.values(), file_bytes)
    if "quantization_config" in read_json(folder / "config.json"):
        return Weight(file_bytes, None, None, None)
    return _of_type(tensors.values(), file_bytes)


def _of_modules(modules: Iterable[Mapping[str, StoredTensor]], file_bytes: int) -> Weight:
    """Of the modules that are quantized, if the format of each is known."""
    weights = bits = 0
    for parts in modules:
        count = _count_weights(parts)
        if count is None:
            return Weight(file_bytes, None, None, None)
        weights += count
        bits += sum(_bits(held) for held in parts.values())
    return Weight(file_bytes, bits / weights, weights, "files")


def _of_type(tensors: Iterable[StoredTensor], file_bytes: int) -> Weight:
    """Of a model that is not quantized: its matrices in their types."""
    matrices = [held for held in tensors if len(held.shape) > 1 and "F" in held.dtype]
    weights = sum(held.elements for held in matrices)
    if weights == 0:
        return Weight(file_bytes, None, None, None)
    return Weight(file_bytes, sum(_bits(held) for held in matrices) / weights, weights, "type")


def _bits(held: StoredTensor) -> int:
    """Of the whole tensor; shapes are no part of the weights."""
    return 0 if held.values is not None else held.elements * _bits_of(held.dtype)


def _bits_of(dtype: str) -> int:
    """Bits of an element, which the name of every type says but BOOL: F8_E4M3, BF16, I32."""
    number = re.search(r"\d+", dtype)
    return int(number[0]) if number else 8


_PART = re.compile(
    r"(?P<module>.+?)(?P<part>\.weight_packed|\.weight_shape|\.weight_zero_point|\.weight_g_idx|"
    r"\.weight_global_scale|\.weight_scale_inv|\.weight_scale|\.weight_fp8|\.weight|\.qweight|"
    r"\.qzeros|\.scales|\.g_idx|_blocks|_scales)"
)
"""A tensor of a module that may be quantized; biases and scales of activations are not counted."""

_MARKS = {".weight_packed", ".weight_scale", ".weight_scale_inv", ".qweight", "_blocks"}
"""Of these parts a module that is quantized has at least one."""


def _quantized_modules(tensors: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """The tensors of each quantized module by part."""
    modules: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for name, held in tensors.items():
        match = _PART.fullmatch(name)
        if match:
            modules[match["module"]][match["part"]] = held
    return {name: parts for name, parts in modules.items() if _MARKS & parts.keys()}


def _count_weights(parts: Mapping[str, StoredTensor]) -> int | None:
    """Weights of a quantized module; None if its format is not known."""
    for count in (_count_packed, _count_gptq, _count_whole):
        weights = count(parts)
        if weights is not None:
            return weights
    return None


def _count_packed(parts: Mapping[str, StoredTensor]) -> int | None:
    """Of compressed-tensors: integers with their shape beside them, or 4-bit floats in bytes."""
    shape = parts.get(f".{SHAPE}")
    if shape is not None and shape.values is not None:
        return math.prod(shape.values)
    packed = parts.get(".weight_packed", parts.get("_blocks"))
    return 2 * packed.elements if packed is not None and packed.dtype == "U8" else None


def _count_gptq(parts: Mapping[str, StoredTensor]) -> int | None:
    """Of GPTQ, whose words go along the inputs, and of AWQ, whose words go along the outputs."""
    if not {".qweight", ".scales"} <= parts.keys():
        return None
    rows, columns = parts[".qweight"].shape
    outputs = parts[".scales"].shape[-1]
    if columns != outputs:
        return rows * outputs
    return parts[".g_idx"].elements * outputs if ".g_idx" in parts else None


def _count_whole(parts: Mapping[str, StoredTensor]) -> int | None:
    """Of formats that store one number for each weight."""
    held = parts.get(".weight", parts.get(".weight_fp8"))
    return held.elements if held is not None and _bits_of(held.dtype) == 8 else None
