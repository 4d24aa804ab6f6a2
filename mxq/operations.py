"""How many operations it takes to quantize blocks, counted; what a run is estimated to take."""

from collections.abc import Sequence

from mxq.blocks import LinearBlock, piece_sizes
from mxq.machine import Rates
from mxq.quantizers.descent import TURNS
from mxq.quantizers.kronecker import SWEEPS


def refine_again(blocks: Sequence[LinearBlock], rates: Rates) -> float:
    """Seconds to refine every block once more under the moments of its gradients.

    In each sweep every column passes those of its outputs a number of times, as a row of its own,
    and with others those of its inputs twice: within its group, and from there to all others.
    """
    rows = sum(2.0 * b.weights * (2 + TURNS) * max(piece_sizes(b.out_features)) for b in blocks)
    products = sum(4.0 * b.weights * b.in_features for b in blocks)
    return SWEEPS * (
        rows / rates.row_operations_per_second + products / rates.operations_per_second
    )


def one_scheme(blocks: Sequence[LinearBlock], rates: Rates, products: float) -> float:
    """Seconds to quantize every block once, by so many times N K^2 multiply-adds."""
    search = sum(block.weights for block in blocks) / rates.searched_weights_per_second
    operations = sum(2.0 * block.weights * block.in_features for block in blocks)
    return search + products * operations / rates.operations_per_second


def factors(blocks: Sequence[LinearBlock]) -> float:
    """Operations for the three factorizations of the second moments of all inputs."""
    return sum(2.0 * b.in_features**3 for b in blocks if not _shares_input(b))


def moments(share: float, blocks: Sequence[LinearBlock], tokens: int) -> float:
    """Operations for the second moments of all inputs; a routed expert sees that share of them."""
    return sum(
        2.0 * tokens * (1.0 if b.expert is None else share) * b.in_features**2
        for b in blocks
        if not _shares_input(b)
    )


def _shares_input(block: LinearBlock) -> bool:
    """Whether another block of its expert reads the same, so that nothing is computed twice."""
    return block.expert is not None and block.projection == "gate"
