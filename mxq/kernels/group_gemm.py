"""One product of a layer on packed weights: picks the kernel for a workload and launches it.

``GroupGemm`` owns nothing but the weights and small tables. Which kernel runs is decided from the
number of tokens, which the host knows; which expert got how many stays on the device.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, log2
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mxq.counted import counted
from mxq.kernels.arena import GroupedWeights
from mxq.kernels.codegen import build, signature
from mxq.kernels.dispatch import default_dialect, kernel_folder, multiprocessors, shared_bytes
from mxq.kernels.reference import Inputs, RoundedInput
from mxq.kernels.routing import (
    Routing,
    TileTables,
    check_bound,
    column_tiles,
    tile_bound,
    tile_tables,
)
from mxq.kernels.spec import (
    TILE_PLANS,
    Branch,
    Dialect,
    Input,
    KernelSpec,
    TilePlan,
    WeightFormat,
    make_spec,
    single_specs,
    tile_plan,
)

BUCKETS = 16
"""Rows of the tile shapes of a format: one for each ceil(log2(tokens of an expert))."""

SPLIT_ROWS = 256
"""Most slots of a product whose sum over K may be cut: partial sums take slots x outputs x 4 B."""

MAX_SPLIT = 4

Launches = Literal["mixed", "single"]
"""One launch for all formats of a product, or one for each format."""


@dataclass(frozen=True, slots=True)
class Product:
    """Outputs bf16 [S, N]; where ``splits_P`` is above 1, the sum of so many partial ones instead.

    ``partial_LSN`` is float32 [slices, S, N], None where no problem can be split.
    """

    y_SN: Tensor
    partial_LSN: Tensor | None
    splits_P: Tensor


@dataclass(frozen=True, slots=True)
class _Workload:
    """A plan made ready for a product: its kernels, and which tile shape each format takes."""

    plan: TilePlan
    specs: tuple[KernelSpec, ...]
    kernels: tuple[Callable[..., Any], ...]
    shapes: Tensor


class GroupGemm:
    """Multiplies routed tokens with the weights of one product.

    ``top_k`` is the number of experts of a token (1 for a dense linear). ``launches`` "single"
    gives every format a launch of its own; ``specs`` replaces the kernels of every workload.

    Raises:
        ValueError: If the kernels given lack a format of the weights.
    """

    def __init__(
        self,
        weights: GroupedWeights,
        *,
        top_k: int = 1,
        launches: Launches = "mixed",
        specs: Sequence[KernelSpec] | None = None,
        dialect: Dialect | None = None,
        folder: Path | None = None,
    ) -> None:
        self.weights, self.top_k, self.launches = weights, top_k, launches
        self.folder = kernel_folder() if folder is None else folder
        self.dialect = default_dialect(weights.words.device) if dialect is None else dialect
        self._specs = None if specs is None else tuple(specs)
        if self._specs is not None:
            check_formats(weights.formats, self._specs)
        self._columns = column_tiles(weights.problems)
        self._workloads: dict[str, _Workload] = {}

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Kinds of input that the weights multiply."""
        return make_spec(self.weights.formats, tile_plan(1.0)).inputs

    def plan_for(self, tokens: int) -> TilePlan:
        """How kernels are shaped for that many tokens, by those of an expert that is reached."""
        experts = max(len(self._columns), 1)
        reached = experts * (1 - (1 - min(self.top_k / experts, 1.0)) ** max(tokens, 1))
        return tile_plan(tokens * self.top_k / max(reached, 1.0))

    def prepare(self, tokens: int | None = None) -> None:
        """Write and import the kernels for that many tokens, or of every plan; make their tables.

        What later calls keep is then there: memory that a graph's recorder gives must not stay.
        """
        for plan in TILE_PLANS if tokens is None else (self.plan_for(tokens),):
            self._workload(plan)

    def with_top_k(self, top_k: int) -> "GroupGemm":
        """The same product, kernels and tables for another number of experts of a token."""
        other = copy(self)
        other.top_k = top_k
        return other

    def __call__(self, inputs: Inputs, routing: Routing, tokens: int) -> Product:
        """The product of every assignment, by slot.

        ``tokens`` is the T of the routing. Nothing here waits for the device.

        Raises:
            ValueError: If the routing is of another number of tokens, or a kind of input that the
                weights need is None.
        """
        return self.launch(inputs, routing, self.tables(routing, tokens), tokens)

    def tables(self, routing: Routing, tokens: int) -> TileTables:
        """The tile tables of a routing; those of a dense product depend on ``tokens`` alone.

        Raises:
            ValueError: If the routing is of another number of tokens.
        """
        self._check(routing.rows.numel(), tokens)
        work = self._workload(self.plan_for(tokens))
        limits = self._limits(work, tokens)
        return tile_tables(
            routing,
            self.weights.problems,
            self.weights.format_index,
            work.shapes,
            launches=len(work.specs),
            bound=tile_bound(tokens, self.top_k, self._columns, **limits),
            target_tiles=limits["target_tiles"],
            max_split=limits["max_split"],
        )

    def launch(self, inputs: Inputs, routing: Routing, tables: TileTables, tokens: int) -> Product:
        """Multiply by the tiles of a table, one launch for each kernel.

        Raises:
            ValueError: If the routing is of another number of tokens, the table has no room for
                so many, or a kind of input that the weights need is None.
        """
        work = self._workload(self.plan_for(tokens))
        slots, width = routing.rows.numel(), self.weights.out_features
        self._check(slots, tokens)
        bound = tables.tiles.shape[1]
        check_bound(tokens, self.top_k, self._columns, bound, **self._limits(work, tokens))
        device = self.weights.words.device
        y_SN = torch.empty(slots, width, dtype=torch.bfloat16, device=device)
        partial = None
        max_split = self._max_split(work.plan, tokens)
        if max_split > 1:
            partial = torch.empty(max_split, slots, width, dtype=torch.float32, device=device)
        arguments = {
            "y_ptr": y_SN,
            "partial_ptr": self.weights.bias if partial is None else partial,
            "words_ptr": self.weights.words,
            "meta_ptr": self.weights.meta,
            "bias_ptr": self.weights.bias,
            "problems_ptr": self.weights.problems,
            "rows_ptr": routing.rows,
            "stride_y": width,
            "stride_x": _width(inputs),
            # Without slices a constant: Triton compiles anew for a number that needs 64 bits.
            "stride_slice": width if partial is None else slots * width,
            **_input_arguments(inputs),
        }
        for index, (spec, kernel) in enumerate(zip(work.specs, work.kernels, strict=True)):
            arguments["tiles_ptr"] = tables.tiles[index]
            arguments["tile_count_ptr"] = tables.counts[index:]
            _launch(kernel, spec, bound, arguments)
        return Product(y_SN, partial, tables.splits)

    def _check(self, slots: int, tokens: int) -> None:
        # Programs are launched for the tiles of these tokens: more would stay without a result.
        if slots != tokens * self.top_k:
            raise ValueError(
                f"a routing of {counted(slots, 'assignment')} is not one of "
                f"{counted(tokens, 'token')} with {counted(self.top_k, 'expert')} each; pass the "
                "tokens of the routing"
            )

    def _limits(self, work: _Workload, tokens: int) -> dict[str, int]:
        """What the tile table of so many tokens depends on, beside their routing."""
        return {
            "smallest_tile": min(branch.tokens for spec in work.specs for branch in spec.branches),
            "target_tiles": work.plan.ctas_per_sm * multiprocessors(self.weights.words.device),
            "max_split": self._max_split(work.plan, tokens),
        }

    def _max_split(self, plan: TilePlan, tokens: int) -> int:
        small = tokens * self.top_k <= SPLIT_ROWS
        return MAX_SPLIT if small and plan.ctas_per_sm > 2 else 1

    def _workload(self, plan: TilePlan) -> _Workload:
        work = self._workloads.get(plan.name)
        if work is None:
            work = self._make_workload(plan)
            self._workloads[plan.name] = work
        return work

    def _make_workload(self, plan: TilePlan) -> _Workload:
        specs = self._specs
        if specs is None:
            spec = make_spec(
                self.weights.formats,
                plan,
                has_bias=self._has_bias,
                dialect=self.dialect,
                shared_bytes=shared_bytes(self.weights.words.device),
            )
            specs = (spec,) if self.launches == "mixed" else single_specs(spec)
        specs = tuple(replace(spec, dialect=self.dialect) for spec in specs)
        kernels = tuple(build(spec, self.folder).group_gemm for spec in specs)
        shapes = tile_shapes(self.weights.formats, specs)
        return _Workload(plan, specs, kernels, shapes.to(self.weights.words.device))

    @cached_property
    def _has_bias(self) -> bool:
        return self.weights.bias.numel() > 0


def tile_shapes(formats: Sequence[WeightFormat], specs: Sequence[KernelSpec]) -> Tensor:
    """int32 [F, BUCKETS, 4]: branch, tokens of its tile, launch, cost of a unit of K.

    An expert of up to 2**bucket tokens takes the smallest tile that holds them, or the largest.
    """
    rows = []
    for form in formats:
        places = sorted(
            (branch.tokens, launch, index, branch)
            for launch, spec in enumerate(specs)
            for index, branch in enumerate(spec.branches)
            if branch.format == form
        )
        for bucket in range(BUCKETS):
            fitting = [place for place in places if place[0] >= 2**bucket]
            tokens, launch, index, branch = fitting[0] if fitting else places[-1]
            rows.append((index, tokens, launch, unit_cost(branch)))
    return torch.tensor(rows, dtype=torch.int32).reshape(len(formats), BUCKETS, 4)


def unit_cost(branch: Branch) -> int:
    """Cycles of a multiprocessor for 128 inputs of a tile, to start the longest tiles first.

    The larger of reading the weights (17 bytes a cycle on an H200) and multiplying (8192 products
    a cycle in bfloat16, twice that with 8-bit operands).
    """
    form = branch.format
    read = 128 * 128 * form.w_bits / 8 / 17
    rate = 4096 if form.arithmetic == "bf16" else 8192
    return ceil(max(read, 128 * 128 * branch.tokens / rate))


def check_formats(formats: Sequence[WeightFormat], specs: Sequence[KernelSpec]) -> None:
    """Raise ValueError unless every format has its branches in exactly one kernel."""
    for form in formats:
        homes = [spec for spec in specs if any(b.format == form for b in spec.branches)]
        if len(homes) != 1:
            found = ", ".join(sorted({str(b.format) for spec in specs for b in spec.branches}))
            raise ValueError(
                f"{len(homes)} of the kernels given have a branch for {form} (their formats: "
                f"{found}); give exactly one kernel for each format of the weights"
            )


def bucket_of(tokens: int) -> int:
    """The row of ``tile_shapes`` for an expert of that many tokens."""
    return min(ceil(log2(max(tokens, 1))), BUCKETS - 1)


def _launch(
    kernel: Callable[..., Any], spec: KernelSpec, grid: int, arguments: dict[str, Any]
) -> None:
    values = []
    for name in signature(spec):
        value = arguments[name]
        if value is None:
            kind = name.removesuffix("_ptr")
            raise ValueError(f"a weight needs the input {kind!r}, which is None; make it too")
        values.append(value)
    options: dict[str, int] = {"num_warps": spec.num_warps}
    if spec.max_registers is not None:
        options["maxnreg"] = spec.max_registers
    kernel[(grid,)](*values, **options)  # type: ignore[index]  # a Triton kernel


def _width(inputs: Inputs) -> int:
    """Stride of a token, the same for every kind of input."""
    rounded = [item.values_TK for item in (inputs.int8, inputs.int4, inputs.fp8) if item]
    present = [item for item in (inputs.plain_TK, inputs.rotated_TK, *rounded) if item is not None]
    # Not its stride, which is any number where there is one token, and Triton compiles for it.
    return present[0].shape[1]


def _input_arguments(inputs: Inputs) -> dict[str, Any]:
    arguments: dict[str, Any] = {"plain_ptr": inputs.plain_TK, "bf16_ptr": inputs.rotated_TK}
    kinds: dict[str, RoundedInput | None] = {
        "int8": inputs.int8,
        "int4": inputs.int4,
        "fp8": inputs.fp8,
    }
    for kind, rounded in kinds.items():
        for part, field in (("", "values_TK"), ("_scale", "scale_T"), ("_sum", "sum_T")):
            value = None if rounded is None else getattr(rounded, field)
            arguments[f"{kind}{part}_ptr"] = value
    return arguments
