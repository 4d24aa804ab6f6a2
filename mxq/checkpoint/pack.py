"""Pack: quantize layer after layer on the chosen mix and write the checkpoint.

Every layer sees inputs that passed the quantized layers before it. Inside a layer the blocks are
taken in order of computation: what shares an input is quantized together, then the layer runs
again, so a down projection is fitted to what its quantized gate and up projections give.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from mxq.artifacts import Allocation
from mxq.blocks import read_block
from mxq.checkpoint.tensors import to_tensors
from mxq.checkpoint.writer import CheckpointWriter
from mxq.models.activations import ActivationStore
from mxq.models.adapter import Capture, ModelAdapter
from mxq.models.experts import expert_bias, is_fused_experts
from mxq.models.lockstep import LayerCall, run_calls, run_in_lockstep
from mxq.models.probes import Captures, Probe, SiteInputs, expert_probes, linear_probe
from mxq.models.sweep import Batches, OnProgress
from mxq.quantizers.choose import (
    BlockInputs,
    Candidate,
    expert_chunks,
    make_batch,
    quantize_batch,
    rotate_batch,
)
from mxq.quantizers.method import Method
from mxq.quantizers.moments import second_moments
from mxq.scheme import Scheme


@dataclass(frozen=True, slots=True)
class PackReport:
    """What was written: bytes of all tensors, and how many blocks each quantizer won."""

    folder: Path
    tensor_bytes: int
    quantizers: Mapping[str, int]
    unrouted: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Run:
    """The unchanging arguments of one packing run, with its tallies."""

    adapter: ModelAdapter
    allocation: Allocation
    method: Method
    fit_tokens: int
    store: ActivationStore
    tally: Counter[str] = field(default_factory=Counter)
    unrouted: list[str] = field(default_factory=list)

    def rotated(self, layer: int) -> bool:
        return layer in self.allocation.rotated_layers


def pack(
    adapter: ModelAdapter,
    batches: Batches,
    allocation: Allocation,
    folder: Path,
    *,
    method: Method,
    progress: OnProgress | None = None,
) -> PackReport:
    """Write the checkpoint of an allocation to ``folder``.

    Raises:
        ValueError: If the allocation does not cover the model's blocks, or values are not finite.
    """
    _check_covers(adapter, allocation)
    run = _Run(adapter, allocation, method, batches.fit_tokens, batches.store)
    writer = CheckpointWriter(folder)
    source = adapter.source

    def on_layer(layer: int, calls: list[LayerCall]) -> list[object]:
        source.load_layer(layer)
        try:
            with torch.no_grad():
                tensors = dict(_quantize_layer(run, layer, calls))
                outputs = run_calls(calls, batches.store)
            tensors |= _kept_tensors(run.adapter, source.layer_path(layer) + ".")
            writer.add(f"layer-{layer:05d}", tensors)
        finally:
            adapter.uninstall(layer)
            source.free_layer(layer)
        if progress is not None:
            progress("pack", layer + 1, len(source.layers))
        return outputs

    run_in_lockstep(source.model, source.layers, batches.tokens, on_layer, store=batches.store)
    writer.add("outside", _kept_tensors(adapter, None))
    total = writer.finish(source.folder, *_plan_tables(adapter, allocation))
    return PackReport(folder, total, dict(run.tally), tuple(run.unrouted))


def _quantize_layer(run: _Run, layer: int, calls: list[LayerCall]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of all blocks of a layer; leaves the layer with its quantized weights."""
    seen: dict[str, Capture] = {}
    _record(run.adapter, layer, calls[0], run.adapter.layer_sites(layer), seen.setdefault)
    groups = _groups_by_input(seen)
    seen.clear()
    for group in groups:
        for inputs in _inputs_of_sites(run, layer, calls, group).values():
            for candidate in _quantize_site(run, layer, inputs):
                run.tally[candidate.quantizer] += 1
                block = run.adapter.block(candidate.block)
                for suffix, tensor in to_tensors(candidate.weight).items():
                    yield f"{block.module}.{suffix}", tensor


def _inputs_of_sites(
    run: _Run, layer: int, calls: Sequence[LayerCall], sites: Sequence[str]
) -> dict[str, SiteInputs]:
    """What the sites read over all batches, with the layer as it is now."""
    captures = Captures(run.store)

    def keep(_: str, capture: Capture) -> None:
        captures.add(capture)

    for call in calls:
        _record(run.adapter, layer, call, sites, keep)
        captures.end_batch()
        run.store.release(call.hidden)
    return captures.join(run.fit_tokens)


def _quantize_site(run: _Run, layer: int, inputs: SiteInputs) -> Iterator[Candidate]:
    module = run.adapter.module(inputs.site)
    if not is_fused_experts(module):
        yield from _quantize_probes(run, layer, [linear_probe(module, inputs)], None)
        return
    fit = inputs.x_TK[: run.fit_tokens]
    prior_KK = second_moments(fit, torch.ones(len(fit)))
    for experts in expert_chunks(run.adapter.site_blocks(inputs.site)):
        probes = [expert_probes(module, inputs, expert) for expert in experts]
        run.unrouted.extend(_expert_of(p["down"]) for p in probes if p["down"].tokens == 0)
        for projection in [name for name in probes[0] if name != "down"]:
            yield from _quantize_probes(run, layer, [p[projection] for p in probes], prior_KK)
        # Gate and up are in place now: the inner activation is that of the quantized expert.
        probes = [expert_probes(module, inputs, expert) for expert in experts]
        yield from _quantize_probes(run, layer, [p["down"] for p in probes], None)


def _quantize_probes(
    run: _Run, layer: int, probes: Sequence[Probe], prior_KK: Tensor | None
) -> Iterator[Candidate]:
    """Quantize the probes' blocks, those of one scheme together, and install them."""
    by_scheme: dict[Scheme, list[Probe]] = defaultdict(list)
    for probe in probes:
        by_scheme[run.allocation.schemes[probe.block]].append(probe)
    for scheme, members in sorted(by_scheme.items()):
        batch = make_batch([_inputs_of(run.adapter, probe) for probe in members], prior_KK)
        batch = rotate_batch(batch) if run.rotated(layer) else batch
        candidates = quantize_batch(batch, scheme, run.method)
        for candidate in candidates:
            run.adapter.install(candidate.block, candidate.dense(), scheme, candidate.rotated)
        yield from candidates


def _expert_of(probe: Probe) -> str:
    return probe.block.rsplit(".", 1)[0]


def _inputs_of(adapter: ModelAdapter, probe: Probe) -> BlockInputs:
    block = adapter.block(probe.block)
    w_NK = read_block(adapter.parameter(block), block).clone()
    return BlockInputs(probe.block, w_NK, probe.x_TK, probe.gate_T, probe.fit_rows)


class _AllSeen(BaseException):
    """Ends a layer's forward once the wanted inputs are known; nothing after them is needed."""


def _record(
    adapter: ModelAdapter,
    layer: int,
    call: LayerCall,
    wanted: Sequence[str],
    keep: Callable[[str, Capture], object],
) -> None:
    """Give what the wanted sites of a layer read, as the layer is now, to ``keep``.

    Raises:
        ValueError: If the layer runs without one of them.
    """
    missing = set(wanted)

    def sink(capture: Capture) -> None:
        if capture.site in missing:
            missing.discard(capture.site)
            keep(capture.site, capture)
        if not missing:
            raise _AllSeen

    with adapter.recording(layer, sink, inputs_only=True), suppress(_AllSeen):
        call.run()
    if missing:
        raise ValueError(
            f"layer {layer} runs without {sorted(missing)[0]}, so nothing is known of its inputs; "
            "keep it in its type with --keep"
        )


def _groups_by_input(seen: Mapping[str, Capture]) -> list[list[str]]:
    """Sites in order of computation, those that read the same tensor together."""
    groups: dict[int, list[str]] = {}
    for site, capture in seen.items():
        groups.setdefault(capture.x_TK.untyped_storage().data_ptr(), []).append(site)
    return list(groups.values())


def _kept_tensors(adapter: ModelAdapter, prefix: str | None) -> dict[str, Tensor]:
    """Parameters and buffers that stay, in the type of the source's files.

    ``prefix`` selects a layer; None selects what is outside all layers.
    """
    source = adapter.source
    layers = source.layers_name + "."
    quantized = {block.tensor for block in adapter.blocks()}
    tied = set(source.model.all_tied_weights_keys or ())
    kept = {}
    for name, tensor in source.model.state_dict().items():
        inside = name.startswith(prefix) if prefix is not None else not name.startswith(layers)
        if inside and name not in quantized and name not in tied and source.is_stored(name):
            kept[name] = tensor.to(source.stored_dtype(name))
    if prefix is not None:
        kept = _split_expert_biases(adapter, prefix, kept)
    return kept


def _split_expert_biases(
    adapter: ModelAdapter, prefix: str, kept: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Fused biases of quantized experts become one bias for each expert's projection."""
    for block in adapter.blocks():
        if block.expert is None or not block.tensor.startswith(prefix):
            continue
        module: nn.Module = adapter.module(adapter.site_of(block))
        bias = expert_bias(module, block.expert, block.projection)
        if bias is not None:
            dtype = adapter.source.stored_dtype(f"{block.tensor}_bias")
            kept[f"{block.module}.bias"] = bias.to(dtype)
            kept.pop(f"{block.tensor}_bias", None)
    return kept


def _plan_tables(
    adapter: ModelAdapter, allocation: Allocation
) -> tuple[dict[str, Scheme], dict[str, dict[str, tuple[Scheme, ...]]], frozenset[str]]:
    """Schemes by module path, as the checkpoint's plan wants them."""
    linears: dict[str, Scheme] = {}
    experts: dict[str, dict[str, list[Scheme]]] = defaultdict(lambda: defaultdict(list))
    rotated = set()
    for block in adapter.blocks():
        path = adapter.sites[adapter.site_of(block)]
        scheme = allocation.schemes[block.name]
        if block.layer in allocation.rotated_layers:
            rotated.add(path)
        if block.expert is None:
            linears[path] = scheme
        else:
            experts[path][f"{block.projection}_proj"].append(scheme)
    tables = {
        path: {name: tuple(row) for name, row in table.items()} for path, table in experts.items()
    }
    return linears, tables, frozenset(rotated)


def _check_covers(adapter: ModelAdapter, allocation: Allocation) -> None:
    names = {block.name for block in adapter.blocks()}
    absent, foreign = names - set(allocation.schemes), set(allocation.schemes) - names
    if absent or foreign:
        example = sorted(absent or foreign)[0]
        raise ValueError(
            f"the allocation is of another model or scope: {len(absent)} blocks of this model are "
            f"absent from it and {len(foreign)} are unknown, e.g. {example}"
        )
