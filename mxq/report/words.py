"""The numbers of a checkpoint in words: headlines, schemes, warnings, coverage, provenance.

Plain text without markup, the same for the page, the card and the terminal.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mxq.artifacts import Allocation
from mxq.checkpoint.expert_choices import ExpertChoices
from mxq.counted import counted
from mxq.heldout import FEW_TOKENS
from mxq.profiling.activation import ActivationStats
from mxq.profiling.super_experts import find_super_experts
from mxq.report.facts import Facts, PlanResult
from mxq.scheme import Scheme

UNASKED: tuple[object, ...] = (None, [], ())
"""Values of options that nobody asked for."""

LOWEST_KL = 5e-6
"""A KL below this is shown as 0 with five decimals, so it is written with a power of ten."""


MOST_NAMED = 10
"""Experts that one line names."""


@dataclass(frozen=True, slots=True)
class Headline:
    """One number that a reader looks for first, with what it is to be held against."""

    label: str
    value: str
    remark: str


def headlines(facts: Facts) -> tuple[Headline, ...]:
    """Bits, size, distance to the original and perplexity."""
    written, plan = facts.written, facts.plan
    return (
        Headline(
            "bits per weight",
            f"{plan.bits_per_weight:.3f}",
            f"{asked_bits(plan, ', ')}of {counted(plan.weights, 'weight')}",
        ),
        Headline("size of all tensors", byte_count(facts.tensor_bytes), _size_remark(facts)),
        Headline(
            "KL to the original, nats per token",
            kl_text(written.kl),
            _beside(facts, lambda result: kl_text(result.kl)),
        ),
        Headline(
            "perplexity",
            f"{written.perplexity:.4g}",
            f"original {written.original_perplexity:.4g}; "
            + _beside(facts, lambda result: f"{result.perplexity:.4g}"),
        ),
    )


@dataclass(frozen=True, slots=True)
class SchemeUse:
    """How many blocks have a scheme, of experts and beside them."""

    scheme: Scheme
    of_experts: int
    plain: int

    @property
    def blocks(self) -> int:
        """All of them."""
        return self.of_experts + self.plain


def scheme_uses(facts: Facts) -> tuple[SchemeUse, ...]:
    """Every scheme of the plan, fewest bits first."""
    experts = Counter(cell.scheme for cell in facts.cells if cell.expert is not None)
    plain = Counter(cell.scheme for cell in facts.cells if cell.expert is None)
    return tuple(
        SchemeUse(scheme, experts[scheme], plain[scheme]) for scheme in sorted({*experts, *plain})
    )


def warnings(facts: Facts) -> tuple[str, ...]:
    """What a reader has to know before trusting the numbers; ``facts.notes`` are apart."""
    found = [*few_tokens(facts.written.heldout_tokens)]
    if facts.record.written == "uniform":
        found.append("The uniform plan measured better on held-out text and is what was written.")
    if len(facts.results) == 1 and not is_uniform(facts.plan.description):
        found.append("No uniform plan was packed beside this one, so none is compared with.")
    if not facts.plan.proven:
        found.append(
            "The plan is not proven to be the best one: its predicted loss is "
            f"{facts.plan.predicted_loss:.4g}, the proven bound {facts.plan.bound:.4g}."
        )
    if facts.profile is not None:
        found += cold_experts(facts.profile)
    found += unrouted_experts(facts.written_pack.unrouted)
    return tuple(found)


def engine_line(plan: Allocation) -> str | None:
    """What the rules of an engine cost in predicted loss; None where a plan was for none."""
    if plan.engine is None:
        return None
    if plan.engine_cost is None or plan.unrestricted_loss is None:
        return f"The plan keeps the rules of {plan.engine}."
    of = f" (+{plan.engine_cost / plan.unrestricted_loss:.1%})" if plan.unrestricted_loss else ""
    return (
        f"The rules of {plan.engine} cost {plan.engine_cost:.6g} {plan.unit}{of}: the best plan of "
        f"these measurements without them is predicted at {plan.unrestricted_loss:.6g}."
    )


def pin_lines(plan: Allocation, profile: ActivationStats | None = None) -> list[str]:
    """Which experts are pinned and by how much they stand out, and which do and are not."""
    lines = []
    if plan.pinned:
        lines.append(f"Pinned to the widest formats: {_standing_out(plan.pinned)}.")
    found = () if profile is None else find_super_experts(profile.sites)
    free = {expert.name: expert.times for expert in found if expert.name not in plan.pinned}
    if free:
        lines.append(f"Not pinned, though they stand out: {_standing_out(free)}.")
    return lines


def _standing_out(times: Mapping[str, float]) -> str:
    """Experts, those first that stand out most, and what by."""
    names = sorted(times, key=lambda name: -times[name])
    parts = [f"{name} ({times[name]:.0f} times)" for name in names[:MOST_NAMED]]
    parts += [f"{len(names) - MOST_NAMED} more"] if len(names) > MOST_NAMED else []
    return f"{', '.join(parts)}, by largest output over the median of the layer's other experts"


def measured_on(tokens: int) -> str:
    """What a table of plans shows, as its title."""
    return f"Each plan that was packed, on {counted(tokens, 'held-out token')}"


def few_tokens(tokens: int) -> list[str]:
    """A warning where losses were measured on little text."""
    if tokens >= FEW_TOKENS:
        return []
    return [
        f"Measured on {counted(tokens, 'held-out token')} only: differences between the plans may "
        "be chance. More --samples or a longer --seqlen help."
    ]


def cold_experts(profile: ActivationStats) -> list[str]:
    """A warning where experts got little calibration text."""
    if not profile.cold:
        return []
    return [
        f"{counted(len(profile.cold), 'expert')} got fewer than "
        f"{counted(profile.floor, 'fitting token')} (e.g. {profile.cold[0]}) and lean on their "
        "layer's mean inputs. More or more varied calibration text helps."
    ]


def unrouted_experts(unrouted: Sequence[str]) -> list[str]:
    """A warning where experts got no calibration text at all."""
    if not unrouted:
        return []
    return [
        f"{counted(len(unrouted), 'expert')} got no token at all (e.g. {unrouted[0]}): "
        "gate and up were fitted to the layer's mean inputs, down was rounded to nearest."
    ]


def kept_choices(choices: Sequence[ExpertChoices]) -> list[str]:
    """How often routers choose as in the original, in one line; none where that is not known."""
    if not choices:
        return []
    mean = statistics.mean(one.share for one in choices)
    least = min(choices, key=lambda one: one.share)
    return [
        f"Routers keep {mean:.2%} of the original's choices of experts on "
        f"{counted(least.tokens, 'held-out token')} (mean of {counted(len(choices), 'layer')}; "
        f"least in layer {least.layer}: {least.share:.2%})."
    ]


def coverage(facts: Facts) -> tuple[str, ...]:
    """What was quantized, how, and what stayed in its type."""
    pack = facts.written_pack
    experts = {
        (cell.layer, cell.site, cell.expert) for cell in facts.cells if cell.expert is not None
    }
    lines = [
        f"Quantized: {counted(len(facts.cells), 'linear block')} in "
        f"{counted(len(facts.layer_numbers), 'layer')}"
        + (f", those of {counted(len(experts), 'expert')} among them." if experts else "."),
        "Blocks by quantizer: "
        + ", ".join(f"{name} {count:,}" for name, count in pack.quantizers.items())
        + ".",
    ]
    lines += filter(None, [engine_line(facts.plan)])
    lines += pin_lines(facts.plan, facts.profile)
    if facts.plan.rotated_layers:
        rotated = ", ".join(map(str, facts.plan.rotated_layers))
        lines.append(f"Layers with rotated inputs: {rotated}.")
    if facts.profile is not None and facts.profile.topped_up:
        lines.append(
            f"Topped up: {counted(len(facts.profile.topped_up), 'expert')}, with "
            f"{counted(facts.profile.added_samples, 'spare sample')} of calibration text."
        )
    if facts.origin is not None:
        lines += [
            f"Kept in their type: {counted(count, 'tensor')}, {why}."
            for why, count in sorted(facts.origin.kept.items())
        ]
    return tuple(lines)


def provenance(facts: Facts) -> tuple[tuple[str, str], ...]:
    """Name and value of all that the checkpoint was made from; nothing of what was not asked."""
    made_from = facts.record.provenance
    rows: list[tuple[str, object]] = []
    if facts.origin is not None:
        text = facts.origin.calibration
        rows += [
            ("model", facts.origin.model.model),
            ("revision", facts.origin.model.revision),
            (
                "calibration text",
                f"{text.spec}, {counted(text.samples, 'sample')} of "
                f"{counted(text.seqlen, 'token')}, seed {text.seed}",
            ),
        ]
    rows += [
        ("calibration tokens", _token_counts(facts)),
        ("plan", facts.plan.description),
        ("model digest", made_from.model_digest),
        ("digest of the calibration tokens", made_from.calibration_digest),
    ]
    settings = {name: value for name, value in made_from.settings.items() if name != "plans"}
    asked = None if facts.origin is None else facts.origin.allocate
    if asked is not None and asked.plan is not None:
        settings.pop("bits", None)  # of a forced plan nobody asked for bits
    rows += [(name.replace("_", " "), value) for name, value in settings.items()]
    rows.append(("versions", ", ".join(f"{k} {v}" for k, v in made_from.versions.items())))
    return tuple((name, _spoken(value)) for name, value in rows if value not in UNASKED)


def _token_counts(facts: Facts) -> str | None:
    """How many tokens losses and use of experts are of; None where the work folder is gone."""
    if facts.table is None:
        return None
    counts = f"{facts.table.calibration_tokens:,}, the held-out ones among them"
    return counts if facts.profile is None else f"{counts}; {facts.profile.total_tokens:,} profiled"


def asked_bits(plan: Allocation, end: str) -> str:
    """The budget and ``end``, or nothing for a uniform plan: nobody asks for its bits."""
    return "" if is_uniform(plan.description) else f"{plan.asked_bits:.3f} asked{end}"


def is_uniform(description: str) -> bool:
    """Whether a plan of that description has one scheme for all blocks."""
    return description.startswith("uniform ")


def plan_name(description: str) -> str:
    """A uniform plan by its scheme, another one as the mixed plan."""
    # What follows a comma is about the rules of an engine, which the plans of a table share.
    return description.partition(",")[0] if is_uniform(description) else "mixed plan"


def byte_count(count: float) -> str:
    """A size with three digits, in powers of 1000."""
    for power, unit in ((3, "GB"), (2, "MB"), (1, "kB")):
        if count >= 1000**power / 10:
            value = count / 1000**power
            return f"{value:.2f} {unit}" if value < 10 else f"{value:,.1f} {unit}"
    return f"{count:.0f} B"


def kl_text(kl: float) -> str:
    """A KL with five decimals, or with a power of ten where those would be 0."""
    return f"{kl:.1e}" if 0 < abs(kl) < LOWEST_KL else f"{kl:.5f}"


def _size_remark(facts: Facts) -> str:
    if facts.origin is None:
        return "size of the original not known"
    ratio = facts.origin.original_bytes / facts.tensor_bytes
    original = byte_count(facts.origin.original_bytes)
    return f"the original is {ratio:.2f} times as large, {original}"


def _beside(facts: Facts, show: Callable[[PlanResult], str]) -> str:
    others = [result for result in facts.results.values() if not result.written]
    if not others:
        return "no other plan measured"
    name, bits = plan_name(others[0].description), f"{others[0].bits_per_weight:.2f} bits"
    return f"{name}, {bits}: {show(others[0])}"


def _spoken(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
