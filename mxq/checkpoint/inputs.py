"""What the sites of a layer read while it is being quantized, and what the stream lacks there."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass

import torch

from mxq.checkpoint.work import LayerWork
from mxq.models.adapter import Capture, ModelAdapter
from mxq.models.lockstep import LayerCall
from mxq.models.probes import Captures, ExpertInputs, SiteInputs
from mxq.models.residual import Residual
from mxq.quantizers.target import Deviation


@dataclass(frozen=True, slots=True)
class Stream:
    """The residual stream that a site writes to, as it is now and in the original model.

    The site is to make up for ``share`` of what is off, in units of its own outputs.
    """

    now: SiteInputs
    origin: SiteInputs
    share: float

    @property
    def lack(self) -> Deviation:
        """What a linear lacks: the same share for every token."""
        return Deviation(self.now.x_TK, self.origin.x_TK, self.share)

    def lack_of(self, one: ExpertInputs) -> Deviation:
        """What an expert lacks on its tokens.

        Experts whose outputs are added with weights g take ``g^2 / sum(g^2)`` of it each, so that
        together they take all of it by the least change.
        """
        assert one.inputs.weights_TR is not None
        device = one.x_TH.device
        norm_T = one.inputs.weights_TR[one.rows].to(device, torch.float32).square().sum(-1)
        return Deviation(
            self.now.rows(one.rows, device),
            self.origin.rows(one.rows, device),
            self.share * one.gate_T / norm_T.clamp(min=1e-30),
        )


def inputs_of_sites(work: LayerWork, sites: Sequence[str]) -> dict[str, SiteInputs]:
    """What the sites read over all batches, with the layer as it is now.

    Where one of them writes to the residual stream, that is among them under its own name.
    """
    job, residual = work.job, work.residual
    if residual is not None and residual.writers.keys().isdisjoint(sites):
        residual = None
    wanted = [*sites] if residual is None else [residual.site, *sites]
    captures = Captures(job.store)
    for call in work.calls:
        _record(job.adapter, work.layer, call, wanted, captures.add, residual)
        captures.end_batch()
        job.store.release(call.hidden)
    return captures.join(job.fit_tokens)


def stream_of(work: LayerWork, inputs: Mapping[str, SiteInputs], site: str) -> Stream | None:
    """The residual stream that a site writes to; None where it does not, or nobody knows."""
    residual = work.residual
    if residual is None or site not in residual.writers:
        return None
    share = 1 / (len(residual.writers) * residual.writers[site])
    return Stream(inputs[residual.site], work.origins[residual.site], share)


def groups_by_input(adapter: ModelAdapter, layer: int, call: LayerCall) -> list[list[str]]:
    """Sites in order of computation, those that read the same tensor together."""
    seen: list[Capture] = []
    _record(adapter, layer, call, adapter.layer_sites(layer), seen.append)
    groups: dict[int, list[str]] = {}
    for capture in seen:
        groups.setdefault(capture.x_TK.untyped_storage().data_ptr(), []).append(capture.site)
    return list(groups.values())


class _AllSeen(BaseException):
    """Ends a layer's forward once the wanted inputs are known; nothing after them is needed."""


def _record(
    adapter: ModelAdapter,
    layer: int,
    call: LayerCall,
    wanted: Sequence[str],
    keep: Callable[[Capture], object],
    residual: Residual | None = None,
) -> None:
    """Give what the wanted sites of a layer read, as the layer is now, to ``keep``.

    A wanted ``residual`` is one of them under its own name.

    Raises:
        ValueError: If the layer runs without one of them.
    """
    missing = set(wanted)

    def sink(capture: Capture) -> None:
        if capture.site in missing:
            missing.discard(capture.site)
            keep(capture)
        if not missing:
            raise _AllSeen

    reading = nullcontext() if residual is None else residual.recording(sink)
    with adapter.recording(layer, sink, inputs_only=True), reading, suppress(_AllSeen):
        call.run()
    assert residual is None or residual.site not in missing
    if missing:
        raise ValueError(
            f"layer {layer} runs without {sorted(missing)[0]}, so nothing is known of its inputs; "
            "keep it in its type with --keep"
        )
