"""Own rows: which plan, which quantizer, and what the blocks are fitted to."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from accuracy.bench import Bench, budget_bits
from mxq.artifacts import Allocation, BlockInfo, SensitivityTable
from mxq.blocks import LinearBlock
from mxq.config import default_schemes
from mxq.curvature import Curvature
from mxq.profiling.losses import MeasureSettings
from mxq.profiling.measure import measure, measure_curvature
from mxq.profiling.sensitivity import SENSITIVITY
from mxq.quantizers import QUANTIZERS, Method
from mxq.scheme import Scheme, parse_schemes
from mxq.search.allocate import allocate, uniform
from mxq.workspace import make_provenance

MXMOE_SCHEMES = "w2a16_g128_asym,w3a16_g128_asym,w4a16_grow_asym,w4a16_g128_asym,w8a16_grow_asym"
"""The weight-only candidates of MxMoE's 2.25 and 3.25 bit rows that have a storage format here."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a row of mxq is made.

    ``plan`` is uniform, uniform-rotated, mxmoe or mxq; ``target`` one of ``mxq.config.TARGETS``.
    """

    plan: str
    quantizer: str
    target: str

    @property
    def method(self) -> Method:
        """The quantizer to measure and to pack with."""
        return method_of(self.quantizer)


def method_of(quantizer: str) -> Method:
    """A quantizer by its name."""
    return Method(quantizer, QUANTIZERS[quantizer])


OWN: Mapping[str, Recipe] = {
    "rtn": Recipe("uniform", "rtn", "local"),
    "gptq": Recipe("uniform", "gptq", "local"),
    "gptq-rotated": Recipe("uniform-rotated", "gptq", "local"),
    "mxmoe": Recipe("mxmoe", "gptq", "local"),
    "mxq-fast": Recipe("mxq", "gptq", "local"),
    "mxq": Recipe("mxq", "refined", "stream"),
    "mxq-best": Recipe("mxq", "kronecker", "stream"),
}
"""Rows that mxq makes; ``mxq`` is what it does when nothing is said."""


@dataclass(slots=True)
class Tables:
    """The sensitivity tables of one bench, each measured when it is first asked for."""

    bench: Bench
    found: dict[tuple[str, str], SensitivityTable] = field(default_factory=dict)
    seconds: dict[tuple[str, str], float] = field(default_factory=dict)
    curvatures: dict[int, Curvature] = field(default_factory=dict)

    def curvature(self, recipe: Recipe) -> Mapping[int, Curvature] | None:
        """What is known of gradients by layer, for a quantizer that makes use of them."""
        if not recipe.method.reads_gradients:
            return None
        if not self.curvatures:
            bench, draws = self.bench, torch.Generator().manual_seed(self.bench.seed)
            keep = self.curvatures.__setitem__
            measure_curvature(bench.adapter, bench.batches, keep, generator=draws)
        return self.curvatures

    def get(self, metric: str, method: Method) -> SensitivityTable:
        """The table of a metric and a quantizer."""
        key = (metric, method.name)
        if key not in self.found:
            started = time.perf_counter()
            self.found[key] = self._measure(metric, method)
            self.seconds[key] = round(time.perf_counter() - started, 1)
        return self.found[key]

    def _measure(self, metric: str, method: Method) -> SensitivityTable:
        widths = {block.in_features for block in self.bench.blocks}
        is_mxmoe = metric == "layer_out"
        schemes = parse_schemes(MXMOE_SCHEMES) if is_mxmoe else default_schemes(widths)
        rotation = "on" if is_mxmoe else "auto"
        return measure_table(self.bench, metric, method, schemes, rotation)


def measure_table(
    bench: Bench, metric: str, method: Method, schemes: tuple[Scheme, ...], rotation: str
) -> SensitivityTable:
    """The losses of a bench's blocks under some schemes."""
    return measure(
        bench.adapter,
        bench.batches,
        MeasureSettings(schemes, SENSITIVITY[metric], metric, method, rotation),
        make_provenance("", "", {}),
        generator=torch.Generator().manual_seed(bench.seed),
    )


def make_plan(tables: Tables, recipe: Recipe, size: str) -> tuple[Allocation, float]:
    """The plan of a recipe at a size, and the seconds that its table took."""
    bits = budget_bits(tables.bench.blocks, size)
    if recipe.plan == "mxmoe":
        # MxMoE: rotated GPTQ, norm of the layer's output, a budget for each layer, gate = up.
        table = tables.get("layer_out", recipe.method)
        plan = allocate(table, bits=bits, objective="mxmoe", r=1.0, tie_gate_up=True)
        return plan, tables.seconds["layer_out", recipe.quantizer]
    if recipe.plan == "mxq":
        # Losses are measured without what gradients say of outputs: as the refined ones.
        method = OWN["mxq"].method if recipe.method.reads_gradients else recipe.method
        table = tables.get("fisher", method)
        return allocate(table, bits=bits), tables.seconds["fisher", method.name]
    # Only what a uniform plan is predicted to lose comes of the table; it needs none to be made.
    table = tables.get("fisher", OWN["gptq"].method)
    is_rotated = recipe.plan == "uniform-rotated"
    layers = sorted({block.layer for block in table.blocks}) if is_rotated else ()
    plan = _uniform(table, Scheme.parse(size.partition("=")[0]))
    return replace(plan, rotated_layers=tuple(layers)), 0.0


def _uniform(table: SensitivityTable, scheme: Scheme) -> Allocation:
    """The uniform plan; its loss is not predicted where the table lacks the scheme."""
    if scheme in table.schemes:
        return uniform(table, scheme)
    return uniform_plan(table.blocks, scheme, table.unit)


def uniform_plan(
    blocks: Sequence[LinearBlock] | Sequence[BlockInfo], scheme: Scheme, unit: str
) -> Allocation:
    """One scheme for all blocks; nothing is predicted."""
    shapes = [(block.out_features, block.in_features) for block in blocks]
    return Allocation(
        schemes={block.name: scheme for block in blocks},
        predicted_loss=math.nan,
        bound=math.nan,
        proven=False,
        storage_bits=sum(scheme.storage_bits(*shape) for shape in shapes),
        weights=sum(n * k for n, k in shapes),
        asked_bits=0.0,
        unit=unit,
        description=f"uniform {scheme}",
    )
