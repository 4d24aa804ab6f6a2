"""A linear block is one weight that gets one scheme: a rectangle of one tensor of a model.

The name is the key of every table of mxq: ``layers.3.experts.17.gate`` is the gate projection of
routed expert 17 in decoder layer 3, ``layers.3.shared_expert.up_proj`` an ordinary linear.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

PIECE_ROWS = 2048
"""Most outputs of a block whose errors make up for each other."""


@dataclass(frozen=True, slots=True)
class LinearBlock:
    """Where one weight lives.

    ``tensor`` is the parameter's name in the transformers module tree and ``index`` selects the
    block's rectangle in it. ``transposed`` means that the rectangle is stored [in, out].
    ``module`` is the path under which the packed weight is stored in a checkpoint.
    ``expert`` is None for a linear that every token passes.
    """

    name: str
    layer: int
    expert: int | None
    projection: str
    out_features: int
    in_features: int
    tensor: str
    module: str
    index: tuple[int | slice, ...] = ()
    transposed: bool = False

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features


def read_block(parameter: Tensor, block: LinearBlock) -> Tensor:
    """The block's weight as a view of its parameter, [out_features, in_features]."""
    view = parameter.detach()[block.index] if block.index else parameter.detach()
    view = view.T if block.transposed else view
    if view.shape != (block.out_features, block.in_features):
        raise ValueError(
            f"{block.name}: {block.tensor} holds {tuple(view.shape)}, "
            f"expected {(block.out_features, block.in_features)}"
        )
    return view


def write_block(parameter: Tensor, block: LinearBlock, w_NK: Tensor) -> None:
    """Overwrite the block's rectangle of its parameter, cast to the parameter's type."""
    with torch.no_grad():
        read_block(parameter, block).copy_(w_NK)


def row_pieces(rows: int) -> list[slice]:
    """Outputs of a block in pieces of at most ``PIECE_ROWS``."""
    return [slice(first, first + PIECE_ROWS) for first in range(0, rows, PIECE_ROWS)]


def piece_sizes(rows: int) -> list[int]:
    """How many outputs each of the ``row_pieces`` has."""
    return [len(range(rows)[piece]) for piece in row_pieces(rows)]
