"""Where the residual stream of a decoder layer can be read, and which sites write to it.

In most families a layer gives ``h + y1 + y2 + ...``: a norm reads the stream h, and the y are what
experts and down projections put out. No model declares that, so it is looked for while the layer
runs, and believed only where the numbers of the layer's output bear it out.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mxq.models.adapter import Capture, ModelAdapter, Sink
from mxq.models.experts import is_fused_experts
from mxq.models.lockstep import LayerCall, hidden_of

TOKENS = 256
"""Tokens that the numbers are compared on."""

UNEXPLAINED = 0.01
"""Part of what is added to the stream that may come from elsewhere; rounding is far below."""

LEAST_PART = 0.01
"""Part of what is added to the stream that a site has at least, to count as one that writes."""

SPREAD = 0.02
"""How much a site's factor may vary between tokens to count as one."""


@dataclass(frozen=True, slots=True)
class Residual:
    """A place in a layer's residual stream.

    ``reader`` is the module that reads it there, and ``site`` the name its captures get.
    ``writers`` are the sites whose outputs, times a factor, are added to it in this layer.
    """

    site: str
    reader: nn.Module
    writers: Mapping[str, float]

    @contextmanager
    def recording(self, sink: Sink) -> Iterator[None]:
        """Give what is read there, [T, H], to ``sink`` while the context is open."""

        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            # A copy: some layers add to the stream in place.
            sink(Capture(self.site, inputs[0].detach().flatten(0, -2).clone()))

        handle = self.reader.register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()


@dataclass(frozen=True, slots=True)
class _Reading:
    """A module that turned hidden states into others of their shape, and some of the first."""

    module: nn.Module
    stream_TH: Tensor
    output: Tensor


@dataclass(slots=True)
class _Run:
    """One run of a layer: what its modules read and put out.

    ``readings`` are by the storage of their outputs, ``taken_in`` those whose output a linear or
    experts read, ``written`` some of the outputs that have the stream's form.
    """

    shape: torch.Size
    calls: Counter[nn.Module] = field(default_factory=Counter)
    readings: dict[int, _Reading] = field(default_factory=dict)
    taken_in: dict[nn.Module, _Reading] = field(default_factory=dict)
    written: dict[nn.Module, Tensor] = field(default_factory=dict)

    def see(self, module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        """A forward hook of every module; values are taken at once, before others change them."""
        self.calls[module] += 1
        x = inputs[0] if inputs else None
        if not (isinstance(x, Tensor) and isinstance(output, Tensor)):
            return
        if type(module) is nn.Linear or is_fused_experts(module):
            place = x.untyped_storage().data_ptr()
            if place in self.readings:
                self.taken_in[module] = self.readings[place]
            has_norm = bool(getattr(module, "has_post_expert_norm", False))
            has_form = output.shape[-1] == self.shape[-1] and output.numel() == self.shape.numel()
            if has_form and not has_norm:
                self.written[module] = sample_tokens(output)
        elif x.shape == output.shape == self.shape and x is not output:
            # The output stays alive, so that no other tensor takes its address.
            place = output.untyped_storage().data_ptr()
            self.readings.setdefault(place, _Reading(module, sample_tokens(x), output))


def find_residual(adapter: ModelAdapter, layer: int, call: LayerCall) -> Residual | None:
    """The last place in a loaded layer where the stream is read, by running it once.

    None where the layer's output is not the stream there and outputs of linears and experts, each
    times a number for each token, or where no site has the same number for all tokens.
    """
    run = _Run(call.hidden.shape)
    with ExitStack() as undo:
        for path, module in adapter.source.layers[layer].named_modules():
            if path:
                undo.callback(module.register_forward_hook(run.see).remove)
        output_TH = sample_tokens(hidden_of(call.run()))
    sites = {adapter.module(site): site for site in adapter.layer_sites(layer)}
    readings = [reading for module, reading in run.taken_in.items() if module in sites]
    # A module that runs twice reads the stream in two places, and nothing tells which is which.
    if not readings or run.calls[readings[-1].module] > 1:
        return None
    once = {module: y_TH for module, y_TH in run.written.items() if run.calls[module] == 1}
    factors = constant_factors(output_TH - readings[-1].stream_TH, list(once.values()))
    writers = {
        sites[module]: factor
        for module, factor in zip(once, factors, strict=True)
        if factor is not None and module in sites
    }
    return Residual(f"layers.{layer}:residual", readings[-1].module, writers) if writers else None


def constant_factors(added_TH: Tensor, written: list[Tensor]) -> list[float | None]:
    """The number that each output is added with, where it is the same for all tokens.

    All None where the outputs, each times some number for each token, are not all that is added;
    None for an output of which next to nothing is added.
    """
    nothing: list[float | None] = [None] * len(written)
    if not written or not all(part.isfinite().all() for part in (added_TH, *written)):
        return nothing
    outputs_THS = torch.stack(written, -1)
    found_TS = torch.linalg.lstsq(outputs_THS, added_TH[..., None], driver="gelsd").solution[..., 0]
    size_T = added_TH.norm(dim=-1).clamp(min=1e-30)
    rest_T = (added_TH - (outputs_THS @ found_TS[..., None])[..., 0]).norm(dim=-1)
    if float((rest_T / size_T).median()) > UNEXPLAINED:
        return nothing
    parts_S = (found_TS.abs() * outputs_THS.norm(dim=1) / size_T[:, None]).median(0).values
    middle_S = found_TS.median(0).values
    spread_S = (found_TS - middle_S).abs().median(0).values
    is_one_S = (parts_S > LEAST_PART) & (spread_S <= SPREAD * middle_S.abs())
    return [
        float(middle) if is_one else None for middle, is_one in zip(middle_S, is_one_S, strict=True)
    ]


def sample_tokens(states: Tensor) -> Tensor:
    """Evenly spaced tokens of hidden states, [T, H] in float64 on the host."""
    flat_TH = states.detach().flatten(0, -2)
    count = min(TOKENS, len(flat_TH))
    rows = torch.linspace(0, len(flat_TH) - 1, count).round().to(torch.int64)
    return flat_TH[rows.to(flat_TH.device)].to("cpu", torch.float64)
