"""What the stages hand to each other: frozen values with their provenance.

``search`` reads and writes these too, so nothing here needs torch: tensors of an artifact live in
``mxq.storage`` files beside the JSON.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mxq.scheme import Scheme


@dataclass(frozen=True, slots=True)
class Provenance:
    """What an artifact was made from; a later stage refuses one that does not fit.

    ``settings`` are the options that change the result; ``versions`` are for the reader.
    """

    model_digest: str
    calibration_digest: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """The numbers of one linear block that an allocation needs: no tensor, no file.

    ``site`` groups blocks that an engine holds together: the experts of one layer share a site,
    every other linear is a site of its own. ``tokens`` is how many calibration tokens reached it.
    """

    name: str
    layer: int
    expert: int | None
    projection: str
    out_features: int
    in_features: int
    tokens: int
    site: str


@dataclass(frozen=True, slots=True)
class SensitivityTable:
    """Predicted loss of every block under every scheme.

    ``loss[b][s]`` is the loss of ``blocks[b]`` at ``schemes[s]`` in ``unit``, infinite where the
    scheme does not fit the block. ``calibration_tokens`` is the number of tokens behind it.
    ``quantizer[b][s]`` names the quantizer that was the better one on held-out activations.
    ``rotated_layers`` are the layers whose block inputs are rotated.
    """

    blocks: tuple[BlockInfo, ...]
    schemes: tuple[Scheme, ...]
    loss: tuple[tuple[float, ...], ...]
    quantizer: tuple[tuple[str, ...], ...]
    metric: str
    unit: str
    calibration_tokens: int
    rotated_layers: tuple[int, ...]
    provenance: Provenance

    def __post_init__(self) -> None:
        """Raise ValueError unless the table is rectangular."""
        shape = (len(self.blocks), len(self.schemes))
        for name, rows in (("loss", self.loss), ("quantizer", self.quantizer)):
            if len(rows) != shape[0] or any(len(row) != shape[1] for row in rows):
                raise ValueError(f"{name} is not {shape[0]} blocks x {shape[1]} schemes")


@dataclass(frozen=True, slots=True)
class Allocation:
    """One scheme for every block, and what the solver knows about it.

    ``predicted_loss`` is the sum of the chosen entries, ``bound`` a proven lower bound of the best
    sum under the same budgets, ``proven`` says whether the two agree to the solver's gap.
    ``predicted_latency_us`` is None where no latency was asked for. ``engine`` is whose rules the
    plan keeps, None for mxq's own runtime, ``tensor_parallel`` its ranks, and ``unrestricted_loss``
    the least loss found without those rules, None where it was not looked for. ``pinned`` are the
    experts that the plan had to give its widest schemes, with how many times their outputs are
    those of their layer.
    """

    schemes: Mapping[str, Scheme]
    predicted_loss: float
    bound: float
    proven: bool
    storage_bits: int
    weights: int
    asked_bits: float
    unit: str
    description: str
    rotated_layers: tuple[int, ...] = ()
    predicted_latency_us: float | None = None
    latency_source: str | None = None
    engine: str | None = None
    tensor_parallel: int = 1
    unrestricted_loss: float | None = None
    pinned: Mapping[str, float] = field(default_factory=dict)

    @property
    def engine_cost(self) -> float | None:
        """What the engine's rules cost in predicted loss; None where that is not known."""
        if self.unrestricted_loss is None:
            return None
        return self.predicted_loss - self.unrestricted_loss

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of the blocks, metadata included, per weight."""
        return self.storage_bits / self.weights


@dataclass(frozen=True, slots=True)
class MeasuredLayers:
    """What each layer of a plan costs by itself, measured on held-out text.

    ``kl`` is KL(original || original with that one layer quantized) by layer, in nats per token
    over ``tokens`` positions. ``plan`` is the digest of the plan.
    """

    tokens: int
    kl: tuple[float, ...]
    plan: str
    provenance: Provenance


@dataclass(frozen=True, slots=True)
class KernelCase:
    """A launch of a kernel with one format: ``experts`` products of ``tokens`` tokens each.

    ``tile`` is the kernel's tile in tokens, ``copies`` the number of copies of the weights that the
    launch goes round, so that none is in a cache. No tokens at all is a launch without tiles.
    """

    scheme: Scheme
    tile: int
    experts: int
    tokens: int
    out_features: int
    in_features: int
    copies: int = 1

    def __post_init__(self) -> None:
        """Raise ValueError for a launch of nothing."""
        sizes = (self.tile, self.experts, self.out_features, self.in_features, self.copies)
        if min(sizes) < 1 or self.tokens < 0:
            raise ValueError(f"a launch of {self.scheme} without products, sizes or copies")


@dataclass(frozen=True, slots=True)
class KernelTiming:
    """How long a launch took: percentiles over ``count`` replays."""

    case: KernelCase
    count: int
    median_us: float
    p10_us: float
    p90_us: float

    def __post_init__(self) -> None:
        """Raise ValueError for what no clock shows."""
        if self.count < 1 or not 0 < self.p10_us <= self.median_us <= self.p90_us < 1e9:
            raise ValueError(
                f"{self.p10_us:g}, {self.median_us:g}, {self.p90_us:g} us are not percentiles of "
                f"{self.count} times of {self.case.scheme}"
            )
