"""Sweeps over a model's layers: forward for activations, backward for gradients.

A backward sweep needs no more than one layer in memory either: a forward sweep keeps the input of
every layer, labels are sampled from the model's own predictions, and the layers are read again in
reverse order, each run with gradients from its kept input.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mxq.blocks import read_block
from mxq.models.adapter import Capture, ModelAdapter
from mxq.models.lockstep import LayerCall, hidden_of, run_in_lockstep
from mxq.models.probes import SiteInputs, join_captures
from mxq.numerics import check_finite

OnSites = Callable[[int, dict[str, SiteInputs], list[LayerCall]], None]
"""``(layer, inputs of its sites, calls)``; the layer's weights are in memory meanwhile."""

OnProgress = Callable[[str, int, int], None]
"""``(what, done, total)``."""


@dataclass(frozen=True, slots=True)
class Batches:
    """Token batches in order; the first ``fit`` of them may be fitted to, the rest are held out."""

    tokens: tuple[Tensor, ...]
    fit: int

    @property
    def heldout(self) -> tuple[Tensor, ...]:
        """The held-out batches."""
        return self.tokens[self.fit :]

    @property
    def fit_tokens(self) -> int:
        """Number of tokens of the fit batches."""
        return sum(batch.numel() for batch in self.tokens[: self.fit])

    @property
    def all_tokens(self) -> int:
        """Number of tokens of all batches."""
        return sum(batch.numel() for batch in self.tokens)


def make_batches(
    fit_ids: Tensor, heldout_ids: Tensor | None, *, batch_tokens: int = 4096
) -> Batches:
    """Cut samples [samples, sequence] into batches of about that many tokens."""
    rows = max(1, batch_tokens // fit_ids.shape[1])
    fit = torch.split(fit_ids, rows)
    held = () if heldout_ids is None else torch.split(heldout_ids, rows)
    return Batches((*fit, *held), len(fit))


def sweep_forward(
    adapter: ModelAdapter, batches: Batches, on_sites: OnSites, progress: OnProgress | None = None
) -> None:
    """Visit the layers in order with the inputs of their sites; weights stay the original ones.

    Raises:
        ValueError: If a weight is NaN or infinite, with the name of its block or parameter.
    """
    source = adapter.source

    def on_layer(layer: int, calls: list[LayerCall]) -> list[object]:
        source.load_layer(layer)
        _check_weights(adapter, layer)
        captures: dict[str, list[Capture]] = {}
        with adapter.recording(layer, _collector(captures)), torch.no_grad():
            outputs = [call.run() for call in calls]
        sites = {site: join_captures(c, (), batches.fit_tokens) for site, c in captures.items()}
        with torch.no_grad():
            on_sites(layer, sites, calls)
        source.free_layer(layer)
        _tell(progress, "forward", layer + 1, len(source.layers))
        return outputs

    run_in_lockstep(source.model, source.layers, batches.tokens, on_layer)


def sweep_backward(
    adapter: ModelAdapter,
    batches: Batches,
    on_sites: OnSites,
    *,
    generator: torch.Generator,
    progress: OnProgress | None = None,
) -> None:
    """Visit the layers in reverse order with inputs and gradients of their sites.

    The loss is the cross-entropy, summed over tokens, to labels sampled from the model itself.

    Raises:
        ValueError: If the family changes the hidden states between its decoder layers, so that a
            layer-wise backward pass would be wrong.
    """
    kept, grads = _forward_keeping_inputs(adapter, batches, generator, progress)
    source = adapter.source
    for layer in reversed(range(len(source.layers))):
        source.load_layer(layer)
        calls = kept.pop()
        captures: dict[str, list[Capture]] = {}
        site_grads: dict[str, list[Tensor]] = {}
        for batch, call in enumerate(calls):
            grads[batch] = _backward_layer(adapter, layer, call, grads[batch], captures, site_grads)
        sites = {
            site: join_captures(captures[site], site_grads[site], batches.fit_tokens)
            for site in captures
        }
        captures.clear()
        with torch.no_grad():
            on_sites(layer, sites, calls)
        source.free_layer(layer)
        _tell(progress, "backward", len(source.layers) - layer, len(source.layers))


def _forward_keeping_inputs(
    adapter: ModelAdapter,
    batches: Batches,
    generator: torch.Generator,
    progress: OnProgress | None,
) -> tuple[list[list[LayerCall]], list[Tensor]]:
    """All layer calls, by layer and batch, and the gradient at the last layer's output."""
    source = adapter.source
    kept: list[list[LayerCall]] = []
    last_hidden: list[Tensor] = []
    grads: list[Tensor] = []

    def on_layer(layer: int, calls: list[LayerCall]) -> list[object]:
        if kept and not all(
            call.hidden is hidden for call, hidden in zip(calls, last_hidden, strict=True)
        ):
            raise ValueError(
                "this family changes the hidden states between its decoder layers, so layer-wise "
                "gradients are not exact; choose --sensitivity output_mse"
            )
        source.load_layer(layer)
        with torch.no_grad():
            outputs = [call.run() for call in calls]
        source.free_layer(layer)
        kept.append([call.with_hidden(call.hidden.detach()) for call in calls])
        last_hidden[:] = [hidden_of(output) for output in outputs]
        if layer == len(source.layers) - 1:
            for hidden in last_hidden:
                hidden.requires_grad_()
        _tell(progress, "forward", layer + 1, len(source.layers))
        return outputs

    def on_result(batch: int, result: object) -> None:
        logits = result.logits  # type: ignore[attr-defined]
        loss = _sampled_loss(logits, generator)
        grads.append(torch.autograd.grad(loss, last_hidden[batch])[0])

    run_in_lockstep(source.model, source.layers, batches.tokens, on_layer, on_result)
    return kept, grads


def _sampled_loss(logits_BSV: Tensor, generator: torch.Generator) -> Tensor:
    """Summed cross-entropy to one label per position, drawn from the predictions."""
    logits_TV = logits_BSV.flatten(0, 1).float()
    with torch.no_grad():
        # Inverse-CDF sampling: one uniform per token, whatever the vocabulary.
        cdf_TV = logits_TV.softmax(-1).cumsum(-1)
        draw_T1 = torch.rand(len(cdf_TV), 1, generator=generator) * cdf_TV[:, -1:]
        labels_T = torch.searchsorted(cdf_TV, draw_T1).squeeze(-1).clamp(max=cdf_TV.shape[1] - 1)
    return torch.nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum")


def _backward_layer(
    adapter: ModelAdapter,
    layer: int,
    call: LayerCall,
    grad: Tensor,
    captures: dict[str, list[Capture]],
    site_grads: dict[str, list[Tensor]],
) -> Tensor:
    """Run one layer with gradients; fills captures and gradients at site outputs."""

    def sink(capture: Capture) -> None:
        assert capture.output is not None
        detached = Capture(
            capture.site,
            capture.x_TK.detach(),
            None,
            capture.index_TR,
            None if capture.weights_TR is None else capture.weights_TR.detach(),
        )
        captures.setdefault(capture.site, []).append(detached)
        slot = site_grads.setdefault(capture.site, [])
        slot.append(torch.zeros(()))
        place = len(slot) - 1

        def keep(g: Tensor) -> None:
            slot[place] = g.detach().flatten(0, -2)

        capture.output.register_hook(keep)  # type: ignore[no-untyped-call]  # of torch

    hidden = call.hidden.requires_grad_()
    with adapter.recording(layer, sink), torch.enable_grad():
        output = hidden_of(call.with_hidden(hidden).run())
        result = torch.autograd.grad(output, hidden, grad)[0]
    call.hidden.requires_grad_(False)
    return result


def _collector(captures: dict[str, list[Capture]]) -> Callable[[Capture], None]:
    def sink(capture: Capture) -> None:
        captures.setdefault(capture.site, []).append(capture)

    return sink


def _check_weights(adapter: ModelAdapter, layer: int) -> None:
    """Raise ValueError for a value that is not finite, before it has spread to other layers."""
    for block in adapter.blocks(layer):
        check_finite(read_block(adapter.parameter(block), block), block.name)
    for name, parameter in adapter.source.layers[layer].named_parameters():
        check_finite(parameter, f"{adapter.source.layer_path(layer)}.{name}")


def _tell(progress: OnProgress | None, what: str, done: int, total: int) -> None:
    if progress is not None:
        progress(what, done, total)
