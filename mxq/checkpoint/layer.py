"""Quantize one decoder layer on the chosen mix, or put one in place that was packed before.

Inside a layer the blocks are taken in order of computation: what shares an input is quantized
together, then the layer runs again, so a down projection is fitted to what its quantized gate and
up projections give. What shares an input is also what several processes deal out among them.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mxq.checkpoint.expert_choices import ExpertChoices, count_kept, sum_sites
from mxq.checkpoint.inputs import Stream, groups_by_input, inputs_of_sites, stream_of
from mxq.checkpoint.outer import Outer, outer_of_experts, outer_of_linear
from mxq.checkpoint.tensors import from_tensors, tensor_shapes, to_tensors
from mxq.checkpoint.work import LayerWork, PackJob
from mxq.models.experts import expert_count, is_fused_experts, projection_shapes
from mxq.models.probes import (
    ExpertInputs,
    Probe,
    SiteInputs,
    device_of,
    expert_inputs,
    linear_probe,
)
from mxq.quantizers.choose import (
    BatchInputs,
    BlockInputs,
    Candidate,
    expert_chunks,
    make_batch,
    make_inputs,
    quantize_batch,
)
from mxq.quantizers.moments import second_moments
from mxq.quantizers.target import Deviation
from mxq.scheme import Scheme


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """Tensors of all blocks of a layer by their names in a file.

    ``quantizers`` counts the blocks that each won; ``unrouted`` are experts that no token reached.
    ``expert_choices`` is None where nothing tells what the original chooses.
    """

    tensors: Mapping[str, Tensor]
    quantizers: Mapping[str, int]
    unrouted: tuple[str, ...]
    expert_choices: ExpertChoices | None


@dataclass(slots=True)
class _Found:
    """What one process has quantized of a group of sites.

    ``choices`` are ``(kept, choices)`` of the experts' sites, as ``count_kept`` gives them.
    """

    quantizers: dict[str, str] = field(default_factory=dict)
    unrouted: list[str] = field(default_factory=list)
    choices: dict[str, tuple[int, int]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def take(self, job: PackJob, candidates: Iterator[Candidate]) -> None:
        for candidate in candidates:
            self.quantizers[candidate.block] = candidate.quantizer
            path = job.adapter.block(candidate.block).module
            for suffix, tensor in to_tensors(candidate.weight).items():
                self.tensors[f"{path}.{suffix}"] = tensor.cpu()


def quantize_layer(work: LayerWork) -> QuantizedLayer:
    """Quantize all blocks of a loaded layer; leaves it with its quantized weights.

    Raises:
        ValueError: If the layer runs without one of its sites, or values are not finite.
    """
    job, layer = work.job, work.layer
    groups = groups_by_input(job.adapter, layer, work.calls[0])
    tensors: dict[str, Tensor] = {}
    quantizers: dict[str, str] = {}
    unrouted: set[str] = set()
    choices: dict[str, tuple[int, int]] = {}
    for group in groups:
        for part in _share_group(work, group):
            tensors |= part.tensors
            quantizers |= part.quantizers
            unrouted |= set(part.unrouted)
            choices |= part.choices
    won = sorted(quantizers.values())
    experts = dict.fromkeys(_expert_of(block.name) for block in job.adapter.blocks(layer))
    return QuantizedLayer(
        tensors,
        {name: won.count(name) for name in dict.fromkeys(won)},
        tuple(expert for expert in experts if expert in unrouted),
        sum_sites(layer, job.batches.all_tokens - job.fit_tokens, choices),
    )


def install_layer(job: PackJob, layer: int, tensors: Mapping[str, Tensor]) -> None:
    """Give a loaded layer the weights of its packed tensors, as ``quantize_layer`` leaves it."""
    _install(job, [block.name for block in job.adapter.blocks(layer)], tensors)


def block_tensors(job: PackJob, layer: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those tensors of a layer that stand for its blocks."""
    return {
        f"{block.module}.{suffix}": tensors[f"{block.module}.{suffix}"]
        for block in job.adapter.blocks(layer)
        for suffix in _suffixes(job, block.name)
    }


def _share_group(work: LayerWork, group: Sequence[str]) -> list[_Found]:
    """Quantize the sites of one input, each process its part; every process installs all."""
    job, mine = work.job, _Found()
    known: dict[tuple[int, str], BatchInputs] = {}
    for inputs, parts, stream in _dealt(work, group):
        if parts == [None]:
            # Linears that read the same tensor are of this group; what is known of it is shared.
            place = id(inputs.x_TK), "" if stream is None else inputs.site
            if place not in known:
                known[place] = _known_of_linear(work, inputs, stream)
            outer = outer_of_linear(job.adapter.module(inputs.site), work.curvature, inputs.site)
            mine.take(job, _quantize_blocks(job, [inputs.site], known[place], outer))
        else:
            mine.choices |= _choices_of(work, inputs)
            mine.take(job, _quantize_experts(work, inputs, parts, stream, mine))
    note = json.dumps([mine.quantizers, mine.unrouted, mine.choices])
    found = []
    for rank, (text, tensors) in enumerate(job.team.exchange_tensors(note, mine.tensors)):
        quantizers, unrouted, choices = json.loads(text)
        if rank != job.team.rank:
            _install(job, list(quantizers), tensors)
        found.append(_Found(quantizers, unrouted, choices, tensors))
    return found


_Part = list[int] | None
"""Experts that are quantized together; None stands for a plain linear."""


def _dealt(
    work: LayerWork, group: Sequence[str]
) -> Iterator[tuple[SiteInputs, list[_Part], Stream | None]]:
    """The inputs of each site of which this process has parts, with those and where it writes to.

    How a site is cut into parts does not depend on how many processes there are.
    """
    mine: dict[str, list[_Part]] = defaultdict(list)
    team = work.job.team
    parts = [(site, part) for site in group for part in _parts(work.job, site)]
    for place, (site, part) in enumerate(parts):
        if team.takes(place):
            mine[site].append(part)
    if mine:
        inputs = inputs_of_sites(work, list(mine))
        for site in mine:
            yield inputs[site], mine[site], stream_of(work, inputs, site)


def _parts(job: PackJob, site: str) -> list[_Part]:
    if not is_fused_experts(job.adapter.module(site)):
        return [None]
    blocks = job.adapter.site_blocks(site)
    return list(expert_chunks(blocks, with_gradients=job.curvature is not None))


def _install(job: PackJob, blocks: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
    for name in blocks:
        block, scheme = job.adapter.block(name), job.allocation.schemes[name]
        device = job.adapter.source.device
        own = {s: tensors[f"{block.module}.{s}"].to(device) for s in _suffixes(job, name)}
        weight = from_tensors(own, scheme, block.out_features, block.in_features)
        is_rotated = job.rotated(block.layer) and scheme.kind != "bf16"
        w_NK = Candidate(name, weight, "", is_rotated).dense()
        job.adapter.install(name, w_NK, scheme, is_rotated)


def _suffixes(job: PackJob, name: str) -> Sequence[str]:
    block = job.adapter.block(name)
    scheme = job.allocation.schemes[name]
    return tuple(tensor_shapes(scheme, block.out_features, block.in_features))


def _choices_of(work: LayerWork, inputs: SiteInputs) -> dict[str, tuple[int, int]]:
    """What is kept of the original's choices on held-out tokens; empty where it is not beside."""
    origin = work.origins.get(inputs.site)
    if origin is None:
        return {}
    assert inputs.index_TR is not None
    assert origin.index_TR is not None
    experts = expert_count(work.job.adapter.module(inputs.site))
    held = slice(work.job.fit_tokens, None)
    return {inputs.site: count_kept(inputs.index_TR[held], origin.index_TR[held], experts)}


def _known_of_linear(work: LayerWork, inputs: SiteInputs, stream: Stream | None) -> BatchInputs:
    probe = linear_probe(work.job.adapter.module(inputs.site), inputs, with_output=False)
    origin = work.origins.get(inputs.site)
    found = None if origin is None else [origin.x_TK]
    return _known_of(work, [probe], None, found, None if stream is None else [stream.lack])


def _quantize_experts(
    work: LayerWork,
    inputs: SiteInputs,
    parts: Sequence[_Part],
    stream: Stream | None,
    found: _Found,
) -> Iterator[Candidate]:
    """Quantize some experts of a site; those without tokens are added to what was found."""
    job = work.job
    module, origin = job.adapter.module(inputs.site), work.origins.get(inputs.site)
    fit = inputs.x_TK[: job.fit_tokens]
    prior_KK = second_moments(fit, torch.ones(len(fit), device=device_of(module)))
    for experts in parts:
        assert experts is not None
        seen = [expert_inputs(module, inputs, expert) for expert in experts]
        # Taken while the experts have their own weights.
        outer = inner = None
        if origin is not None:
            outer = [origin.rows(one.rows, one.x_TH.device) for one in seen]
            inner = [one.inner_of(x_TH) for one, x_TH in zip(seen, outer, strict=True)]
        costs = outer_of_experts(module, seen, work.curvature.get(inputs.site))
        # All but the down projection read the same.
        first, *others = [name for name in projection_shapes(module) if name != "down"]
        probes = [one.probe(first) for one in seen]
        known = _known_of(work, probes, prior_KK, outer)
        for name in (first, *others):
            blocks = [_sibling(probe.block, name) for probe in probes]
            yield from _quantize_blocks(job, blocks, known, costs.get(name))
        # They are in place now: the inner activation is that of the quantized expert.
        probes = [one.probe("down") for one in seen]
        found.unrouted.extend(_expert_of(probe.block) for probe in probes if probe.tokens == 0)
        blocks = [probe.block for probe in probes]
        del outer, known  # as large as what the down projections need next
        known = _known_of(work, probes, None, inner, _lacks(stream, seen))
        yield from _quantize_blocks(job, blocks, known, costs.get("down"))


def _lacks(stream: Stream | None, seen: Sequence[ExpertInputs]) -> list[Deviation] | None:
    return None if stream is None else [stream.lack_of(one) for one in seen]


def _known_of(
    work: LayerWork,
    probes: Sequence[Probe],
    prior_KK: Tensor | None,
    origins: Sequence[Tensor] | None,
    lacks: Sequence[Deviation] | None = None,
) -> BatchInputs:
    """What there is to know of the probes' inputs, in the frame of their layer.

    ``origins`` are what the original model has in place of each probe's input, ``lacks`` what
    each is to put out besides.
    """
    found = [None] * len(probes) if origins is None else origins
    lacking = [None] * len(probes) if lacks is None else lacks
    blocks = [
        BlockInputs(p.block, p.x_TK, p.gate_T, p.fit_rows, x_TK, lack)
        for p, x_TK, lack in zip(probes, found, lacking, strict=True)
    ]
    known = make_inputs(blocks, prior_KK)
    return known.turned if work.job.rotated(work.layer) else known


def _quantize_blocks(
    job: PackJob, blocks: Sequence[str], known: BatchInputs, outer: Outer | None
) -> Iterator[Candidate]:
    """Quantize blocks of one shape, those of one scheme together, and install them."""
    by_scheme: dict[Scheme, list[int]] = defaultdict(list)
    for place, name in enumerate(blocks):
        by_scheme[job.allocation.schemes[name]].append(place)
    for scheme, places in sorted(by_scheme.items()):
        names = [blocks[place] for place in places]
        weights = [job.adapter.weight(name) for name in names]
        parts = None if outer is None else [piece[places] for piece in outer]
        batch = make_batch(names, weights, known.select(places), parts)
        candidates = quantize_batch(batch, scheme, job.method)
        for candidate in candidates:
            job.adapter.install(candidate.block, candidate.dense(), scheme, candidate.rotated)
        yield from candidates


def _expert_of(block: str) -> str:
    return block.rsplit(".", 1)[0]


def _sibling(block: str, projection: str) -> str:
    return f"{_expert_of(block)}.{projection}"
