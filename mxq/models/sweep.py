"""Sweeps over a model's layers: forward for activations, backward for gradients.

A backward sweep needs no more than one layer in memory either: a forward sweep keeps the input of
every layer, labels are sampled from the model's own predictions, and the layers are read again in
reverse order, each run with gradients from its kept input. What is kept goes to the store of the
batches, which moves it to files beyond its limit.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mxq.compute import CPU
from mxq.models.activations import ActivationStore
from mxq.models.adapter import Capture, ModelAdapter
from mxq.models.lockstep import LayerCall, hidden_of, run_calls, run_in_lockstep
from mxq.models.probes import Captures, SiteInputs
from mxq.numerics import check_finite

OnSites = Callable[[int, dict[str, SiteInputs], list[LayerCall]], None]
"""``(layer, inputs of its sites, calls)``; the layer's weights are in memory meanwhile."""

OnProgress = Callable[[str, int, int], None]
"""``(what, done, total)``."""


BATCH_TOKENS = 4096
"""Tokens of a batch, or one sample where that is longer."""

CHUNK_POSITIONS = 256
"""Positions whose probabilities exist at a time: 150 MB for a vocabulary of 150 000."""


@dataclass(frozen=True, slots=True)
class Batches:
    """Token batches in order; the first ``fit`` of them may be fitted to, the rest are held out.

    ``store`` keeps the activations that they give.
    """

    tokens: tuple[Tensor, ...]
    fit: int
    store: ActivationStore = field(default_factory=ActivationStore, compare=False)

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
    fit_ids: Tensor,
    heldout_ids: Tensor | None,
    *,
    batch_tokens: int = BATCH_TOKENS,
    store: ActivationStore | None = None,
    device: torch.device = CPU,
) -> Batches:
    """Cut samples [samples, sequence] into batches of about that many tokens, on a device."""
    rows = max(1, batch_tokens // fit_ids.shape[1])
    fit = torch.split(fit_ids.to(device), rows)
    held = () if heldout_ids is None else torch.split(heldout_ids.to(device), rows)
    return Batches((*fit, *held), len(fit), store or ActivationStore())


def sweep_forward(
    adapter: ModelAdapter,
    batches: Batches,
    on_sites: OnSites,
    progress: OnProgress | None = None,
    *,
    only_experts: bool = False,
) -> None:
    """Visit the layers in order with the inputs of their sites; weights stay the original ones.

    ``only_experts`` leaves out the sites that are plain linears.

    Raises:
        ValueError: If a weight is NaN or infinite, with the name of its block or parameter.
    """
    source, store = adapter.source, batches.store

    def on_layer(layer: int, calls: list[LayerCall]) -> list[object]:
        source.load_layer(layer)
        _check_weights(adapter, layer)
        captures = Captures(store)

        def sink(capture: Capture) -> None:
            if capture.index_TR is not None or not only_experts:
                captures.add(capture)

        outputs: list[object] = []
        with torch.no_grad():
            for call in calls:
                with adapter.recording(layer, sink):
                    outputs += run_calls([call], store)
                captures.end_batch()
            on_sites(layer, captures.join(batches.fit_tokens), calls)
        source.free_layer(layer)
        _tell(progress, "forward", layer + 1, len(source.layers))
        return outputs

    run_in_lockstep(source.model, source.layers, batches.tokens, on_layer, store=store)


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
        calls, captures = kept.pop(), Captures(batches.store)
        for batch, call in enumerate(calls):
            grads[batch] = _backward_layer(adapter, layer, call, grads[batch], captures)
            captures.end_batch()
        with torch.no_grad():
            on_sites(layer, captures.join(batches.fit_tokens), calls)
        source.free_layer(layer)
        _tell(progress, "backward", len(source.layers) - layer, len(source.layers))


def _forward_keeping_inputs(
    adapter: ModelAdapter,
    batches: Batches,
    generator: torch.Generator,
    progress: OnProgress | None,
) -> tuple[list[list[LayerCall]], list[Tensor]]:
    """All layer calls, by layer and batch, and the gradient at the last layer's output."""
    source, store = adapter.source, batches.store
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
            outputs = run_calls(calls, store)
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
        slope = _loss_gradient(logits.detach(), generator)
        grad = torch.autograd.grad(logits, last_hidden[batch], slope)[0]
        grads.append(store.keep(grad, cold=True))
        store.release(grads[-1])
        store.release(last_hidden[batch])

    run_in_lockstep(
        source.model, source.layers, batches.tokens, on_layer, on_result, store=batches.store
    )
    return kept, grads


def _loss_gradient(logits_BSV: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient of the summed cross-entropy to one label per position, drawn from the predictions.

    By hand and for some positions at a time (``softmax - one_hot``): a large vocabulary makes the
    logits of a batch the largest tensor there is, and a graph would hold several of that size.
    """
    logits_TV = logits_BSV.flatten(0, 1)
    slope_TV = torch.empty_like(logits_TV)
    # Inverse-CDF sampling: one uniform per token, whatever the vocabulary.
    draw_T1 = torch.rand(len(logits_TV), 1, generator=generator).to(logits_TV.device)
    for start in range(0, len(logits_TV), CHUNK_POSITIONS):
        part = slice(start, start + CHUNK_POSITIONS)
        chances_TV = logits_TV[part].float().softmax(-1)
        cdf_TV = chances_TV.cumsum(-1)
        labels_T1 = torch.searchsorted(cdf_TV, draw_T1[part] * cdf_TV[:, -1:])
        labels_T1 = labels_T1.clamp(max=cdf_TV.shape[1] - 1)
        ones_T1 = torch.ones_like(labels_T1, dtype=chances_TV.dtype)
        slope_TV[part] = chances_TV.scatter_add_(-1, labels_T1, -ones_T1)
    return slope_TV.view_as(logits_BSV)


def _backward_layer(
    adapter: ModelAdapter, layer: int, call: LayerCall, grad: Tensor, captures: Captures
) -> Tensor:
    """Run one layer with gradients; fills captures with inputs and gradients at site outputs."""

    def sink(capture: Capture) -> None:
        assert capture.output is not None
        site, place = capture.site, captures.add(capture)
        capture.output.register_hook(  # type: ignore[no-untyped-call]  # of torch
            lambda g: captures.add_grad(site, place, g)
        )

    hidden = call.hidden.to(call.device).requires_grad_()
    with adapter.recording(layer, sink), torch.enable_grad():
        output = hidden_of(call.with_hidden(hidden).run())
        result = torch.autograd.grad(output, hidden, grad.to(call.device))[0]
    hidden.requires_grad_(False)
    captures.store.release(call.hidden)
    captures.store.release(grad)
    result = captures.store.keep(result, cold=True)
    captures.store.release(result)
    return result


def _check_weights(adapter: ModelAdapter, layer: int) -> None:
    """Raise ValueError for a value that is not finite, before it has spread to other layers."""
    for block in adapter.blocks(layer):
        check_finite(adapter.weight(block.name), block.name)
    for name, parameter in adapter.source.layers[layer].named_parameters():
        check_finite(parameter, f"{adapter.source.layer_path(layer)}.{name}")


def _tell(progress: OnProgress | None, what: str, done: int, total: int) -> None:
    if progress is not None:
        progress(what, done, total)
