"""Grids, codes, rotations: the arithmetic of quantization as pure functions on tensors.

An integer weight is ``(code - zero) * scale``, with unsigned codes, an integer zero point that is
itself a code, and a float16 scale; scale and zero belong to a group of ``C`` neighbouring inputs.
A symmetric grid fixes the zero at ``2**(bits-1)``. All functions take leading batch dimensions,
so ``w_NK`` may be ``[experts, N, K]``.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mxq.scheme import Scheme

FP8_MAX = 448.0
"""Largest finite value of float8_e4m3fn."""

SCALE_MIN, SCALE_MAX = 2.0**-24, 65504.0
"""Smallest and largest positive float16: a scale never becomes 0 or infinite."""

CLIP_RATIOS = tuple(1.0 - step * 0.03 for step in range(22))
"""Shares of a group's range that the clip search tries: 1 to 0.37."""

SEARCH_WEIGHTS = 2**16
"""Weights of each thread whose grids are searched at a time: a few copies of 256 KiB."""

SEARCH_WEIGHTS_GPU = 2**25
"""The same on a GPU, where a launch takes as long as millions of weights: copies of 128 MiB."""

CHECKED_ROWS = 4096
"""Rows of a tensor that are looked at together for values that are not finite."""

ROTATION_BLOCK = 128
"""Largest block of the input rotation, the size of the usual group."""


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight in the numbers of its scheme.

    ``codes_NK`` is uint8 for integer schemes, float8_e4m3fn for fp8, bfloat16 for bf16;
    ``scale_NG`` is float16 (None for bf16); ``zero_NG`` is uint8 (None unless asymmetric).
    """

    codes_NK: Tensor
    scale_NG: Tensor | None
    zero_NG: Tensor | None
    scheme: Scheme

    def __getitem__(self, index: int | slice | None) -> "QuantizedWeight":
        """One weight of a batch, or some rows of a weight; for None a batch of it alone."""
        scale = None if self.scale_NG is None else self.scale_NG[index]
        zero = None if self.zero_NG is None else self.zero_NG[index]
        return QuantizedWeight(self.codes_NK[index], scale, zero, self.scheme)


def dequantize(q: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight that the codes stand for, [..., N, K]; computed in float32, rounded once."""
    if q.scale_NG is None:
        return q.codes_NK.to(dtype)
    w_NGC = _grouped(q.codes_NK.to(torch.float32), q.scale_NG.shape[-1])
    if q.scheme.kind == "int":
        w_NGC.sub_(zero_points(q)[..., None])
    w_NGC.mul_(q.scale_NG.to(torch.float32)[..., None])
    return w_NGC.flatten(-2).to(dtype)


def zero_points(q: QuantizedWeight) -> Tensor:
    """Zero point of each group of an integer scheme, float32 [..., N, G]."""
    if q.zero_NG is not None:
        return q.zero_NG.to(torch.float32)
    assert q.scale_NG is not None
    middle = 2.0 ** (q.scheme.w_bits - 1)
    return torch.full_like(q.scale_NG, middle, dtype=torch.float32)


def check_groups(in_features: int, scheme: Scheme, name: str = "the weight") -> None:
    """Raise ValueError unless the groups of the scheme divide the inputs."""
    if not scheme.fits(in_features):
        raise ValueError(
            f"{name} has {in_features} input features, not a multiple of the group size "
            f"{scheme.group_size} of {scheme}; offer a smaller group or 'row'"
        )


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise ValueError if a value is NaN or infinite, naming where it is."""
    # A sum is NaN or infinite if a term is, and reads the values once; large ones may overflow it.
    if math.isfinite(float(tensor.detach().sum(dtype=torch.float32))):
        return
    # In parts: a mask of all of it would take a quarter of its memory again.
    if not all(bool(torch.isfinite(part).all()) for part in _row_parts(tensor)):
        bad = int((~torch.isfinite(tensor)).sum())
        raise ValueError(
            f"{name}: {bad} of {tensor.numel()} values are NaN or infinite; "
            "the model or the calibration text is damaged, or the model needs bfloat16 or float32"
        )


def _row_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tensor if tensor.dim() else tensor[None], CHECKED_ROWS)


def round_to_grid(w_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor, scheme: Scheme) -> Tensor:
    """Nearest codes, uint8 [..., N, K], of a weight on a given grid (scale and zero as floats)."""
    w_NGC = _grouped(w_NK.to(torch.float32), scale_NG.shape[-1])
    codes = (w_NGC / scale_NG[..., None] + zero_NG[..., None]).round_()
    return codes.clamp_(0, 2**scheme.w_bits - 1).flatten(-2).to(torch.uint8)


def search_grid(
    w_NK: Tensor, scheme: Scheme, importance_K: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group, float32 [..., N, G], that lose the least.

    Every clip ratio is tried, then the scale is refitted to the codes by least squares; the loss
    is the squared error weighted by ``importance_K`` [..., K] (second moments of the inputs).
    The scale is already rounded to float16.
    """
    # Rows are independent; a few at a time stay in the processor's cache over all the ratios.
    on_host = w_NK.device.type == "cpu"
    weights = SEARCH_WEIGHTS * torch.get_num_threads() if on_host else SEARCH_WEIGHTS_GPU
    rows = max(1, weights * w_NK.shape[-2] // max(w_NK.numel(), 1))
    found = [_search_rows(part, scheme, importance_K) for part in torch.split(w_NK, rows, -2)]
    scales, zeros = zip(*found, strict=True)
    return torch.cat(scales, -2), torch.cat(zeros, -2)


def quantize_fp8(w_NK: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Weight in float8_e4m3fn, one scale for each row."""
    scale_N1 = _storable_scale(w_NK.to(torch.float32).abs().amax(-1, keepdim=True) / FP8_MAX)
    codes_NK = (w_NK.to(torch.float32) / scale_N1).clamp(-FP8_MAX, FP8_MAX)
    return QuantizedWeight(codes_NK.to(torch.float8_e4m3fn), scale_N1.half(), None, scheme)


def fake_quantize_input(x_TK: Tensor, scheme: Scheme) -> Tensor:
    """The input as the scheme's arithmetic sees it: each token rounded on its own symmetric grid.

    Returns ``x_TK`` itself where the scheme leaves activations alone.
    """
    if scheme.a_bits == 16:
        return x_TK
    x = x_TK.to(torch.float32)
    peak_T1 = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    if scheme.kind == "fp8":
        scale_T1 = peak_T1 / FP8_MAX
        rounded = (x / scale_T1).to(torch.float8_e4m3fn).to(torch.float32)
    else:
        top = 2 ** (scheme.a_bits - 1) - 1
        scale_T1 = peak_T1 / top
        rounded = (x / scale_T1).round().clamp(-top, top)
    return (rounded * scale_T1).to(x_TK.dtype)


def rotation_block(in_features: int) -> int:
    """Size of the rotation's blocks: the largest power of two up to 128 that divides K."""
    return min(in_features & -in_features, ROTATION_BLOCK)


def rotate(x_TK: Tensor) -> Tensor:
    """Rotate the last dimension by a fixed orthogonal block-Hadamard matrix with fixed signs.

    With ``W' = rotate(W)``, ``W' rotate(x) = W x``: the rotation is its own contract between a
    stored weight and its input, depends on K alone, and spreads outliers over a block.
    """
    in_features = x_TK.shape[-1]
    block = rotation_block(in_features)
    matrix = _hadamard(block).to(device=x_TK.device, dtype=x_TK.dtype)
    signs_K = _signs(in_features).to(device=x_TK.device, dtype=x_TK.dtype)
    x = _grouped(x_TK * signs_K, in_features // block)
    return torch.flatten(x @ matrix, -2)


def unrotate(x_TK: Tensor) -> Tensor:
    """Inverse of ``rotate``."""
    in_features = x_TK.shape[-1]
    block = rotation_block(in_features)
    matrix = _hadamard(block).to(device=x_TK.device, dtype=x_TK.dtype)
    x = torch.flatten(_grouped(x_TK, in_features // block) @ matrix, -2)
    return x * _signs(in_features).to(device=x_TK.device, dtype=x_TK.dtype)


def _search_rows(
    w_NK: Tensor, scheme: Scheme, importance_K: Tensor | None
) -> tuple[Tensor, Tensor]:
    groups = scheme.groups(w_NK.shape[-1])
    w_NGC = _grouped(w_NK.to(torch.float32), groups)
    h_NGC = _grouped_importance(importance_K, w_NGC)
    # The range includes 0, so the zero point is itself a code and fits in w_bits.
    low_NG, high_NG = w_NGC.amin(-1).clamp(max=0.0), w_NGC.amax(-1).clamp(min=0.0)
    best = _Best.start(*_grid(low_NG, high_NG, scheme))
    for ratio in CLIP_RATIOS:
        scale_NG, zero_NG = _grid(low_NG * ratio, high_NG * ratio, scheme)
        best = best.better(*_try_grid(w_NGC, h_NGC, scale_NG, zero_NG, scheme), zero_NG)
    for _ in range(2):
        scale_NG = _refit_scale(w_NGC, h_NGC, best, scheme)
        best = best.better(*_try_grid(w_NGC, h_NGC, scale_NG, best.zero_NG, scheme), best.zero_NG)
    return best.scale_NG, best.zero_NG


@dataclass(frozen=True, slots=True)
class _Best:
    """The best grid so far of each group, with its loss, all [..., N, G]."""

    loss_NG: Tensor
    scale_NG: Tensor
    zero_NG: Tensor

    @classmethod
    def start(cls, scale_NG: Tensor, zero_NG: Tensor) -> "_Best":
        return cls(torch.full_like(scale_NG, torch.inf), scale_NG, zero_NG)

    def better(self, loss_NG: Tensor, scale_NG: Tensor, zero_NG: Tensor) -> "_Best":
        won = loss_NG < self.loss_NG
        return _Best(
            torch.where(won, loss_NG, self.loss_NG),
            torch.where(won, scale_NG, self.scale_NG),
            torch.where(won, zero_NG, self.zero_NG),
        )


def _grid(low_NG: Tensor, high_NG: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point whose grid spans the given range."""
    steps = 2**scheme.w_bits - 1
    if scheme.symmetric:
        # All codes are used: the grid reaches one step further down than up, and the clip
        # search decides how much of the upper end is worth keeping.
        scale_NG = _storable_scale(2 * torch.maximum(-low_NG, high_NG) / steps)
        return scale_NG, torch.full_like(scale_NG, 2 ** (scheme.w_bits - 1))
    scale_NG = _storable_scale((high_NG - low_NG) / steps)
    return scale_NG, (-low_NG / scale_NG).round().clamp(0, steps)


def _try_grid(
    w_NGC: Tensor, h_NGC: Tensor, scale_NG: Tensor, zero_NG: Tensor, scheme: Scheme
) -> tuple[Tensor, Tensor]:
    """Weighted squared error of rounding to a grid, and the grid's scale."""
    scale, zero = scale_NG[..., None], zero_NG[..., None]
    codes = (w_NGC / scale).add_(zero).round_().clamp_(0, 2**scheme.w_bits - 1)
    error = codes.sub_(zero).mul_(scale).sub_(w_NGC)
    return error.square_().mul_(h_NGC).sum(-1), scale_NG


def _refit_scale(w_NGC: Tensor, h_NGC: Tensor, best: _Best, scheme: Scheme) -> Tensor:
    """The scale that fits the present codes best: sum(h w q) / sum(h q q), q = code - zero."""
    scale, zero = best.scale_NG[..., None], best.zero_NG[..., None]
    q = (w_NGC / scale + zero).round_().clamp_(0, 2**scheme.w_bits - 1).sub_(zero)
    norm_NG = (h_NGC * q * q).sum(-1)
    fitted_NG = (h_NGC * q * w_NGC).sum(-1) / norm_NG
    return _storable_scale(torch.where(norm_NG > 0, fitted_NG, best.scale_NG))


def _storable_scale(scale: Tensor) -> Tensor:
    """The float16 value next to a positive scale, as float32."""
    return scale.clamp(SCALE_MIN, SCALE_MAX).half().float()


def _grouped(w_NK: Tensor, groups: int) -> Tensor:
    return w_NK.reshape(*w_NK.shape[:-1], groups, w_NK.shape[-1] // groups)


def _grouped_importance(importance_K: Tensor | None, w_NGC: Tensor) -> Tensor:
    """Importance broadcast against [..., N, G, C]; ones where none is given or all is zero."""
    if importance_K is None:
        return torch.ones((), dtype=w_NGC.dtype, device=w_NGC.device)
    h = _grouped(importance_K.to(torch.float32), w_NGC.shape[-2])
    # A group that no input reached would accept any grid: fall back to the plain error there.
    h = torch.where(h.sum(-1, keepdim=True) > 0, h, torch.ones_like(h))
    return h.unsqueeze(-3)


@lru_cache(maxsize=16)
def _hadamard(size: int) -> Tensor:
    """Symmetric orthonormal Hadamard matrix of a power-of-two size (Sylvester)."""
    # A tensor made in inference mode could never meet autograd again.
    with torch.inference_mode(False):
        matrix = torch.ones(1, 1)
        while matrix.shape[0] < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
        return matrix.mul_(size**-0.5)


@lru_cache(maxsize=64)
def _signs(in_features: int) -> Tensor:
    """Fixed +-1 for each input; part of the checkpoint format, so written out, not drawn."""
    # Bits of a 32-bit multiplicative hash of the index: no library's generator is involved.
    with torch.inference_mode(False):
        index = torch.arange(1, in_features + 1, dtype=torch.int64)
        mixed = (index * 2654435761) & 0xFFFFFFFF
        mixed = ((mixed ^ (mixed >> 15)) * 2246822519) & 0xFFFFFFFF
        signs: Tensor = 1.0 - 2.0 * ((mixed >> 16) & 1).to(torch.float32)
        return signs
