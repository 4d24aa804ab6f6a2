"""The Python interface: one call with plain arguments, custom parts as plain callables."""

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path

from torch import Tensor

from mxq.checkpoint.export.plan import ExportOptions
from mxq.choices import Choices, pick
from mxq.config import (
    OWN,
    AllocateOptions,
    CalibrationOptions,
    MeasureOptions,
    ModelOptions,
    OutputOptions,
    QuantizeOptions,
    ResourceOptions,
    of_effort,
    parse_menu,
    parse_size,
)
from mxq.exporting import ExportResult, run_export
from mxq.finish import QuantizeResult
from mxq.latency import profile_folder
from mxq.pipeline import run_quantize
from mxq.profiling.sensitivity import SENSITIVITY, Sensitivity
from mxq.progress import Report
from mxq.quantizers import QUANTIZERS, Quantizer, per_matrix
from mxq.scheme import Scheme, parse_schemes
from mxq.search.problem import Solver

Schemes = str | Sequence[str | Scheme]

Calibration = str | Tensor | Mapping[str, object] | Iterable[object]


def quantize(  # noqa: PLR0913  (each option stands alone and has a default)
    model: str | PathLike[str],
    *,
    output: str | PathLike[str],
    bits: float | None = None,
    size: str | int | None = None,
    plan: str | None = None,
    calibration: Calibration | None = None,
    schemes: Schemes | Mapping[str, Schemes] = (),
    samples: int = 128,
    seqlen: int = 512,
    seed: int = 0,
    expert_floor: int = 64,
    revision: str | None = None,
    scope: str = "auto",
    keep: Sequence[str] = (),
    sensitivity: str | Sensitivity = "fisher",
    effort: str = "balanced",
    quantizer: str | Quantizer | None = None,
    target: str | None = None,
    rotation: str = "auto",
    granularity: str = "block",
    tie_gate_up: bool = False,
    floor_bits: float | None = None,
    objective: str = "loss",
    r: float = 0.75,
    solver: str | Solver = "pulp",
    device: str | None = None,
    tokens: int | None = None,
    max_latency_us: float | None = None,
    engine: str | None = None,
    tensor_parallel: int = 1,
    pin: str = "auto",
    work: str | PathLike[str] | None = None,
    overwrite: bool = False,
    guard: bool = True,
    memory: str | int = "8GiB",
    force: bool = False,
    compute: str = "auto",
    progress: Report | None = None,
) -> QuantizeResult:
    """Quantize a model to a budget and write a checkpoint that ``from_pretrained`` loads.

    Args:
        model: Hub id, model folder, or "demo" for the embedded model.
        output: Folder to write.
        bits: Stored bits per weight of the quantized blocks, metadata included.
        size: Size of all weight files instead, e.g. "5.2GiB", or in bytes.
        plan: "uniform:SCHEME" to force a plan.
        calibration: A named set, ``file:PATH``, a list of texts, token ids, a mapping from domain
            names to those, or any iterable of them. None is WikiText-2 (the embedded set for
            "demo").
        schemes: Candidates; empty means the default for the model's dimensions. A mapping has
            lists for some projections ("down", "q_proj") and, under "*", for all others.
        samples: Calibration samples.
        seqlen: Tokens of each.
        seed: Seed of the choice of samples.
        expert_floor: Tokens below which an expert is topped up with spare samples.
        revision: Revision of a hub model.
        scope: "experts" (the feed-forward side), "all" linears, or "auto".
        keep: Regular expressions of parameters to leave as they are.
        sensitivity: A name in ``SENSITIVITY`` or a ``Sensitivity`` of your own.
        effort: "balanced", "fast" for less time and less accuracy, or "best" for the reverse;
            what it sets is in ``mxq.config.EFFORTS``.
        quantizer: A name in ``QUANTIZERS``, or a callable ``(w_NK, scheme, hessian_KK | None) ->
            QuantizedWeight``; None is the effort's.
        target: What blocks are fitted to: "original", their outputs in the original model,
            "stream", those and what the residual stream that they are added to is off, or "local",
            the outputs of their own weights on the inputs that quantized layers give; None is the
            effort's.
        rotation: "auto" rotates the inputs of a layer where that measures better; "on", "off".
        granularity: What shares a scheme: "block", "expert", "projection" or "layer".
        tie_gate_up: One scheme for the gate and up projections of an expert.
        floor_bits: Least mean bits of every layer.
        objective: "loss" for the whole model, or "mxmoe" for ``L^r T^(1-r)`` layer by layer.
        r: Exponent of the mxmoe objective.
        solver: "pulp", "lagrangian", or a ``mxq.search.problem.Solver`` of your own.
        device: Device of latencies, by name, or the JSON file of a device or of a profile.
        tokens: Tokens of one step, for latencies.
        max_latency_us: Most microseconds of all blocks for one step.
        engine: Plan inside the rules of an inference engine ("vllm", "sglang", "transformers"
            for transformers without mxq, "trtllm"): only schemes that it takes are measured, and
            rotation is off.
        tensor_parallel: Ranks that the engine will split each weight over.
        pin: "auto" keeps experts whose outputs are far above those of their layer at 8 bits or
            more (the widest schemes, where none has 8); "off". Not with "mxmoe" or a forced plan.
        work: Folder of the stages' results; None is ``work`` in the output folder.
        overwrite: Whether to replace what the output folder holds.
        guard: Whether to pack the uniform plan of the same size too and write the better one.
        memory: Most memory for kept activations, e.g. "8GiB", or in bytes; the rest goes to files
            in the work folder.
        force: Whether to start even if memory or disk look too small.
        compute: Where to compute: "auto" (a CUDA GPU if there is one), "cpu", "cuda" or "cuda:N".
        progress: Called with ``(stage, step, done, total)``. Ends of steps also go to the logger
            "mxq" of the standard library, at level INFO.

    Returns:
        What was written, the plans, and their losses on held-out text.

    Raises:
        ValueError: For anything that the caller can mend, with what to do.
    """
    size_bytes = parse_size(size) if isinstance(size, str) else size
    usual, target = of_effort(effort, None, target)
    quantizer = usual if quantizer is None else quantizer
    options = QuantizeOptions(
        model=ModelOptions(str(model), revision, scope, tuple(keep)),
        allocate=AllocateOptions(
            bits=bits,
            size_bytes=size_bytes,
            plan=plan,
            granularity=granularity,
            tie_gate_up=tie_gate_up,
            floor_bits=floor_bits,
            objective=objective,
            r=r,
            solver=solver,
            device=device,
            tokens=tokens,
            max_latency_us=max_latency_us,
            profiles=profile_folder(None),
            engine=engine,
            tensor_parallel=tensor_parallel,
            pin=pin,
        ),
        output=OutputOptions(Path(output), None if work is None else Path(work), overwrite, guard),
        calibration=CalibrationOptions(
            _named(str(model), calibration), samples, seqlen, seed, expert_floor
        ),
        measure=_measure_options(schemes, sensitivity, quantizer, rotation, target),
        resources=ResourceOptions(
            parse_size(memory) if isinstance(memory, str) else memory, force, compute
        ),
    )
    data = None if calibration is None or isinstance(calibration, str) else calibration
    return run_quantize(
        options, data=data, choices=_choices(sensitivity, quantizer), report=progress
    )


def export(  # noqa: PLR0913  (each option stands alone and has a default)
    checkpoint: str | PathLike[str],
    destination: str | PathLike[str],
    *,
    to: str,
    dtype: str | None = None,
    checkpoint_format: str | None = None,
    overwrite: bool = False,
    progress: Report | None = None,
) -> ExportResult:
    """Write a checkpoint of mxq for other tools, a decoder layer at a time.

    Args:
        checkpoint: Folder that ``quantize`` wrote.
        destination: Folder to write.
        to: "compressed-tensors", "gptq" or "dequantized".
        dtype: Type of dequantized weights: "bfloat16" (None), "float16" or "float32".
        checkpoint_format: "gptq" or "gptq_v2"; None is the latter where there are zero points.
        overwrite: Whether to replace a checkpoint that the destination holds, its card too.
        progress: Called with ``(stage, step, done, total)``.

    Returns:
        What was written, and which rules of each engine it breaks (``verdicts``, ``warnings``).

    Raises:
        ValueError: For anything that the caller can mend, with what to do.
    """
    options = ExportOptions(dtype, checkpoint_format)
    return run_export(
        Path(checkpoint), Path(destination), to, options, overwrite=overwrite, report=progress
    )


def _named(model: str, calibration: Calibration | None) -> str:
    if isinstance(calibration, str):
        return calibration
    if calibration is not None:
        return "own data"
    return "demo" if model == "demo" else "wikitext2"


def _measure_options(
    schemes: Schemes | Mapping[str, Schemes],
    sensitivity: str | Sensitivity,
    quantizer: str | Quantizer,
    rotation: str,
    target: str,
) -> MeasureOptions:
    others, by_projection = _menu(schemes)
    return MeasureOptions(
        others,
        sensitivity if isinstance(sensitivity, str) else OWN,
        quantizer if isinstance(quantizer, str) else OWN,
        rotation,
        by_projection,
        target,
    )


def _menu(
    schemes: Schemes | Mapping[str, Schemes],
) -> tuple[tuple[Scheme, ...], dict[str, tuple[Scheme, ...]]]:
    """Candidates of blocks, and of projections with lists of their own."""
    if isinstance(schemes, Mapping):
        lists = {name: _schemes(listed) for name, listed in schemes.items()}
        return lists.pop("*", ()), lists
    if isinstance(schemes, str) and schemes:
        return parse_menu(schemes)
    return (_schemes(schemes) if schemes else ()), {}


def _schemes(schemes: Schemes) -> tuple[Scheme, ...]:
    return parse_schemes(schemes if isinstance(schemes, str) else [str(s) for s in schemes])


def _choices(sensitivity: str | Sensitivity, quantizer: str | Quantizer) -> Choices | None:
    """Callables of the caller's own; None if both are names."""
    if isinstance(sensitivity, str) and isinstance(quantizer, str):
        return None
    metric = sensitivity
    if isinstance(metric, str):
        metric = pick(SENSITIVITY, "sensitivity", metric)
    own = per_matrix(quantizer) if callable(quantizer) else None
    if own is None:
        own = pick(QUANTIZERS, "quantizer", str(quantizer))
    return Choices(own, metric)
