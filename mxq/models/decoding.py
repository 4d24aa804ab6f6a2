"""Sources that are themselves quantized: fp8 in blocks and mxfp4, decoded as a layer is loaded.

A stored weight of two tensors, codes and scales, appears under the name that a plain checkpoint
would give it, as a slice that decodes when it is read. So no more than one layer is ever decoded.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import EllipsisType
from typing import Any, Protocol

import torch
from torch import Tensor

SCALE_SUFFIX = "_scale_inv"
"""A tensor in fp8 has its scales beside it under its name and this suffix."""

SCALE_NAMES = ("scale", "qscale_weight")
"""Other names of the scales of a module's ``weight``."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of the codes 0 to 7 of mxfp4 (OCP Microscaling Formats 1.0); bit 3 is the sign."""


class Slice(Protocol):
    """What safetensors gives for a tensor that is not read yet; ``[...]`` reads it."""

    def __getitem__(self, index: EllipsisType) -> Tensor:
        """The tensor."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A weight in several stored tensors, and the function from these to its values."""

    parts: tuple[str, ...]
    decode: Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class DecodingSlice:
    """Stands in for a slice of safetensors; reading it decodes."""

    name: str
    encoded: Encoded
    slices: tuple[Slice, ...]

    def __getitem__(self, index: EllipsisType) -> Tensor:
        """The values, float32.

        Raises:
            ValueError: If codes and scales do not belong together.
        """
        try:
            return self.encoded.decode(*(part[...] for part in self.slices))[index]
        except ValueError as error:
            raise ValueError(f"{self.name} cannot be decoded: {error}") from error

    def get_dtype(self) -> str:
        """The type of the decoded values, as safetensors spells it."""
        return "F32"


def find_encoded(
    quantization: Mapping[str, Any] | None, keys: Iterable[str], folder: Path
) -> Mapping[str, Encoded]:
    """The encoded weights among the keys of a checkpoint, by the name of the plain weight.

    ``quantization`` is the ``quantization_config`` of the checkpoint in ``folder``, None if it has
    none.

    Raises:
        ValueError: If the source is quantized in a form that mxq does not read.
    """
    if quantization is None:
        return {}
    method = quantization.get("quant_method")
    if method not in _FINDERS:
        raise ValueError(
            f"{folder} is already quantized ({method}); give the original model, or one in "
            f"{' or '.join(_FINDERS)}"
        )
    try:
        return _FINDERS[method](quantization, set(keys))
    except ValueError as error:
        raise ValueError(f"{folder}/config.json: quantization_config {error}") from error


def _find_fp8(quantization: Mapping[str, Any], keys: set[str]) -> Mapping[str, Encoded]:
    match quantization.get("weight_block_size"):
        case None:
            decode = partial(decode_fp8, block=None)
        case [int(rows), int(columns)] if min(rows, columns) > 0:
            decode = partial(decode_fp8, block=(rows, columns))
        case other:
            raise ValueError(f"has weight_block_size {other!r}, expected [rows, columns]")
    found = {}
    for key in keys:
        name, _, last = key.rpartition(".")
        plain = f"{name}.weight" if last in SCALE_NAMES else key.removesuffix(SCALE_SUFFIX)
        if plain != key and plain in keys:
            found[plain] = Encoded((plain, key), decode)
    return found


def _find_mxfp4(quantization: Mapping[str, Any], keys: set[str]) -> Mapping[str, Encoded]:
    names = (key.removesuffix("_blocks") for key in keys if key.endswith("_blocks"))
    parts = {name: (f"{name}_blocks", f"{name}_scales") for name in names}
    return {name: Encoded(pair, decode_mxfp4) for name, pair in parts.items() if pair[1] in keys}


_FINDERS = {"fp8": _find_fp8, "mxfp4": _find_mxfp4}
"""How each readable ``quant_method`` marks its weights."""


def decode_fp8(codes: Tensor, scales: Tensor, *, block: tuple[int, int] | None) -> Tensor:
    """``codes * scale`` with one scale for each block of rows and columns, float32.

    ``codes`` [..., N, K] in float8, ``scales`` [..., ceil(N / rows), ceil(K / columns)]; blocks at
    the lower and right edge may be cut. ``block`` None means one scale for the whole weight. Bytes
    as scales are exponents of 2 with a bias of 127.

    Raises:
        ValueError: If the types or the number of scales are not such.
    """
    if codes.element_size() != 1 or not codes.is_floating_point():
        raise ValueError(f"its codes are {codes.dtype}, expected float8")
    if scales.dtype == torch.uint8:
        scales = torch.ldexp(torch.ones(scales.shape), scales.int() - 127)
    if not scales.is_floating_point():
        raise ValueError(f"its scales are {scales.dtype}, expected floating point")
    n, k = codes.shape[-2:]
    rows, columns = (n, k) if block is None else block
    grid = (*codes.shape[:-2], -(-n // rows), -(-k // columns))
    if scales.numel() != math.prod(grid):
        raise ValueError(
            f"it has scales {list(scales.shape)} for {list(codes.shape)} in blocks of "
            f"{rows} x {columns}, expected {list(grid)}"
        )
    decoded = torch.empty(codes.shape, dtype=torch.float32)
    flat_ENK, flat_Egk = decoded.view(-1, n, k), scales.float().reshape(-1, *grid[-2:])
    # A stripe of blocks at a time, so that nothing of the size of the weight exists beside it.
    for out_NK, codes_NK, scale_gk in zip(flat_ENK, codes.reshape(-1, n, k), flat_Egk, strict=True):
        for place, scale_k in enumerate(scale_gk):
            stripe = slice(place * rows, (place + 1) * rows)
            wide_K = scale_k.repeat_interleave(columns)[:k]
            torch.mul(codes_NK[stripe].float(), wide_K, out=out_NK[stripe])
    return decoded


def decode_mxfp4(codes: Tensor, scales: Tensor) -> Tensor:
    """Values of experts [E, in, out], float32.

    ``codes`` [E, out, G, 16] hold two inputs in a byte, the lower four bits first; ``scales``
    [E, out, G] are exponents of 2 with a bias of 127, one for 32 inputs. Files hold [out, in],
    families that come in mxfp4 compute with [in, out].

    Raises:
        ValueError: If the types or shapes are not such.
    """
    if codes.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise ValueError(f"it is {codes.dtype} with scales {scales.dtype}, expected uint8")
    if codes.dim() != 4 or codes.shape[:-1] != scales.shape:
        raise ValueError(f"it has scales {list(scales.shape)} for codes {list(codes.shape)}")
    experts, n, groups, packed = codes.shape
    values = torch.tensor([*E2M1, *(-value for value in E2M1)])
    decoded = torch.empty(experts, groups * packed * 2, n)
    # An expert at a time, so that nothing of the size of the weight exists beside it.
    for out_KN, codes_NGB, scales_NG in zip(decoded, codes, scales, strict=True):
        nibbles_NGB2 = torch.stack([codes_NGB & 15, codes_NGB >> 4], -1)
        w_NGC = values[nibbles_NGB2.long()].reshape(n, groups, -1)
        out_KN.copy_(torch.ldexp(w_NGC, scales_NG[..., None].int() - 127).reshape(n, -1).T)
    return decoded
