"""The numbers of a checkpoint in words: headline, comparison, schemes, warnings, provenance.

Plain text without markup, the same for the page, the card and the terminal.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mxq.artifacts import Allocation
from mxq.heldout import FEW_TOKENS
from mxq.profiling.activation import ActivationStats
from mxq.report.facts import Facts, Finding
from mxq.scheme import Scheme

LOWEST_KL = 5e-6
"""A KL below this is shown as 0 with five decimals, so it is written with a power of ten."""


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
            f"{plan.asked_bits:.3f} asked, over {plan.weights:,} weights",
        ),
        Headline("size of all tensors", byte_count(facts.tensor_bytes), _size_remark(facts)),
        Headline(
            "KL to the original, nats per token",
            kl_text(written.kl),
            _beside(facts, lambda finding: kl_text(finding.kl)),
        ),
        Headline(
            "perplexity",
            f"{written.perplexity:.4g}",
            f"original {written.original_perplexity:.4g}; "
            + _beside(facts, lambda finding: f"{finding.perplexity:.4g}"),
        ),
    )


def comparison(facts: Facts) -> tuple[tuple[str, ...], ...]:
    """Each measured plan: name, bits asked, bits, size, predicted, KL, perplexity, top-1."""
    first = facts.written
    perplexity = f"{first.original_perplexity:.4f}"
    rows = [("original", "", "", _original_size(facts), "", "", perplexity, "")]
    for name, finding in facts.findings.items():
        rows.append(
            (
                plan_name(finding) + (" *" if finding.written else ""),
                f"{finding.bits_asked:.3f}",
                f"{finding.bits_per_weight:.3f}",
                byte_count(facts.record.packs[name].tensor_bytes),
                f"{finding.predicted_loss:.4g}",
                kl_text(finding.kl),
                f"{finding.perplexity:.4f}",
                f"{finding.top1_agreement:.2%}",
            )
        )
    return tuple(rows)


COMPARISON_HEADS = ("", "bits asked", "bits", "size", "predicted", "KL", "perplexity", "top-1")


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
    if len(facts.findings) == 1 and not facts.plan.description.startswith("uniform"):
        found.append("No uniform plan was packed beside this one, so none is compared with.")
    if not facts.plan.proven:
        found.append(
            "The plan is not proven to be the best one: its predicted loss is "
            f"{facts.plan.predicted_loss:.4g}, the proven bound {facts.plan.bound:.4g}."
        )
    if facts.profile is not None:
        found += cold_experts(facts.profile)
    found += unrouted_experts(facts.record.packs[facts.record.written].unrouted)
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


def few_tokens(tokens: int) -> list[str]:
    """A warning where losses were measured on little text."""
    if tokens >= FEW_TOKENS:
        return []
    return [
        f"{tokens:,} held-out tokens are few: differences between the plans may be chance. More "
        "--samples or a longer --seqlen help."
    ]


def cold_experts(profile: ActivationStats) -> list[str]:
    """A warning where experts got little calibration text."""
    if not profile.cold:
        return []
    return [
        f"{_experts(len(profile.cold))} got fewer than {profile.floor} calibration tokens (e.g. "
        f"{profile.cold[0]}); they lean on their layer's mean inputs. More or more varied "
        "calibration text helps."
    ]


def unrouted_experts(unrouted: Sequence[str]) -> list[str]:
    """A warning where experts got no calibration text at all."""
    if not unrouted:
        return []
    return [
        f"{_experts(len(unrouted))} got no token at all (e.g. {unrouted[0]}): gate and up were "
        "fitted to the layer's mean inputs, down was rounded to nearest."
    ]


def coverage(facts: Facts) -> tuple[str, ...]:
    """What was quantized, how, and what stayed in its type."""
    pack = facts.record.packs[facts.record.written]
    experts = {
        (cell.layer, cell.site, cell.expert) for cell in facts.cells if cell.expert is not None
    }
    lines = [
        f"{len(facts.cells):,} linear blocks of {len(facts.layer_numbers)} layers are quantized"
        + (f", those of {len(experts):,} experts among them." if experts else "."),
        "Blocks by quantizer: "
        + ", ".join(f"{name} {count:,}" for name, count in pack.quantizers.items())
        + ".",
    ]
    lines += filter(None, [engine_line(facts.plan)])
    if facts.plan.rotated_layers:
        rotated = ", ".join(map(str, facts.plan.rotated_layers))
        lines.append(f"Layers with rotated inputs: {rotated}.")
    if facts.profile is not None and facts.profile.topped_up:
        lines.append(
            f"{len(facts.profile.topped_up):,} experts were topped up with "
            f"{facts.profile.added_samples} spare calibration samples."
        )
    if facts.origin is not None:
        lines += [
            f"Kept in their type: {count:,} tensors, {why}."
            for why, count in sorted(facts.origin.kept.items())
        ]
    return tuple(lines)


def provenance(facts: Facts) -> tuple[tuple[str, str], ...]:
    """Name and value of all that the checkpoint was made from."""
    made_from, rows = facts.record.provenance, []
    if facts.origin is not None:
        text = facts.origin.calibration
        rows += [
            ("model", facts.origin.model.model),
            ("revision", facts.origin.model.revision or "not named"),
            (
                "calibration text",
                f"{text.spec}, {text.samples} samples of {text.seqlen} tokens, seed {text.seed}",
            ),
        ]
    rows += [
        ("plan", facts.plan.description),
        ("model digest", made_from.model_digest),
        ("digest of the calibration tokens", made_from.calibration_digest),
    ]
    shown = {name: value for name, value in made_from.settings.items() if name != "plans"}
    rows += [(name, _spoken(value)) for name, value in shown.items()]
    rows.append(("versions", ", ".join(f"{k} {v}" for k, v in made_from.versions.items())))
    return tuple(rows)


def plan_name(finding: Finding) -> str:
    """A uniform plan by its scheme, another one as the mixed plan."""
    is_uniform = finding.description.startswith("uniform ")
    return finding.description if is_uniform else "mixed plan"


def legend(facts: Facts) -> str:
    """What the columns of the comparison mean."""
    return (
        f"* written. Predicted: sum over all blocks, in {facts.plan.unit}. KL: KL(original || "
        "checkpoint) in nats per token. Top-1: positions with the same likeliest token. No "
        "quantizer was fitted to these tokens, but sensitivities, quantizers and plans were chosen "
        "by them too, so the numbers flatter a little; eval/perplexity.py on other text does not."
    )


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


def _experts(count: int) -> str:
    return "1 expert" if count == 1 else f"{count:,} experts"


def _size_remark(facts: Facts) -> str:
    if facts.origin is None:
        return "size of the original not known"
    ratio = facts.origin.original_bytes / facts.tensor_bytes
    original = byte_count(facts.origin.original_bytes)
    return f"the original is {ratio:.2f} times as large, {original}"


def _original_size(facts: Facts) -> str:
    return "" if facts.origin is None else byte_count(facts.origin.original_bytes)


def _beside(facts: Facts, show: Callable[[Finding], str]) -> str:
    others = [finding for finding in facts.findings.values() if not finding.written]
    if not others:
        return "no other plan measured"
    bits = f"{others[0].bits_per_weight:.2f} bits"
    return f"{plan_name(others[0])} of {bits}: {show(others[0])}"


def _spoken(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
