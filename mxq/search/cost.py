"""What a block costs under a scheme: exact storage, and latency by the roofline of a device.

A roofline is a model, not a measurement: it knows bytes and arithmetic, not kernels. Whoever
reports one of its numbers says so with ``CostModel.describe``.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mxq.artifacts import BlockInfo
from mxq.scheme import Scheme
from mxq.search.problem import Matrix

_DEVICES = Path(__file__).parent / "devices"
_ARITHMETIC = ("bf16", "int8", "fp8", "int4")


def storage_cost(blocks: Sequence[BlockInfo], schemes: Sequence[Scheme]) -> Matrix:
    """Stored bits of each block under each scheme, [B, S]; exact integers."""
    shapes = [(block.out_features, block.in_features) for block in blocks]
    rows = {shape: [scheme.storage_bits(*shape) for scheme in schemes] for shape in set(shapes)}
    return np.array([rows[shape] for shape in shapes], dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Device:
    """Rates of a device as its file states them, and where each number comes from.

    ``bandwidth_gb_s`` is what a copy achieves, ``tflop_s`` the dense rate of each arithmetic,
    None where the device lacks it. ``launch_us`` is the time of an empty kernel.
    """

    name: str
    bandwidth_gb_s: float
    tflop_s: Mapping[str, float | None]
    sm_count: int
    launch_us: float
    sources: Mapping[str, str]

    def rate(self, scheme: Scheme) -> float:
        """TFLOP/s of the arithmetic that a scheme runs in, or of the next wider one there is."""
        for arithmetic in _arithmetics(scheme):
            rate = self.tflop_s[arithmetic]
            if rate is not None:
                return rate
        raise ValueError(f"device {self.name!r} has no bf16 rate")


def load_device(name_or_path: str | Path) -> Device:
    """A device by its name, or from a JSON file of the same form.

    Raises:
        ValueError: If there is no such device, with the names there are, or a field is missing.
    """
    text = str(name_or_path)
    path = _DEVICES / f"{text}.json"
    if text.endswith(".json"):
        path = Path(text)
    if not path.is_file():
        menu = ", ".join(sorted(file.stem for file in _DEVICES.glob("*.json")))
        raise ValueError(f"no device {text!r}; choose one of {menu}, or give a JSON file")
    try:
        return _device(json.loads(path.read_text()))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not a device file ({type(error).__name__}: {error}); "
            "compare it with mxq/search/devices/h200.json"
        ) from error


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
    """Latency of blocks by the roofline of a device."""

    device: Device

    def describe(self) -> str:
        """Where the latencies come from, for a report."""
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
        step: a projection of a site is one launch, whose overhead its blocks share equally.
        """
        _check_tokens(blocks, tokens, calibration_tokens)
        share_B = _share(blocks, calibration_tokens)
        read_B = 1 - (1 - share_B) ** tokens
        token_B = tokens * share_B
        launch_B = self.device.launch_us / _launch_mates(blocks)
        columns = [self._column(blocks, scheme, read_B, token_B) for scheme in schemes]
        return np.stack(columns, axis=1) + launch_B[:, None]

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


def _arithmetics(scheme: Scheme) -> tuple[str, ...]:
    if scheme.kind == "fp8":
        return ("fp8", "bf16")
    if scheme.a_bits == 16:
        return ("bf16",)
    return ("int4", "int8", "bf16") if scheme.a_bits == 4 else ("int8", "bf16")


def _device(fields: Mapping[str, Any]) -> Device:
    rates = {name: fields["tflop_s"][name]["value"] for name in _ARITHMETIC}
    sources = {name: fields["tflop_s"][name]["source"] for name in _ARITHMETIC}
    for name in ("bandwidth_gb_s", "sm_count", "launch_us"):
        sources[name] = fields[name]["source"]
    return Device(
        name=fields["name"],
        bandwidth_gb_s=float(fields["bandwidth_gb_s"]["value"]),
        tflop_s={name: None if rate is None else float(rate) for name, rate in rates.items()},
        sm_count=int(fields["sm_count"]["value"]),
        launch_us=float(fields["launch_us"]["value"]),
        sources=sources,
    )


def _check_tokens(blocks: Sequence[BlockInfo], tokens: float, calibration_tokens: int) -> None:
    if not tokens > 0:
        raise ValueError(f"{tokens} tokens in a step; give a positive number")
    if calibration_tokens < 1:
        raise ValueError("the table has no calibration tokens, so no expert has a share of them")
    for block in blocks:
        if block.expert is not None and block.tokens > calibration_tokens:
            raise ValueError(
                f"{block.name} got {block.tokens} of {calibration_tokens} calibration tokens"
            )


def _share(blocks: Sequence[BlockInfo], calibration_tokens: int) -> Matrix:
    counts = [calibration_tokens if block.expert is None else block.tokens for block in blocks]
    return np.array(counts, dtype=np.float64) / calibration_tokens


def _launch_mates(blocks: Sequence[BlockInfo]) -> Matrix:
    """With how many blocks, itself included, each one shares a launch."""
    launches = [(block.site, block.projection) for block in blocks]
    counts = Counter(launches)
    return np.array([counts[launch] for launch in launches], dtype=np.float64)
