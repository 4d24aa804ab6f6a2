"""Codes <-> 32-bit words on disk: the dense little-endian bit stream of compressed-tensors.

Code ``i`` of a row occupies bits ``[i*b, i*b+b)`` of the row's stream, lowest bit first, so 32
codes fill exactly ``b`` words and codes of 3, 5 and 6 bits straddle words. Zero points are packed
the same way along the output dimension. (compressed-tensors >= 0.18, ``pack-quantized``.)
"""

from math import ceil

import torch
from torch import Tensor

from mxq.scheme import WORD_BITS


def packed_words(codes: int, bits: int) -> int:
    """Number of 32-bit words for that many codes."""
    return ceil(codes * bits / WORD_BITS)


def pack(codes_NK: Tensor, bits: int) -> Tensor:
    """Words int32 [N, ceil(K*bits/32)] of unsigned codes [N, K] below ``2**bits``."""
    n, k = codes_NK.shape
    padded = torch.nn.functional.pad(codes_NK, (0, -k % WORD_BITS))
    lanes = padded.reshape(n, -1, WORD_BITS).to(torch.int64)
    words = lanes.new_zeros(n, lanes.shape[1], bits)
    for lane in range(WORD_BITS):
        word, shift = divmod(lane * bits, WORD_BITS)
        words[..., word] |= lanes[..., lane] << shift
        if shift + bits > WORD_BITS:
            words[..., word + 1] |= lanes[..., lane] >> (WORD_BITS - shift)
    # Keep the low 32 bits of each word as a signed int32.
    signed = ((words & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000
    return signed.to(torch.int32).flatten(1)[:, : packed_words(k, bits)].contiguous()


def unpack(words_NW: Tensor, bits: int, in_features: int) -> Tensor:
    """Codes uint8 [N, in_features] of packed words; inverse of ``pack``."""
    n = words_NW.shape[0]
    groups = ceil(in_features / WORD_BITS)
    padded = torch.nn.functional.pad(words_NW, (0, groups * bits - words_NW.shape[1]))
    words = padded.reshape(n, groups, bits)
    mask = 2**bits - 1
    codes = torch.empty(n, groups, WORD_BITS, dtype=torch.uint8, device=words_NW.device)
    for lane in range(WORD_BITS):
        word, shift = divmod(lane * bits, WORD_BITS)
        value = words[..., word] >> shift
        if shift + bits > WORD_BITS:
            # >> extends the sign: clear what it brought in before the next word's bits come.
            kept = WORD_BITS - shift
            value = (value & (2**kept - 1)) | (words[..., word + 1] << kept)
        codes[..., lane] = value & mask
    return codes.flatten(1)[:, :in_features]
