"""What a block costs under a scheme: exact storage, and latency on a device.

Latency comes from the times of the kernels' tiles where they are known, measured or from compiled
figures, and else from a roofline, which knows bytes and arithmetic but no kernel. Whoever reports
one of its numbers says which with ``CostModel.describe``.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mxq.artifacts import BlockInfo
from mxq.counted import counted
from mxq.scheme import Scheme
from mxq.search.device import Device
from mxq.search.kernel_cost import KernelModel
from mxq.search.launches import StepTime, kernel_latency, step_time
from mxq.search.problem import Matrix


def storage_cost(blocks: Sequence[BlockInfo], schemes: Sequence[Scheme]) -> Matrix:
    """Stored bits of each block under each scheme, [B, S]; exact integers."""
    shapes = [(block.out_features, block.in_features) for block in blocks]
    rows = {shape: [scheme.storage_bits(*shape) for scheme in schemes] for shape in set(shapes)}
    return np.array([rows[shape] for shape in shapes], dtype=np.float64)


class LatencyModel(Protocol):
    """What an allocation needs of a cost model."""

    def describe(self) -> str:
        """Where the latencies come from, for a report."""

    def latency_us(
        self,
        blocks: Sequence[BlockInfo],
        schemes: Sequence[Scheme],
        *,
        tokens: float,
        calibration_tokens: int,
    ) -> Matrix:
        """Expected microseconds of each block under each scheme for one step, [B, S]."""


@dataclass(frozen=True, slots=True)
class CostModel:
    """Latency of blocks on a device: by its kernels, or by its roofline where those are unknown.

    ``source`` says where the kernels' numbers come from; it is None with ``kernels``.
    """

    device: Device
    kernels: KernelModel | None = None
    source: str | None = None

    def describe(self) -> str:
        """Where the latencies come from, for a report."""
        if self.source is not None:
            return self.source
        return f"roofline of {self.device.name}"

    def latency_us(
        self,
        blocks: Sequence[BlockInfo],
        schemes: Sequence[Scheme],
        *,
        tokens: float,
        calibration_tokens: int,
    ) -> Matrix:
        """Expected microseconds of each block under each scheme for one step, [B, S].

        ``tokens`` enter the step. A routed expert gets the share of them that it got of the
        calibration tokens, and its weight is read only if at least one of them comes to it. A
        block that every token passes gets all of them. The sum over the blocks is the time of the
        step: blocks that run in one launch share its overhead equally, and its tiles share the
        multiprocessors evenly.
        """
        _check_tokens(blocks, tokens, calibration_tokens)
        share_B = _share(blocks, calibration_tokens)
        if self.kernels is not None:
            return kernel_latency(self.kernels, blocks, schemes, share_B, tokens)
        read_B = 1 - (1 - share_B) ** tokens
        token_B = tokens * share_B
        launch_B = self.device.launch_us / _launch_mates(blocks)
        columns = [self._column(blocks, scheme, read_B, token_B) for scheme in schemes]
        return np.stack(columns, axis=1) + launch_B[:, None]

    def step(
        self,
        blocks: Sequence[BlockInfo],
        schemes: Sequence[Scheme],
        *,
        tokens: int,
        calibration_tokens: int,
    ) -> StepTime | None:
        """A whole plan, ``schemes[b]`` for ``blocks[b]``, launch by launch; None for a roofline.

        Unlike the sum of ``latency_us`` it knows that a launch ends with its last tile.
        """
        _check_tokens(blocks, tokens, calibration_tokens)
        if self.kernels is None:
            return None
        share_B = _share(blocks, calibration_tokens)
        return step_time(self.kernels, blocks, schemes, share_B, tokens)

    def _column(
        self, blocks: Sequence[BlockInfo], scheme: Scheme, read_B: Matrix, token_B: Matrix
    ) -> Matrix:
        n_B = np.array([block.out_features for block in blocks], dtype=np.float64)
        k_B = np.array([block.in_features for block in blocks], dtype=np.float64)
        weight_bytes_B = storage_cost(blocks, [scheme])[:, 0] / 8
        # GB/s is 1e3 bytes, TFLOP/s is 1e6 operations in a microsecond.
        memory_us = read_B * weight_bytes_B / (self.device.bandwidth_gb_s * 1e3)
        compute_us = 2 * token_B * n_B * k_B / (self.device.rate(scheme) * 1e6)
        traffic_bytes_B = token_B * (k_B * scheme.a_bits / 8 + n_B * 2)
        traffic_us = traffic_bytes_B / (self.device.bandwidth_gb_s * 1e3)
        return np.maximum(memory_us, compute_us) + traffic_us


def _check_tokens(blocks: Sequence[BlockInfo], tokens: float, calibration_tokens: int) -> None:
    if not tokens > 0:
        raise ValueError(f"{tokens} tokens in a step; give a positive number")
    if calibration_tokens < 1:
        raise ValueError("the table has no calibration tokens, so no expert has a share of them")
    for block in blocks:
        if block.expert is not None and block.tokens > calibration_tokens:
            raise ValueError(
                f"{block.name} got {block.tokens} of "
                f"{counted(calibration_tokens, 'calibration token')}"
            )


def _share(blocks: Sequence[BlockInfo], calibration_tokens: int) -> Matrix:
    counts = [calibration_tokens if block.expert is None else block.tokens for block in blocks]
    return np.array(counts, dtype=np.float64) / calibration_tokens


def _launch_mates(blocks: Sequence[BlockInfo]) -> Matrix:
    """With how many blocks, itself included, each one shares a launch."""
    launches = [(block.site, block.projection) for block in blocks]
    counts = Counter(launches)
    return np.array([counts[launch] for launch in launches], dtype=np.float64)
