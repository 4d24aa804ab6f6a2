"""Counts in sentences."""

import pytest

from mxq.counted import counted


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((0, "tensor"), "0 tensors"),
        ((1, "tensor"), "1 tensor"),
        ((2, "held-out token"), "2 held-out tokens"),
        ((12345, "block"), "12,345 blocks"),
        ((1, "entry", "entries"), "1 entry"),
        ((2, "entry", "entries"), "2 entries"),
    ],
    ids=lambda value: str(value),
)
def test_a_noun_is_in_the_plural_unless_there_is_one(arguments, said):
    assert counted(*arguments) == said
