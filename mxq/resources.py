"""What a run will need of the machine, known from headers and options before the first long step.

Memory and disk are sums of what is held at the same time. Time is counted operations over rates
that are measured here in a fraction of a second; take it as the order of magnitude.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from mxq.blocks import LinearBlock
from mxq.checkpoint.size import kept_bytes
from mxq.choices import Choices, measure_settings
from mxq.config import (
    AllocateOptions,
    CalibrationOptions,
    MeasureOptions,
    QuantizeOptions,
    ResourceOptions,
)
from mxq.counted import spoken_bytes
from mxq.curvature import curvature_bytes
from mxq.heap import KEPT_BYTES
from mxq.machine import Machine, Rates, machine, measure_rates
from mxq.models.activations import COLD_SHARE
from mxq.models.adapter import ModelAdapter
from mxq.models.sweep import BATCH_TOKENS
from mxq.operations import factors, moments, one_scheme, refine_again
from mxq.profiling.losses import MeasureSettings
from mxq.profiling.sensitivity import SENSITIVITY
from mxq.quantizers.choose import BATCH_BYTES, quantizing_bytes
from mxq.quantizers.refine import SWEEPS
from mxq.workspace import CalibrationTokens, Workspace

LIBRARIES_BYTES = 512 * 2**20
"""Resident memory of Python with torch and transformers, a model of nothing loaded."""

FLOAT_BYTES = 4
"""Weights and activations are float32 while they are computed with."""

STAGES = ("profile", "measure", "pack", "measured loss")
"""Those that take time."""

_PRODUCTS = {"rtn": 0.0, "gptq": 1.0, "refined": 2.0 + SWEEPS, "kronecker": 2.0 + SWEEPS}
"""What a quantizer's columns take, in units of N K^2 multiply-adds, beside the clip search."""

_WITHOUT_GRADIENTS = MeasureOptions(sensitivity="output_mse")
"""Of stages that measure nothing, so they keep no gradients."""

Announce = Callable[["Needs", "Machine"], None]
"""Shows the needs of a run before its first long step."""


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes of memory and of disk by what takes them, and seconds of each stage.

    The ``memory_bytes`` are held together at the worst moment, the ``disk_bytes`` too. ``notes``
    are what else to know of the run.
    """

    memory_bytes: Mapping[str, int]
    disk_bytes: Mapping[str, int]
    seconds: Mapping[str, float]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Workload:
    """The tokens of a run and what is done with them.

    ``plans`` are packed and measured, each of about ``bits`` per weight. ``processes`` share the
    work; memory is that of each of them.
    """

    fit_tokens: int
    heldout_tokens: int
    batch_tokens: int
    settings: MeasureSettings
    plans: int
    bits: float
    limit_bytes: int
    processes: int = 1

    @property
    def tokens(self) -> int:
        """Fitted to and held out."""
        return self.fit_tokens + self.heldout_tokens


@dataclass(frozen=True, slots=True)
class Sizes:
    """Counts of one model's weights and of the widths of its activations.

    ``layer_elements`` are the parameters of each decoder layer, ``outside_elements`` those of the
    others; ``blocks`` lists each layer's, ``share`` is the part of all tokens that a routed expert
    sees on average. ``kept_bytes`` are the bytes in files of what is not quantized.
    """

    layer_elements: tuple[int, ...]
    outside_elements: int
    largest_outside: int
    hidden: int
    vocabulary: int
    blocks: tuple[tuple[LinearBlock, ...], ...]
    share: float
    stored_bytes: int
    kept_bytes: int


def check_quantize(
    adapter: ModelAdapter,
    options: QuantizeOptions,
    measured: MeasureOptions,
    choices: Choices | None = None,
    announce: Announce | None = None,
) -> None:
    """Announce what ``mxq quantize`` will need; raise ValueError where it is not there."""
    bits = _planned_bits(adapter, options.allocate)
    plans = 2 if options.output.guard and options.allocate.plan is None else 1
    settings = measure_settings(adapter, measured, choices)
    work = workload(options.calibration, settings, options.resources, plans=plans, bits=bits)
    _check(adapter, work, options.resources, options.output.work_folder, announce)


def check_profile(
    adapter: ModelAdapter,
    calibration: CalibrationOptions,
    resources: ResourceOptions,
    folder: Path,
    announce: Announce | None = None,
) -> None:
    """The same for ``mxq profile``."""
    work = _measuring(adapter, calibration, _WITHOUT_GRADIENTS, resources)
    _check(adapter, work, resources, folder, announce, stages=("profile",))


def check_pack(
    adapter: ModelAdapter,
    tokens: CalibrationTokens,
    bits: float,
    folder: Path,
    *,
    resources: ResourceOptions,
    announce: Announce | None = None,
) -> None:
    """The same for ``mxq pack`` of a plan of so many bits per weight."""
    fit, heldout = tokens.fit_ids.numel(), tokens.heldout_ids.numel()
    batch = _batch_tokens(fit, tokens.fit_ids.shape[1])
    # Losses and gradients are known; what is left of the measuring options is the quantizer.
    quantizer = Workspace(folder).settings().measure.quantizer
    settings = measure_settings(adapter, MeasureOptions(quantizer=quantizer), None)
    settings = replace(settings, sensitivity=SENSITIVITY[_WITHOUT_GRADIENTS.sensitivity])
    work = Workload(fit, heldout, batch, settings, 1, bits, resources.memory_bytes)
    _check(adapter, work, resources, folder, announce, stages=("pack", "measured loss"))


def check_measure(
    adapter: ModelAdapter,
    calibration: CalibrationOptions,
    measured: MeasureOptions,
    resources: ResourceOptions,
    folder: Path,
    announce: Announce | None = None,
) -> None:
    """The same for ``mxq measure``, which packs nothing."""
    work = _measuring(adapter, calibration, measured, resources)
    _check(adapter, work, resources, folder, announce, stages=("profile", "measure"))


def workload(
    calibration: CalibrationOptions,
    settings: MeasureSettings,
    resources: ResourceOptions,
    *,
    plans: int,
    bits: float,
) -> Workload:
    """The tokens that calibration options ask for, with spare and held-out samples."""
    heldout = max(1, calibration.samples // 8) * calibration.seqlen
    fit = (calibration.samples + calibration.samples // 4) * calibration.seqlen
    batch = _batch_tokens(fit, calibration.seqlen)
    return Workload(fit, heldout, batch, settings, plans, bits, resources.memory_bytes)


def _measuring(
    adapter: ModelAdapter,
    calibration: CalibrationOptions,
    measured: MeasureOptions,
    resources: ResourceOptions,
) -> Workload:
    """The workload of stages that pack nothing."""
    settings = measure_settings(adapter, measured, None)
    return workload(calibration, settings, resources, plans=0, bits=0.0)


def _batch_tokens(fit: int, seqlen: int) -> int:
    """Tokens of the largest batch, which holds at least one sample."""
    return min(max(BATCH_TOKENS, seqlen), fit)


def sizes_of(adapter: ModelAdapter) -> Sizes:
    """Counted on the module tree; no weight is read."""
    source, model = adapter.source, adapter.source.model
    inside = [sum(p.numel() for p in layer.parameters()) for layer in source.layers]
    prefix = source.layers_name + "."
    outside = [p.numel() for n, p in model.named_parameters() if not n.startswith(prefix)]
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Module)
    assert isinstance(embedding.weight, torch.Tensor)
    vocabulary, hidden = embedding.weight.shape
    config = model.config.get_text_config()
    experts = max((b.expert + 1 for b in adapter.blocks() if b.expert is not None), default=1)
    taken = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_topk", None) or 1
    return Sizes(
        layer_elements=tuple(inside),
        outside_elements=sum(outside),
        largest_outside=max(outside, default=0),
        hidden=hidden,
        vocabulary=vocabulary,
        blocks=tuple(adapter.blocks(layer) for layer in range(len(source.layers))),
        share=min(1.0, int(taken) / experts),
        stored_bytes=sum((source.folder / n).stat().st_size for n in set(source.files.values())),
        kept_bytes=kept_bytes(adapter),
    )


def estimate(sizes: Sizes, work: Workload, rates: Rates) -> Needs:
    """Memory, disk and time of ``mxq quantize``."""
    return Needs(_memory(sizes, work), _disk(sizes, work), _seconds(sizes, work, rates))


def check_needs(needs: Needs, found: Machine, resources: ResourceOptions) -> None:
    """Raise ValueError if memory or disk will not do, unless the options force the run."""
    if resources.force:
        return
    memory, disk = sum(needs.memory_bytes.values()), sum(needs.disk_bytes.values())
    if memory > found.memory_bytes:
        raise ValueError(
            f"the run needs about {spoken_bytes(memory)} of memory and "
            f"{spoken_bytes(found.memory_bytes)} are free ({_largest(needs.memory_bytes)}); "
            "lower --memory, free some, or start it with --force"
        )
    if disk > found.disk_bytes:
        raise ValueError(
            f"the run needs about {spoken_bytes(disk)} of disk and "
            f"{spoken_bytes(found.disk_bytes)} are free in the work folder "
            f"({_largest(needs.disk_bytes)}); choose another --work, raise --memory, take fewer "
            "--samples, or start it with --force"
        )


def _check(
    adapter: ModelAdapter,
    work: Workload,
    resources: ResourceOptions,
    folder: Path,
    announce: Announce | None,
    stages: Sequence[str] = STAGES,
) -> None:
    rates = Rates(1e11, 1e7) if announce is None else measure_rates(adapter.source.device)
    needs, found = estimate(sizes_of(adapter), work, rates), machine(folder)
    needs = replace(needs, seconds={name: needs.seconds[name] for name in stages})
    if announce is not None:
        announce(needs, found)
    check_needs(needs, found, resources)


def _planned_bits(adapter: ModelAdapter, options: AllocateOptions) -> float:
    """Bits per weight of the blocks that the budget asks for."""
    blocks = adapter.blocks()
    weights = sum(block.weights for block in blocks)
    forced = options.forced_scheme()
    if forced is not None:
        return sum(forced.storage_bits(b.out_features, b.in_features) for b in blocks) / weights
    return options.bits or 8 * (options.size_bytes or 0) / weights


def _memory(sizes: Sizes, work: Workload) -> dict[str, int]:
    largest = max(sizes.layer_elements)
    blocks = [block for layer in sizes.blocks for block in layer]
    widest = max(blocks, key=lambda block: block.weights)
    one = quantizing_bytes(widest, with_gradients=work.settings.method.reads_gradients)
    together = sum(block.expert is not None for block in sizes.blocks[widest.layer])
    quantizing = max(one, min(BATCH_BYTES, together * one))
    # A fused parameter exists a second time while it is merged, up to two thirds of a layer.
    loading = 2 * FLOAT_BYTES * largest // 3
    widths = max(_activation_widths(sizes, layer) for layer in range(len(sizes.blocks)))
    batch = FLOAT_BYTES * work.batch_tokens * max(2 * widths, 3 * sizes.vocabulary)
    return {
        "Python and libraries": LIBRARIES_BYTES,
        "embeddings and head": FLOAT_BYTES * (sizes.outside_elements + sizes.largest_outside),
        "largest layer": FLOAT_BYTES * largest,
        "its loading or quantizing": max(loading, quantizing + largest),
        "one batch in it": batch,
        "freed memory, kept for reuse": KEPT_BYTES,
        "kept activations": min(work.limit_bytes, max(map(sum, _activations(sizes, work)))),
    }


def _activations(sizes: Sizes, work: Workload) -> list[tuple[int, int]]:
    """Bytes of activations that are kept by the stage that measures and, if any, that packs.

    Of each: hidden states, and what the sites of one layer read (and its gradients).
    """
    inputs = max(_activation_widths(sizes, layer) for layer in range(len(sizes.blocks)))
    gradients = work.settings.sensitivity.needs_gradients
    stages = [(len(sizes.blocks) + 2, 2 * inputs) if gradients else (2, inputs)]
    if work.plans:
        # The same tokens pass the original layers beside, and both have a stream.
        stages.append((4, 2 * (inputs + sizes.hidden)))
    one = FLOAT_BYTES * work.tokens
    # Each batch's, and those of all batches in one.
    return [(one * sizes.hidden * depth, 2 * one * widths) for depth, widths in stages]


def _activation_widths(sizes: Sizes, layer: int) -> int:
    """Summed widths of the inputs of a layer's sites; the experts of a layer share one."""
    linears = sum(block.in_features for block in sizes.blocks[layer] if block.expert is None)
    routed = any(block.expert is not None for block in sizes.blocks[layer])
    return linears + (sizes.hidden if routed else 0)


def _disk(sizes: Sizes, work: Workload) -> dict[str, int]:
    """Of the stage that takes more: activations are gone when it ends, and packing comes last."""
    weights = sum(block.weights for layer in sizes.blocks for block in layer)
    packed = work.plans * (int(weights * work.bits / 8) + sizes.kept_bytes)
    measuring, *packing = (_spilled(*kept, work.limit_bytes) for kept in _activations(sizes, work))
    stages = [{"activations over the limit": measuring}]
    stages += [
        {"packed checkpoints": packed, "activations over the limit": spilled} for spilled in packing
    ]
    return max(stages, key=lambda parts: sum(parts.values())) | _gradients(sizes, work)


def _spilled(cold: int, hot: int, limit: int) -> int:
    """Bytes of kept activations that go to files."""
    in_memory = min(cold, int(COLD_SHARE * limit))
    return cold - in_memory + max(0, hot - (limit - in_memory))


def _gradients(sizes: Sizes, work: Workload) -> dict[str, int]:
    """Bytes of the second moments of gradients, where they are made for the quantizer."""
    if not (work.settings.method.reads_gradients and work.settings.sensitivity.needs_gradients):
        return {}
    return {"second moments of gradients": sum(map(curvature_bytes, sizes.blocks))}


def _seconds(sizes: Sizes, work: Workload, rates: Rates) -> dict[str, float]:
    """Seconds of each stage: products, clip searches, and reading the layers."""
    blocks = [block for layer in sizes.blocks for block in layer]
    idle = sum(b.weights * (1.0 - sizes.share) for b in blocks if b.expert is not None)
    active = sum(sizes.layer_elements) - idle
    forward = 2.0 * active / rates.operations_per_second
    read = sizes.stored_bytes / rates.read_bytes_per_second
    integers = [scheme for scheme in work.settings.schemes if scheme.kind == "int"]
    products = _PRODUCTS.get(work.settings.method.name, 1.0)
    tries = 2 if work.settings.rotation == "auto" else 1
    # Blocks are dealt to the processes; every one of them runs the layers.
    one = one_scheme(blocks, rates, products) / work.processes
    # The cheapest scheme is tried both ways. Second moments and, for GPTQ, their factors are made
    # once for all schemes of a visit.
    operations = factors(blocks) if products else 0.0
    operations += moments(sizes.share, blocks, work.fit_tokens)
    inputs = operations / rates.operations_per_second / work.processes
    again = refine_again(blocks, rates) if work.settings.method.reads_gradients else 0.0
    again /= work.processes
    # Forward twice and backward once, or forward once; the experts' probes; outputs by scheme.
    runs = (5 if work.settings.sensitivity.needs_gradients else 3) + 2 * len(work.settings.schemes)
    measured = (len(integers) + (tries - 1)) * one + tries * inputs
    return {
        "profile": read + 2 * forward * work.tokens,
        "measure": 2 * read + runs * forward * work.tokens + measured,
        # The original layers run beside; how inputs differ takes moments and a factor, too.
        "pack": work.plans * (read + 4 * forward * work.tokens + one + 2 * inputs + again),
        "measured loss": (1 + work.plans) * (read + forward * work.heldout_tokens),
    }


def _largest(parts: Mapping[str, int]) -> str:
    name = max(parts, key=lambda part: parts[part])
    return f"most of it for {name}: {spoken_bytes(parts[name])}"
