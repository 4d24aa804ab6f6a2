"""From what a site saw to what each of its blocks saw: inputs, routing weights, gradients.

The experts of a layer share one captured input; the rows of an expert, the inner activation that
its down projection sees and the gradients inside it are computed from that when the expert's turn
comes, so memory does not grow with the number of experts. Captures are on the host, probes on the
device of their module.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from mxq.models.activations import ActivationStore
from mxq.models.adapter import Capture
from mxq.models.experts import Experts, expert_bias, expert_inner, routed_tokens, working_linear


@dataclass(frozen=True, slots=True)
class SiteInputs:
    """All calls of one site over all calibration tokens.

    The first ``fit_tokens`` rows may be fitted to; the rest are held out. ``grad_TN`` is the
    gradient of the summed loss at the site's output, None in a forward-only run. ``store`` is where
    the tensors are kept.
    """

    site: str
    x_TK: Tensor
    index_TR: Tensor | None
    weights_TR: Tensor | None
    grad_TN: Tensor | None
    fit_tokens: int
    store: ActivationStore

    def rows(self, rows: Tensor, device: torch.device) -> Tensor:
        """Those rows of the input, ascending, on a device; the input itself if it is all that."""
        is_all = len(rows) == len(self.x_TK)
        x_TK = self.x_TK if is_all else self.store.rows(self.x_TK, rows)
        return x_TK.to(device)

    def grads(self, rows: Tensor, device: torch.device) -> Tensor | None:
        """Those rows of the gradient, on a device."""
        return None if self.grad_TN is None else self.store.rows(self.grad_TN, rows).to(device)


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


class Captures:
    """What the sites of a layer saw in each batch, kept by a store until it is joined.

    Sites that read the same tensor share it, and what it is joined to.
    """

    def __init__(self, store: ActivationStore) -> None:
        self.store = store
        self._captures: dict[str, list[Capture]] = {}
        self._grads: dict[str, list[Tensor]] = {}
        # By storage and view; the original stays alive, so that no other tensor takes its address.
        self._seen: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def add(self, capture: Capture) -> int:
        """Keep what one call saw, without its output; its place among the calls of its site."""
        calls = self._captures.setdefault(capture.site, [])
        calls.append(
            Capture(
                capture.site,
                self._kept(capture.x_TK),
                None,
                None if capture.index_TR is None else capture.index_TR.cpu(),
                None if capture.weights_TR is None else capture.weights_TR.detach().cpu(),
            )
        )
        return len(calls) - 1

    def add_grad(self, site: str, place: int, grad_TN: Tensor) -> None:
        """Keep the gradient at the output of that call of a site."""
        grads = self._grads.setdefault(site, [])
        grads.extend(torch.zeros(0) for _ in range(place + 1 - len(grads)))
        grads[place] = self.store.keep(grad_TN.detach().flatten(0, -2))

    def end_batch(self) -> None:
        """Call it when a batch has run: what lies in files leaves memory."""
        for _, kept in self._seen.values():
            self.store.release(kept)
        for grads in self._grads.values():
            self.store.release(grads[-1])
        self._seen.clear()

    def join(self, fit_tokens: int) -> dict[str, SiteInputs]:
        """Inputs of every site over all batches, in batch order; nothing is left here."""
        joined: dict[tuple[int, ...], Tensor] = {}
        sites = {}
        for site, captures in self._captures.items():
            key = tuple(id(capture.x_TK) for capture in captures)
            if key not in joined:
                joined[key] = self.store.join([capture.x_TK for capture in captures])
            grads = self._grads.pop(site, None)
            sites[site] = _site_inputs(captures, joined[key], grads, fit_tokens, self.store)
        self._captures.clear()
        return sites

    def _kept(self, x_TK: Tensor) -> Tensor:
        storage = x_TK.untyped_storage().data_ptr(), x_TK.storage_offset(), x_TK._version
        key = (*storage, tuple(x_TK.shape), x_TK.stride())
        if key not in self._seen:
            self._seen[key] = x_TK, self.store.keep(x_TK.detach())
        return self._seen[key][1]


def _site_inputs(
    captures: Sequence[Capture],
    x_TK: Tensor,
    grads: Sequence[Tensor] | None,
    fit_tokens: int,
    store: ActivationStore,
) -> SiteInputs:
    routed = [c for c in captures if c.index_TR is not None and c.weights_TR is not None]
    return SiteInputs(
        captures[0].site,
        x_TK,
        torch.cat([c.index_TR for c in routed if c.index_TR is not None]) if routed else None,
        torch.cat([c.weights_TR for c in routed if c.weights_TR is not None]) if routed else None,
        None if grads is None else store.join(grads),
        fit_tokens,
        store,
    )


def linear_probe(
    module: nn.Module,
    inputs: SiteInputs,
    *,
    max_tokens: int | None = None,
    with_output: bool = True,
) -> Probe:
    """The probe of a plain linear: every token passes.

    Without its output ``z_TN`` has no rows: for all tokens it would be as large as the input.
    """
    rows = _thin(torch.arange(len(inputs.x_TK)), max_tokens)
    device = device_of(module)
    x_TK = inputs.rows(rows, device)
    return Probe(
        block=inputs.site,
        x_TK=x_TK,
        z_TN=module(x_TK if with_output else x_TK[:0]).detach(),
        bias_N=cast(Tensor | None, module.bias),
        gate_T=torch.ones(len(rows), device=device),
        grad_TN=inputs.grads(rows, device),
        tokens=len(inputs.x_TK),
        fit_rows=int((rows < inputs.fit_tokens).sum()),
    )


@dataclass(frozen=True, slots=True)
class ExpertInputs:
    """What one expert receives: [T, H], its routing weights, and which rows are here.

    ``tokens`` came in all, the ``fit_rows`` of those that are here come first.
    """

    module: nn.Module
    inputs: SiteInputs
    expert: int
    rows: Tensor
    x_TH: Tensor
    gate_T: Tensor
    tokens: int
    fit_rows: int

    def probe(self, projection: str) -> Probe:
        """A probe without output, of the expert as its weights are now.

        Before the down projection nothing is computed: what reads the same input shares it.
        """
        x_TK = self.inner_of(self.x_TH) if projection == "down" else self.x_TH
        return self._probe(projection, x_TK, x_TK.new_zeros(0, 0), None, None)

    def inner_of(self, x_TH: Tensor) -> Tensor:
        """What the expert's down projection reads for those inputs, as its weights are now."""
        linear = working_linear(self.module, self.expert)
        return expert_inner(cast(Experts, self.module), linear, x_TH)

    def probes(self) -> dict[str, Probe]:
        """``{projection: probe}``, with outputs and, where the site has them, gradients."""
        trace = _Trace(self.module, self.expert, self.x_TH, self.gate_T)
        grads: Mapping[str, Tensor | None] = dict.fromkeys(trace.outputs)
        grad_TH = self.inputs.grads(self.rows, self.x_TH.device)
        if grad_TH is not None and len(self.rows) > 0:
            grads = trace.gradients(grad_TH)
        return {
            name: self._probe(
                name,
                trace.inputs[name].detach(),
                trace.outputs[name].detach(),
                grads[name],
                trace.finisher(name),
            )
            for name in trace.outputs
        }

    def _probe(
        self,
        projection: str,
        x_TK: Tensor,
        z_TN: Tensor,
        grad_TN: Tensor | None,
        finish: Callable[[Tensor], Tensor] | None,
    ) -> Probe:
        return Probe(
            block=f"{self.inputs.site}.{self.expert}.{projection}",
            x_TK=x_TK,
            z_TN=z_TN,
            bias_N=expert_bias(self.module, self.expert, projection),
            gate_T=self.gate_T,
            grad_TN=grad_TN,
            tokens=self.tokens,
            fit_rows=self.fit_rows,
            finish=finish,
        )


def expert_inputs(
    module: nn.Module, inputs: SiteInputs, expert: int, *, max_tokens: int | None = None
) -> ExpertInputs:
    """What the router sent to one expert; no rows where no token came."""
    assert inputs.index_TR is not None
    assert inputs.weights_TR is not None
    rows, positions = routed_tokens(inputs.index_TR, expert)
    kept = _thin(torch.arange(len(rows)), max_tokens)
    tokens, rows, positions = len(rows), rows[kept], positions[kept]
    device = device_of(module)
    return ExpertInputs(
        module,
        inputs,
        expert,
        rows,
        inputs.rows(rows, device),
        inputs.weights_TR[rows, positions].to(device, torch.float32),
        tokens,
        int((rows < inputs.fit_tokens).sum()),
    )


def device_of(module: nn.Module) -> torch.device:
    """Where a site computes."""
    return next(module.parameters()).device


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
