"""Quantizers: a weight, a scheme and the inputs' second moments become codes on a grid.

A quantizer is a plain function ``(w_NK, scheme, hessian_KK | None) -> QuantizedWeight`` that knows
no model and no file. The built-in ones take leading batch dimensions; ``per_matrix`` lifts one
that does not, so a user's own function needs to handle a single matrix only.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mxq.numerics import QuantizedWeight
from mxq.quantizers.gptq import quantize_gptq
from mxq.quantizers.kronecker import quantize_kronecker
from mxq.quantizers.method import Method, Quantizer
from mxq.quantizers.refine import quantize_refined
from mxq.quantizers.rtn import quantize_rtn
from mxq.scheme import Scheme

QUANTIZERS: Mapping[str, Quantizer] = {
    "kronecker": quantize_kronecker,
    "refined": quantize_refined,
    "gptq": quantize_gptq,
    "rtn": quantize_rtn,
}


def per_matrix(quantizer: Quantizer) -> Quantizer:
    """The quantizer applied to each matrix of a batch [B, N, K] in turn."""

    def batched(w_BNK: Tensor, scheme: Scheme, hessian_BKK: Tensor | None) -> QuantizedWeight:
        if w_BNK.dim() == 2:
            return quantizer(w_BNK, scheme, hessian_BKK)
        hessians = [None] * len(w_BNK) if hessian_BKK is None else list(hessian_BKK)
        parts = [quantizer(w, scheme, h) for w, h in zip(w_BNK, hessians, strict=True)]
        for part in parts:
            _check_weight(part, scheme)
        return QuantizedWeight(
            torch.stack([part.codes_NK for part in parts]),
            _stack([part.scale_NG for part in parts]),
            _stack([part.zero_NG for part in parts]),
            scheme,
        )

    return batched


def _check_weight(q: QuantizedWeight, scheme: Scheme) -> None:
    """Raise ValueError unless a caller's quantizer gave what the scheme can store."""
    if scheme.kind != "int":
        return
    if q.codes_NK.dtype != torch.uint8 or int(q.codes_NK.max()) >= 2**scheme.w_bits:
        raise ValueError(f"codes of {scheme} must be uint8 below {2**scheme.w_bits}")
    if q.scale_NG is None or q.scale_NG.dtype != torch.float16:
        raise ValueError(f"scales of {scheme} must be float16, [N, groups]")
    if (q.zero_NG is None) != scheme.symmetric:
        raise ValueError(f"zero points go with asymmetric schemes, and {scheme} needs them so")


def _stack(parts: list[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.stack(present) if len(present) == len(parts) else None


__all__ = [
    "QUANTIZERS",
    "Method",
    "Quantizer",
    "per_matrix",
    "quantize_gptq",
    "quantize_kronecker",
    "quantize_refined",
    "quantize_rtn",
]
