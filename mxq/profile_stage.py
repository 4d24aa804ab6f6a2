"""Stage 1: the calibration tokens, topped up for cold experts, and the activation statistics."""

from collections import Counter

import torch
from torch import Tensor

from mxq.artifacts import Provenance
from mxq.compute import describe
from mxq.config import CalibrationOptions, MeasureOptions, ModelOptions, OutputOptions
from mxq.models.adapter import ModelAdapter
from mxq.models.sweep import make_batches
from mxq.profiling.activation import (
    ActivationStats,
    choose_top_up,
    profile_routing,
    under_floor,
)
from mxq.profiling.calibration import CalibrationSet
from mxq.profiling.draw import draw_calibration
from mxq.progress import Report, stage
from mxq.records import differences
from mxq.workspace import (
    CalibrationTokens,
    RunSettings,
    Workspace,
    make_provenance,
    make_tokens,
    share_calibration,
)

CalibrationData = object
"""A spelling, texts, token ids, or anything else that ``load_calibration`` takes."""

Drawn = tuple[CalibrationSet, CalibrationSet | None, CalibrationSet]
"""Samples to fit to, in reserve, and held out."""


def run_profile(  # noqa: PLR0913  (what is recorded in the work folder, and the callbacks)
    work: Workspace,
    adapter: ModelAdapter,
    model: ModelOptions,
    calibration: CalibrationOptions,
    measured: MeasureOptions,
    *,
    data: CalibrationData | None = None,
    report: Report | None = None,
    kept_for: OutputOptions | None = None,
) -> tuple[CalibrationTokens, ActivationStats]:
    """Stage 1: calibration tokens, topped up for cold experts, and the activation statistics.

    ``kept_for`` is an output whose result the profile in the work folder belongs to.

    Raises:
        ValueError: If such a profile would have to be replaced by that of other text.
    """

    def make() -> tuple[CalibrationTokens, ActivationStats]:
        drawn = draw_calibration(adapter, calibration, data)
        provenance = _profile_of(adapter, drawn, calibration.expert_floor)
        if kept_for is not None:
            _check_kept(work, provenance, kept_for)
        work.save("settings", RunSettings(model, calibration, measured, adapter.source.digest()))
        return _profile(work, adapter, drawn, provenance, report)

    return share_calibration(work.team, make)


def _check_kept(work: Workspace, provenance: Provenance, output: OutputOptions) -> None:
    """Raise ValueError if the profile of a finished run would be replaced by another."""
    try:
        changed = differences(work.profile().provenance, provenance)
    except ValueError:
        return  # absent or damaged: there is nothing to keep
    if changed:
        raise ValueError(
            f"{output.output} holds the result of another run, made from {changed}; choose another "
            "--output, or allow --overwrite"
        )


def _seen(drawn: Drawn) -> tuple[Tensor, tuple[str, ...]]:
    """Token ids and domains of all samples that are not held out."""
    base, spare, _ = drawn
    if spare is None:
        return base.input_ids, base.domains
    return torch.cat([base.input_ids, spare.input_ids]), (*base.domains, *spare.domains)


def _profile_of(adapter: ModelAdapter, drawn: Drawn, floor: int) -> Provenance:
    """What the profile of drawn samples is made from."""
    seen, domains = _seen(drawn)
    settings = {
        "floor": floor,
        "scope": adapter.scope,
        "keep": list(adapter.keep),
        "domains": dict(Counter(domains)),
        "compute": describe(adapter.source.device),
    }
    digest = make_tokens(seen, drawn[2].input_ids).digest
    return make_provenance(adapter.source.digest(), digest, settings)


def _profile(
    work: Workspace,
    adapter: ModelAdapter,
    drawn: Drawn,
    provenance: Provenance,
    report: Report | None,
) -> tuple[CalibrationTokens, ActivationStats]:
    """Tokens and profile of drawn samples: to fit to, in reserve, and held out."""
    base, _, heldout = drawn
    seen, domains = _seen(drawn)
    floor = provenance.settings["floor"]
    cached = work.cached("profile", ActivationStats, provenance)
    if cached is not None and work.has_tokens(cached.tokens_digest):
        return work.tokens(), cached
    batches = make_batches(seen, None, store=work.store, device=adapter.source.device)
    sites, routing = profile_routing(adapter, batches, domains, stage(report, "profile"))
    samples = range(len(base.input_ids))
    extra = range(len(base.input_ids), len(seen))
    added = choose_top_up(routing, samples, extra, floor)
    before = under_floor(routing, samples, floor)
    cold = under_floor(routing, (*samples, *added), floor)
    tokens = make_tokens(seen[[*samples, *added]], heldout.input_ids)
    profile = ActivationStats(
        domains=tuple(sorted(set(domains))),
        total_tokens=seen.numel(),
        sites=sites,
        floor=floor,
        topped_up=tuple(name for name in before if name not in cold),
        cold=cold,
        added_samples=len(added),
        tokens_digest=tokens.digest,
        provenance=provenance,
    )
    work.save_tokens(tokens)
    work.save("profile", profile)
    return tokens, profile
