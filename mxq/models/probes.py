"""From what a site saw to what each of its blocks saw: inputs, routing weights, gradients.

The experts of a layer share one captured input; the rows of an expert, the inner activation that
its down projection sees and the gradients inside it are computed from that when the expert's turn
comes, so memory does not grow with the number of experts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from mxq.models.adapter import Capture
from mxq.models.experts import Experts, expert_bias, expert_inner, routed_tokens, working_linear


@dataclass(frozen=True, slots=True)
class SiteInputs:
    """All calls of one site over all calibration tokens.

    The first ``fit_tokens`` rows may be fitted to; the rest are held out. ``grad_TN`` is the
    gradient of the summed loss at the site's output, None in a forward-only run.
    """

    site: str
    x_TK: Tensor
    index_TR: Tensor | None
    weights_TR: Tensor | None
    grad_TN: Tensor | None
    fit_tokens: int


@dataclass(frozen=True, slots=True)
class Probe:
    """What one block saw: its tokens only, fit rows first.

    ``z_TN`` is the block's own output, bias included; ``gate_T`` the routing weight of each token
    (ones for a plain linear). ``tokens`` reached the block in all, of which ``len(x_TK)`` are
    here. ``finish`` turns an output z into its contribution to the site's output, None for a
    plain linear.
    """

    block: str
    x_TK: Tensor
    z_TN: Tensor
    bias_N: Tensor | None
    gate_T: Tensor
    grad_TN: Tensor | None
    tokens: int
    fit_rows: int
    finish: Callable[[Tensor], Tensor] | None = None

    @property
    def share(self) -> float:
        """Part of the block's tokens that is here."""
        return len(self.x_TK) / max(self.tokens, 1)


def join_captures(captures: Sequence[Capture], grads: Sequence[Tensor], fit: int) -> SiteInputs:
    """One SiteInputs of the captures of all batches, in batch order."""
    first = captures[0]
    routed = first.index_TR is not None
    return SiteInputs(
        first.site,
        torch.cat([c.x_TK.detach() for c in captures]),
        torch.cat([c.index_TR for c in captures if c.index_TR is not None]) if routed else None,
        torch.cat([c.weights_TR.detach() for c in captures if c.weights_TR is not None])
        if routed
        else None,
        torch.cat(list(grads)) if grads else None,
        fit,
    )


def linear_probe(module: nn.Module, inputs: SiteInputs, *, max_tokens: int | None = None) -> Probe:
    """The probe of a plain linear: every token passes."""
    rows = _thin(torch.arange(len(inputs.x_TK)), max_tokens)
    x_TK = inputs.x_TK[rows]
    return Probe(
        block=inputs.site,
        x_TK=x_TK,
        z_TN=module(x_TK).detach(),
        bias_N=cast(Tensor | None, module.bias),
        gate_T=torch.ones(len(rows)),
        grad_TN=None if inputs.grad_TN is None else inputs.grad_TN[rows],
        tokens=len(inputs.x_TK),
        fit_rows=int((rows < inputs.fit_tokens).sum()),
    )


def expert_probes(
    module: nn.Module, inputs: SiteInputs, expert: int, *, max_tokens: int | None = None
) -> dict[str, Probe]:
    """``{projection: probe}`` of one expert; probes without rows where no token came."""
    assert inputs.index_TR is not None
    assert inputs.weights_TR is not None
    rows, positions = routed_tokens(inputs.index_TR, expert)
    tokens = len(rows)
    kept = _thin(torch.arange(len(rows)), max_tokens)
    rows, positions = rows[kept], positions[kept]
    gate_T = inputs.weights_TR[rows, positions].to(torch.float32)
    trace = _Trace(module, expert, inputs.x_TK[rows], gate_T)
    grads: Mapping[str, Tensor | None] = dict.fromkeys(trace.outputs)
    if inputs.grad_TN is not None and len(rows) > 0:
        grads = trace.gradients(inputs.grad_TN[rows])
    fit_rows = int((rows < inputs.fit_tokens).sum())
    return {
        projection: Probe(
            block=f"{inputs.site}.{expert}.{projection}",
            x_TK=trace.inputs[projection].detach(),
            z_TN=trace.outputs[projection].detach(),
            bias_N=expert_bias(module, expert, projection),
            gate_T=gate_T,
            grad_TN=grads[projection],
            tokens=tokens,
            fit_rows=fit_rows,
            finish=trace.finisher(projection),
        )
        for projection in trace.outputs
    }


class _Trace:
    """One run of one expert on its tokens, with the outputs of its projections in the graph."""

    def __init__(self, module: nn.Module, expert: int, x_TH: Tensor, gate_T: Tensor) -> None:
        self.experts, self.dense = cast(Experts, module), working_linear(module, expert)
        self.x_TH, self.gate_T = x_TH, gate_T
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        with torch.enable_grad():
            self.y_TH = self._finish(
                self._linear("down", expert_inner(self.experts, self._linear, x_TH))
            )

    def gradients(self, grad_TH: Tensor) -> dict[str, Tensor]:
        """Gradient at each projection's output, from the gradient at the site's output."""
        grads = torch.autograd.grad(
            self.y_TH, list(self.outputs.values()), grad_TH.to(self.y_TH.dtype)
        )
        return dict(zip(self.outputs, grads, strict=True))

    def finisher(self, projection: str) -> Callable[[Tensor], Tensor]:
        """Contribution to the site's output if this projection gave ``z`` instead."""
        outputs = {name: z.detach() for name, z in self.outputs.items()}

        def finish(z_TN: Tensor) -> Tensor:
            if projection == "down":
                return self._finish(z_TN)
            known = {**outputs, projection: z_TN}
            inner = expert_inner(self.experts, lambda p, x: known[p], self.x_TH)
            return self._finish(self.dense("down", inner))

        return finish

    def _linear(self, projection: str, x_TK: Tensor) -> Tensor:
        self.inputs[projection] = x_TK
        z_TN = self.dense(projection, x_TK)
        self.outputs[projection] = z_TN if z_TN.requires_grad else z_TN.requires_grad_()
        return self.outputs[projection]

    def _finish(self, z_TH: Tensor) -> Tensor:
        y_TH = self.experts.post_expert_norm(z_TH) if self.experts.has_post_expert_norm else z_TH
        return y_TH * self.gate_T[:, None].to(y_TH.dtype)


def _thin(rows: Tensor, limit: int | None) -> Tensor:
    """At most ``limit`` of the rows, evenly spaced, in order."""
    if limit is None or len(rows) <= limit:
        return rows
    picked = torch.linspace(0, len(rows) - 1, limit).round().to(torch.int64)
    return rows[picked]
