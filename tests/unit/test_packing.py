"""Packed words: bit for bit those of a slow bit stream, and readable by compressed-tensors."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st

from mxq.checkpoint.tensors import from_tensors, tensor_shapes, to_tensors
from mxq.numerics import QuantizedWeight, dequantize
from mxq.packing import pack, packed_words, unpack
from mxq.quantizers import quantize_rtn
from mxq.scheme import WEIGHT_BITS, Scheme

# One code, one word, a word and one code, a straddled word, 32 codes (always whole words), ragged.
WIDTHS = (1, 4, 5, 11, 31, 32, 33, 64, 100)


def codes_of(n, k, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**bits, (n, k), generator=generator).to(torch.uint8)


def slow_pack(codes_NK, bits):
    """The words of each row, from one long number: code i is its bits [i*b, i*b + b)."""
    rows = []
    for row in codes_NK.tolist():
        stream = sum(code << (place * bits) for place, code in enumerate(row))
        words = [stream >> shift & 0xFFFFFFFF for shift in range(0, len(row) * bits, 32)]
        rows.append([word - 2**32 if word >= 2**31 else word for word in words])
    return rows


def test_words_by_hand():
    # 1 + 2*16 + 15*256 = 0xF21; the eighth code 8 sets the sign bit: 0x80000F21 - 2^32.
    codes_NK = torch.tensor([[1, 2, 15, 0, 0, 0, 0, 8, 7]], dtype=torch.uint8)
    assert pack(codes_NK, 4).tolist() == [[0x80000F21 - 2**32, 7]]


def test_a_code_that_straddles_two_words_by_hand():
    # Ten codes of 3 bits fill 30; the eleventh, 0b110, has its low two bits 0b10 in word 0.
    codes_NK = torch.tensor([[0] * 10 + [0b110]], dtype=torch.uint8)
    assert pack(codes_NK, 3).tolist() == [[0b10 << 30 | -(2**32), 0b1]]


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("width", WIDTHS)
def test_words_are_those_of_a_slow_bit_stream(bits, width):
    codes_NK = codes_of(3, width, bits)
    assert pack(codes_NK, bits).tolist() == slow_pack(codes_NK, bits)


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("width", WIDTHS)
def test_unpacking_gives_the_codes_back(bits, width):
    codes_NK = codes_of(3, width, bits)
    words_NW = torch.tensor(slow_pack(codes_NK, bits), dtype=torch.int32)
    assert torch.equal(unpack(words_NW, bits, width), codes_NK)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(WEIGHT_BITS), st.integers(1, 6), st.integers(1, 200), st.integers(0, 2**31))
def test_any_shape_packs_as_the_slow_bit_stream_and_comes_back(bits, n, k, seed):
    codes_NK = codes_of(n, k, bits, seed)
    words_NW = pack(codes_NK, bits)
    assert words_NW.tolist() == slow_pack(codes_NK, bits)
    assert torch.equal(unpack(words_NW, bits, k), codes_NK)


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_the_largest_codes_leave_no_bit_unset(bits):
    codes_NK = torch.full((1, 32), 2**bits - 1, dtype=torch.uint8)
    assert pack(codes_NK, bits).tolist() == [[-1] * bits]


@pytest.mark.parametrize(
    ("codes", "bits", "words"), [(1, 2, 1), (16, 2, 1), (17, 2, 2), (11, 3, 2)]
)
def test_words_are_counted_by_hand(codes, bits, words):
    assert packed_words(codes, bits) == words


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("width", [33, 64])
def test_compressed_tensors_packs_and_unpacks_the_same(bits, width):
    codes_NK = codes_of(5, width, bits)
    signed_NK = (codes_NK.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)  # their codes
    words_NW = pack(codes_NK, bits)
    assert torch.equal(words_NW, pack_to_int32(signed_NK, bits))
    assert torch.equal(unpack_from_int32(words_NW, bits, torch.Size((5, width))), signed_NK)


def quantized(text, n=40, k=256):
    generator = torch.Generator().manual_seed(n + k)
    return quantize_rtn(torch.randn(n, k, generator=generator) + 0.3, Scheme.parse(text))


def their_scheme(scheme):
    weights = QuantizationArgs(
        num_bits=scheme.w_bits,
        symmetric=scheme.symmetric,
        strategy="channel" if scheme.group_size is None else "group",
        group_size=scheme.group_size,
    )
    return QuantizationScheme(targets=["Linear"], weights=weights)


# 40 rows: zero points of 40 x 3 bits, say, do not fill their words.
@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("group", ["g32", "g128", "grow"])
@pytest.mark.parametrize("grid", ["sym", "asym"])
def test_compressed_tensors_decodes_the_same_weight(bits, group, grid):
    q = quantized(f"w{bits}a16_{group}_{grid}")
    found = PackedQuantizationCompressor.decompress(to_tensors(q), their_scheme(q.scheme))
    # Both take the product of an integer and a float16 scale and round it once to float16.
    assert torch.equal(found["weight"], dequantize(q, torch.float16))


@pytest.mark.parametrize(
    "text", ["w3a16_g64_asym", "w5a16_grow_sym", "w6a16_grow_asym", "fp8", "bf16"]
)
def test_tensors_give_the_quantized_weight_back(text):
    q = quantized(text, n=7, k=128)
    back = from_tensors(to_tensors(q), q.scheme, 7, 128)
    for name in ("codes_NK", "scale_NG", "zero_NG"):
        mine, found = getattr(q, name), getattr(back, name)
        assert (mine is None) == (found is None), name
        if mine is not None:
            assert mine.dtype == found.dtype, name
            assert torch.equal(mine.float(), found.float()), name  # float8 has no comparison


@pytest.mark.parametrize(
    "text", ["w3a16_g64_asym", "w5a16_grow_sym", "w8a16_g128_asym", "fp8", "bf16"]
)
def test_announced_shapes_and_types_are_those_of_the_tensors(text):
    q = quantized(text, n=7, k=128)
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in to_tensors(q).items()}
    assert tensor_shapes(q.scheme, 7, 128) == shapes


def test_stored_bits_are_the_counted_ones_where_words_are_full():
    q = quantized("w3a16_g64_asym", n=32, k=128)
    tensors = to_tensors(q)
    del tensors["weight_shape"]
    stored = sum(8 * t.numel() * t.element_size() for t in tensors.values())
    assert stored == q.scheme.storage_bits(32, 128)


def test_tensors_of_a_weight_are_contiguous():
    # safetensors refuses others; zero points are packed along the other dimension.
    q = quantized("w4a16_g32_asym")
    part = QuantizedWeight(q.codes_NK[::2], q.scale_NG[::2], q.zero_NG[::2], q.scheme)
    assert all(tensor.is_contiguous() for tensor in to_tensors(part).values())
