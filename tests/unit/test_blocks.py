"""Blocks: a rectangle of a parameter, read and written in place."""

import re

import pytest
import torch

from mxq.blocks import LinearBlock, read_block, write_block


def block(*, index=(), transposed=False, shape=(2, 3)):
    return LinearBlock(
        name="layers.0.experts.1.gate",
        layer=0,
        expert=1,
        projection="gate",
        out_features=shape[0],
        in_features=shape[1],
        tensor="model.layers.0.mlp.experts.gate_up_proj",
        module="model.layers.0.mlp.experts.1.gate_proj",
        index=index,
        transposed=transposed,
    )


def counting(*shape):
    """A parameter that holds 0, 1, 2, ... in the order of memory."""
    numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float32)
    return torch.nn.Parameter(numbers.reshape(shape))


def test_weights_are_counted():
    assert block(shape=(5, 7)).weights == 35


def test_a_block_without_index_is_the_whole_parameter():
    assert read_block(counting(2, 3), block()).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_an_index_selects_the_rectangle():
    # [2 experts, 4 rows, 3 inputs]: expert 1 starts at 12, and its odd rows at 15 and 21.
    found = read_block(counting(2, 4, 3), block(index=(1, slice(1, None, 2))))
    assert found.tolist() == [[15, 16, 17], [21, 22, 23]]


def test_a_transposed_block_is_read_as_out_by_in():
    found = read_block(counting(3, 4), block(index=(slice(None), slice(2)), transposed=True))
    assert found.tolist() == [[0, 4, 8], [1, 5, 9]]


def test_what_is_read_is_a_view_without_gradient():
    parameter = counting(2, 3)
    found = read_block(parameter, block())
    assert found.data_ptr() == parameter.data_ptr()
    assert not found.requires_grad


def test_writing_changes_the_rectangle_and_nothing_else():
    parameter = counting(2, 4, 3)
    before = parameter.detach().clone()
    place = block(index=(1, slice(0, 2)))
    write_block(parameter, place, torch.full((2, 3), -1.0))
    before[1, 0:2] = -1.0
    assert torch.equal(parameter, before)


def test_writing_a_transposed_block_turns_it_back():
    parameter = counting(3, 2)
    write_block(parameter, block(transposed=True), torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    assert parameter.tolist() == [[1, 4], [2, 5], [3, 6]]


def test_writing_casts_to_the_type_of_the_parameter():
    parameter = torch.nn.Parameter(torch.zeros(2, 3, dtype=torch.bfloat16))
    # 1 + 2^-9 lies a quarter of a bfloat16 step (2^-7) above 1.
    write_block(parameter, block(), torch.full((2, 3), 1.0 + 2**-9))
    assert parameter.tolist() == [[1.0] * 3] * 2


def test_a_parameter_of_another_shape_names_block_and_both_shapes():
    message = (
        "layers.0.experts.1.gate: model.layers.0.mlp.experts.gate_up_proj holds (3, 2), "
        "expected (2, 3)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        read_block(counting(3, 2), block())
