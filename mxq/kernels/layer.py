"""A whole layer on packed weights: routed experts, or one linear, from bfloat16 to bfloat16.

    router's choice -> route -> gather and GEMM 1 -> gate -> GEMM 2 -> weighted sum

Nothing waits for the device, so a CUDA graph can record a call once its kernels are compiled.
"""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mxq.kernels.activation import Activation, combine, gate, prepare, sum_slices
from mxq.kernels.arena import GroupedWeights
from mxq.kernels.group_gemm import GroupGemm, Launches, Product
from mxq.kernels.reference import Inputs
from mxq.kernels.routing import Routing, TileTables, route
from mxq.kernels.spec import Input

PREPARED_TOKENS = (*range(1, 9), 12, 16, 24, 32, 48, 64)
"""Numbers of tokens whose tables a linear has from the start; others are made in each call."""


@dataclass(frozen=True, slots=True)
class Gate:
    """What is between the two products.

    ``activation`` names a function that the gate kernel computes; else ``function`` maps the
    results of the first product, gate and up beside each other [S, 2 I] (or up alone), to [S, I].
    ``after`` is applied to each expert's output [S, H], before its weight.
    """

    activation: Activation | None
    is_gated: bool = True
    function: Callable[[Tensor], Tensor] | None = None
    after: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError unless there is one of the two."""
        if (self.activation is None) == (self.function is None):
            raise ValueError("a gate is either the name of an activation or a function")


class ExpertLayer:
    """The routed experts of a layer.

    ``first`` holds the gate and up projections (problems 2e and 2e + 1, or e where there is no
    gate), ``second`` the down projections. ``is_rotated`` says that inputs are rotated.
    """

    def __init__(
        self,
        first: GroupedWeights,
        second: GroupedWeights,
        gate: Gate,
        *,
        is_rotated: bool,
        launches: Launches = "mixed",
    ) -> None:
        self.first, self.second, self.gate = first, second, gate
        self.is_rotated, self.launches = is_rotated, launches
        self.experts = int(second.problems[:, 6].max()) + 1
        self._gemms = GroupGemm(first, launches=launches), GroupGemm(second, launches=launches)
        for gemm in self._gemms:
            gemm.prepare()

    def __call__(self, hidden_TH: Tensor, index_TR: Tensor, weights_TR: Tensor) -> Tensor:
        """Weighted sum of each token's experts, bfloat16 [T, H].

        ``index_TR`` may hold any number outside of the experts for "no expert".
        """
        if len(index_TR) == 0:
            return torch.empty_like(hidden_TH)
        with _current(hidden_TH.device):
            return self._compute(hidden_TH, index_TR, weights_TR)

    def _compute(self, hidden_TH: Tensor, index_TR: Tensor, weights_TR: Tensor) -> Tensor:
        tokens, top_k = index_TR.shape
        first, second = (gemm.with_top_k(top_k) for gemm in self._gemms)
        routing = route(index_TR, self.experts)
        inputs = prepare(
            hidden_TH, self.is_rotated, first.inputs, with_plain=_has_floats(self.first)
        )
        inner = self._inner(first(inputs, routing, tokens), routing, second.inputs)
        # Row i of the second product is slot i of the first.
        by_slot = replace(routing, rows=_counting(routing.rows.numel(), hidden_TH.device))
        out = second(inner, by_slot, tokens)
        y_SN, partial = out.y_SN, out.partial_LSN
        if self.gate.after is not None:
            y_SN = sum_slices(y_SN, partial, out.splits_P, routing.experts)
            y_SN, partial = self.gate.after(y_SN).contiguous(), None
        return combine(y_SN, partial, out.splits_P, routing.experts, routing.slots, weights_TR)

    def _inner(self, product: Product, routing: Routing, kinds: Collection[Input]) -> Inputs:
        """The second product's inputs from the first one's results."""
        results = product.y_SN, product.partial_LSN, product.splits_P, routing.experts
        with_plain = _has_floats(self.second)
        if self.gate.activation is not None:
            return gate(
                *results,
                self.gate.activation,
                self.is_rotated,
                kinds,
                gated=self.gate.is_gated,
                with_plain=with_plain,
            )
        assert self.gate.function is not None
        z_SN = sum_slices(*results, parts=2 if self.gate.is_gated else 1)
        return prepare(self.gate.function(z_SN), self.is_rotated, kinds, with_plain=with_plain)


class LinearLayer:
    """One linear, bias included: a product of one problem."""

    def __init__(self, weights: GroupedWeights, *, is_rotated: bool) -> None:
        self.weights, self.is_rotated = weights, is_rotated
        self._gemm = GroupGemm(weights)
        self._gemm.prepare()
        self._tables = {}
        if weights.words.device.type == "cuda":
            with _current(weights.words.device):
                self._tables = {tokens: self._make_tables(tokens) for tokens in PREPARED_TOKENS}

    def __call__(self, x: Tensor) -> Tensor:
        """``W x + b``, bfloat16 [..., N]."""
        x_TK = x.reshape(-1, x.shape[-1])
        tokens = len(x_TK)
        shape = (*x.shape[:-1], self.weights.out_features)
        if tokens == 0:
            return x.new_empty(shape)
        with _current(x.device):
            return self._compute(x_TK).reshape(shape)

    def _compute(self, x_TK: Tensor) -> Tensor:
        tokens = len(x_TK)
        inputs = prepare(
            x_TK, self.is_rotated, self._gemm.inputs, with_plain=_has_floats(self.weights)
        )
        routing, tables = self._tables.get(tokens) or self._make_tables(tokens)
        out = self._gemm.launch(inputs, routing, tables, tokens)
        if out.partial_LSN is None:
            return out.y_SN
        return sum_slices(out.y_SN, out.partial_LSN, out.splits_P, routing.experts)

    def _make_tables(self, tokens: int) -> tuple[Routing, TileTables]:
        """All tokens go to the one problem, so the tables depend on their number alone."""
        device = self.weights.words.device
        routing = route(torch.zeros(tokens, 1, dtype=torch.int32, device=device), 1)
        return routing, self._gemm.tables(routing, tokens)


def _has_floats(weights: GroupedWeights) -> bool:
    """Whether a weight is plain bfloat16, which multiplies the unrotated input."""
    return any(form.w_bits == 16 for form in weights.formats)


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _counting(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device=device)
