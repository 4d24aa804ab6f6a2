"""Where the residual stream of a decoder layer can be read, and which sites write to it after that.

In most families a layer gives ``h + y1 + y2 + ...``: a norm reads the stream h, and the y are what
experts and down projections put out. No model declares that, so it is looked for while the layer
runs, and believed only where the numbers of the layer's output bear it out.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mxq.models.adapter import Capture, ModelAdapter, Sink
from mxq.models.experts import is_fused_experts
from mxq.models.lockstep import LayerCall, hidden_of

TOKENS = 256
"""Tokens that the numbers are compared on."""

TOLERANCE = 0.1
"""Part of what was added to the stream that may be unexplained: models compute in bfloat16."""

SPREAD = 0.02
"""How much a site's factor may vary between tokens to count as one."""


@dataclass(frozen=True, slots=True)
class Residual:
    """A place in a layer's residual stream.

    ``reader`` is the module that reads it there, and ``site`` the name its captures get.
    ``writers`` are the sites behind it whose outputs, times a factor, are added to the stream.
    """

    site: str
    reader: nn.Module
    writers: Mapping[str, float]

    @contextmanager
    def recording(self, sink: Sink) -> Iterator[None]:
        """Give what is read there, [T, H], to ``sink`` while the context is open."""

        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sink(Capture(self.site, inputs[0].detach().flatten(0, -2)))

        handle = self.reader.register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()


@dataclass(frozen=True, slots=True)
class _Reading:
    """A module that turned hidden states into others of their shape."""

    module: nn.Module
    input: Tensor
    output: Tensor


def find_residual(adapter: ModelAdapter, layer: int, call: LayerCall) -> Residual | None:
    """The last place in a loaded layer where the stream is read, by running it once.

    None where the layer's output is not the stream there and the outputs of sites behind it, each
    times a number for each token, or where no site has the same number for all tokens.
    """
    seen, readings, output = _run(adapter, layer, call)
    first, reading = _last_read(seen, readings)
    if reading is None:
        return None
    hidden = output.shape[-1]
    added_TH = _some(output) - _some(reading.input)
    written = {
        one.site: _some(one.output)
        for one in seen[first:]
        if one.output is not None
        and one.output.shape[-1] == hidden
        and one.output.numel() == output.numel()
        and not _has_norm(adapter.module(one.site))
    }
    writers = _factors(added_TH, written)
    return Residual(f"layers.{layer}:residual", reading.module, writers) if writers else None


def _run(
    adapter: ModelAdapter, layer: int, call: LayerCall
) -> tuple[list[Capture], dict[int, _Reading], Tensor]:
    """Captures in order of computation, readings by the storage of their outputs, the output."""
    seen: list[Capture] = []
    readings: dict[int, _Reading] = {}

    def keep(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        x = inputs[0] if inputs else None
        if not (isinstance(x, Tensor) and isinstance(output, Tensor)):
            return
        if x.shape == output.shape == call.hidden.shape and x is not output:
            # The output stays alive, so that no other tensor takes its address.
            place = output.untyped_storage().data_ptr()
            readings.setdefault(place, _Reading(module, x, output))

    with ExitStack() as undo:
        undo.enter_context(adapter.recording(layer, seen.append))
        for path, module in adapter.source.layers[layer].named_modules():
            if path:
                undo.callback(module.register_forward_hook(keep).remove)
        output = hidden_of(call.run())
    return seen, readings, output


def _last_read(
    seen: Sequence[Capture], readings: Mapping[int, _Reading]
) -> tuple[int, _Reading | None]:
    """The last reading whose output sites take in, and the first of those in ``seen``."""
    places = [one.x_TK.untyped_storage().data_ptr() for one in seen]
    for place in reversed(places):
        if place in readings:
            return places.index(place), readings[place]
    return 0, None


def _factors(added_TH: Tensor, written: Mapping[str, Tensor]) -> dict[str, float]:
    """The number that each site's output is added with; empty where that is not all there is."""
    known = all(states.isfinite().all() for states in (added_TH, *written.values()))
    if not written or not known:
        return {}
    outputs_THS = torch.stack(list(written.values()), -1)
    found_TS = torch.linalg.lstsq(outputs_THS, added_TH[..., None], driver="gelsd").solution[..., 0]
    rest_T = (added_TH - (outputs_THS @ found_TS[..., None])[..., 0]).norm(dim=-1)
    if float((rest_T / added_TH.norm(dim=-1).clamp(min=1e-30)).median()) > TOLERANCE:
        return {}
    middle_S = found_TS.median(0).values
    spread_S = (found_TS - middle_S).abs().median(0).values
    return {
        site: float(middle)
        for site, middle, spread in zip(written, middle_S, spread_S, strict=True)
        if abs(middle) > TOLERANCE and spread <= SPREAD * abs(middle)
    }


def _some(states: Tensor) -> Tensor:
    """Evenly spaced tokens of hidden states, [T, H] in float64 on the host."""
    flat_TH = states.detach().flatten(0, -2)
    count = min(TOKENS, len(flat_TH))
    rows = torch.linspace(0, len(flat_TH) - 1, count).round().to(torch.int64)
    return flat_TH[rows.to(flat_TH.device)].to("cpu", torch.float64)


def _has_norm(module: nn.Module) -> bool:
    """Whether experts have a norm behind their down projections: they write to another space."""
    return is_fused_experts(module) and bool(getattr(module, "has_post_expert_norm", False))
