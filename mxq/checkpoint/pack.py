"""Pack: quantize layer after layer on the chosen mix and write the checkpoint.

Every layer sees inputs that passed the quantized layers before it. Where its blocks are fitted to
the original model's outputs, the same tokens pass the original layers beside them. A finished
layer is its shard and a record with the shard's digest: a run that goes on installs the weights of
the shard, passes the calibration tokens through them, and so comes to the same state as the run
that was stopped.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mxq.artifacts import Allocation, Provenance
from mxq.checkpoint.expert_choices import ExpertChoices
from mxq.checkpoint.layer import block_tensors, install_layer, quantize_layer
from mxq.checkpoint.work import LayerWork, PackJob
from mxq.checkpoint.writer import CheckpointWriter, shard_file
from mxq.counted import counted
from mxq.curvature import Curvature
from mxq.distributed import Team
from mxq.models.adapter import Capture, ModelAdapter
from mxq.models.experts import expert_bias
from mxq.models.lockstep import LayerCall, run_calls, run_in_lockstep
from mxq.models.probes import Captures
from mxq.models.residual import find_residual
from mxq.models.source import file_digest
from mxq.models.sweep import Batches, OnProgress
from mxq.quantizers.method import Method
from mxq.records import Records
from mxq.scheme import Scheme
from mxq.storage import digest_of, to_text

log = logging.getLogger("mxq")


@dataclass(frozen=True, slots=True)
class PackReport:
    """What was written: bytes of all tensors, and how many blocks each quantizer won.

    ``expert_choices`` are by layer; empty where they are not known: with the target local, without
    experts or held-out tokens, and in a record of an mxq that did not count them.
    """

    tensor_bytes: int
    quantizers: Mapping[str, int]
    unrouted: tuple[str, ...]
    expert_choices: tuple[ExpertChoices, ...] = ()


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """A layer whose shard is written: its digest, and what ``QuantizedLayer`` tells."""

    layer: int
    sha256: str
    quantizers: Mapping[str, int]
    unrouted: tuple[str, ...]
    expert_choices: ExpertChoices | None
    provenance: Provenance


@dataclass(frozen=True, slots=True)
class PackSharing:
    """Who packs, and where finished layers are recorded; without ``records`` they are not."""

    team: Team = field(default_factory=Team.alone)
    records: Records[PackedLayer] | None = None


@dataclass(frozen=True, slots=True)
class _Layers:
    """Finished layers, as they pass between processes."""

    layers: tuple[PackedLayer, ...]


def pack(  # noqa: PLR0913  (who packs, and who watches, changes no byte)
    adapter: ModelAdapter,
    batches: Batches,
    allocation: Allocation,
    folder: Path,
    *,
    method: Method,
    target: str = "stream",
    curvature: Callable[[int], Curvature] | None = None,
    progress: OnProgress | None = None,
    sharing: PackSharing | None = None,
) -> PackReport:
    """Write the checkpoint of an allocation to ``folder``; the leading process alone writes.

    ``target`` is what blocks are fitted to, one of ``mxq.config.TARGETS``. ``curvature`` gives the
    moments of a layer's gradients, for a quantizer that makes use of them.

    Raises:
        ValueError: If the allocation does not cover the model's blocks, or values are not finite.
    """
    _check_covers(adapter, allocation)
    sharing = sharing or PackSharing()
    job = PackJob(adapter, allocation, method, batches, sharing.team, target, curvature)
    writer = CheckpointWriter(folder) if sharing.team.leads else None
    done = _known(sharing, writer)
    source = adapter.source
    layers = range(len(source.layers))

    beside = 0 if target == "local" else len(batches.tokens)

    def on_layer(layer: int, calls: list[LayerCall]) -> list[object]:
        source.load_layer(layer)
        try:
            with torch.no_grad():
                if layer in done:
                    outputs = run_calls(calls[:beside], batches.store)
                    _reinstall(job, layer, folder)
                else:
                    outputs, work = _observe(job, layer, calls, beside)
                    done[layer] = _pack_layer(work, writer, sharing)
                outputs += run_calls(calls[beside:], batches.store)
        finally:
            adapter.uninstall(layer)
            source.free_layer(layer)
        if progress is not None:
            progress("pack", layer + 1, len(source.layers))
        return outputs

    if any(layer not in done for layer in layers):
        passes = batches.tokens[:beside] + batches.tokens
        run_in_lockstep(source.model, source.layers, passes, on_layer, store=batches.store)
    return sharing.team.from_lead(PackReport, lambda: _finish(job, writer, done))


def plan_digest(allocation: Allocation) -> str:
    """Digest of everything in a plan."""
    return digest_of(to_text(allocation))


def _known(sharing: PackSharing, writer: CheckpointWriter | None) -> dict[int, PackedLayer]:
    """The layers that an earlier run has finished, whose shards are as it wrote them."""

    def load() -> _Layers:
        assert writer is not None
        found = {} if sharing.records is None else sharing.records.load()
        whole = []
        for finished in found.values():
            path = writer.folder / shard_file(_name(finished.layer))
            if path.is_file() and file_digest(path) == finished.sha256:
                whole.append(finished)
            else:
                log.warning("%s is absent or was changed; it is made anew", path)
        writer.start({_name(finished.layer): finished.sha256 for finished in whole})
        return _Layers(tuple(whole))

    return {found.layer: found for found in sharing.team.from_lead(_Layers, load).layers}


def _reinstall(job: PackJob, layer: int, folder: Path) -> None:
    """Put the weights of a finished layer in place, in every process."""
    stored: dict[str, Tensor] = {}
    if job.team.leads:
        stored = block_tensors(job, layer, load_file(folder / shard_file(_name(layer))))
    install_layer(job, layer, job.team.exchange_tensors("", stored)[0][1])


def _observe(
    job: PackJob, layer: int, calls: Sequence[LayerCall], beside: int
) -> tuple[list[object], LayerWork]:
    """Outputs of the first calls of a layer that has its own weights, and the work on the others.

    What the sites read in those calls, and the residual stream under its own name, is what the
    original model has in place of what they read later.
    """
    residual = None
    if job.target == "stream":
        residual = find_residual(job.adapter, layer, calls[0])
        if residual is None and job.team.leads:
            log.info("layer %d: no residual stream was found; it is fitted as with original", layer)
    captures = Captures(job.store)
    outputs: list[object] = []

    def sink(capture: Capture) -> None:
        captures.add(capture)

    for call in calls[:beside]:
        with ExitStack() as undo:
            undo.enter_context(job.adapter.recording(layer, sink, inputs_only=True))
            if residual is not None:
                undo.enter_context(residual.recording(sink))
            outputs += run_calls([call], job.store)
        captures.end_batch()
    origins, known = captures.join(job.fit_tokens), job.curvature_of(layer)
    return outputs, LayerWork(job, layer, calls[beside:], origins, known, residual)


def _pack_layer(
    work: LayerWork, writer: CheckpointWriter | None, sharing: PackSharing
) -> PackedLayer:
    """Quantize a layer, write its shard and then its record."""
    job, layer = work.job, work.layer
    quantized = quantize_layer(work)

    def write() -> PackedLayer:
        assert writer is not None
        prefix = job.adapter.source.layer_path(layer) + "."
        tensors = {**quantized.tensors, **_kept_tensors(job.adapter, prefix)}
        digest = writer.add(_name(layer), tensors)
        provenance = Provenance("", "") if sharing.records is None else sharing.records.provenance
        finished = PackedLayer(
            layer,
            digest,
            quantized.quantizers,
            quantized.unrouted,
            quantized.expert_choices,
            provenance,
        )
        if sharing.records is not None:
            sharing.records.save(_name(layer), finished)
        return finished

    return job.team.from_lead(PackedLayer, write)


def _finish(
    job: PackJob, writer: CheckpointWriter | None, done: Mapping[int, PackedLayer]
) -> PackReport:
    """Write what is outside the layers, the index and the configuration."""
    assert writer is not None
    writer.add("outside", _kept_tensors(job.adapter, None))
    total = writer.finish(job.adapter.source.folder, *_plan_tables(job.adapter, job.allocation))
    tally: Counter[str] = Counter()
    for layer in sorted(done):
        tally.update(done[layer].quantizers)
    unrouted = tuple(expert for layer in sorted(done) for expert in done[layer].unrouted)
    found = (done[layer].expert_choices for layer in sorted(done))
    choices = tuple(one for one in found if one is not None)
    return PackReport(total, dict(sorted(tally.items())), unrouted, choices)


def _name(layer: int) -> str:
    return f"layer-{layer:05d}"


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
            kept[name] = tensor.to("cpu", source.stored_dtype(name))
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
            kept[f"{block.module}.bias"] = bias.to("cpu", dtype)
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
            "the allocation is of another model or scope: it lacks "
            f"{counted(len(absent), 'block')} of this model and has "
            f"{counted(len(foreign), 'unknown one')}, e.g. {example}"
        )
