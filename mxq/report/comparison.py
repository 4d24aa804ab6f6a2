"""The table of plans beside the original, and what its columns are.

The same rows and the same legend for ``mxq quantize``, ``mxq inspect``, the card and the page.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from mxq.heldout import MeasuredLoss
from mxq.report.facts import Facts
from mxq.report.words import byte_count, is_uniform, kl_text, plan_name

HEADS = ("", "bits asked", "bits", "size", "predicted", "KL", "perplexity", "top-1")


@dataclass(frozen=True, slots=True)
class Compared:
    """A plan of the table; ``tensor_bytes`` and ``loss`` are None for one that was not packed."""

    description: str
    asked_bits: float
    bits_per_weight: float
    predicted_loss: float
    tensor_bytes: int | None
    loss: MeasuredLoss | None
    is_written: bool = False


def comparison(facts: Facts) -> tuple[tuple[str, ...], ...]:
    """The original, the uniform plan over the budget, and each measured plan."""
    original_bytes = None if facts.origin is None else facts.origin.original_bytes
    original = original_row(facts.written.original_perplexity, original_bytes)
    return (original, *map(plan_row, _compared(facts)))


def original_row(perplexity: float, tensor_bytes: int | None) -> tuple[str, ...]:
    """The original; ``tensor_bytes`` is None where it is not known."""
    stored = "" if tensor_bytes is None else byte_count(tensor_bytes)
    return ("original", "", "", stored, "", "", f"{perplexity:.4f}", "")


def plan_row(plan: Compared) -> tuple[str, ...]:
    """A plan under ``HEADS``; nobody asks for the bits of a uniform plan, so it has none there."""
    mark = " +" if plan.loss is None else " *" if plan.is_written else ""
    return (
        plan_name(plan.description) + mark,
        "" if is_uniform(plan.description) else f"{plan.asked_bits:.3f}",
        f"{plan.bits_per_weight:.3f}",
        "" if plan.tensor_bytes is None else byte_count(plan.tensor_bytes),
        f"{plan.predicted_loss:.4g}",
        *_measured(plan.loss),
    )


def legend(unit: str) -> tuple[tuple[str, str], ...]:
    """What the marks and columns of the table are, by name; ``unit`` is that of predictions.

    The kinds of tokens are those of docs/how-it-works.md.
    """
    return (
        ("*, +", "* is written, + is over the budget and was not packed."),
        (
            "bits asked, bits",
            "Stored bits per weight of the quantized blocks, scales and zero points included: the "
            "budget, and what the plan takes of it.",
        ),
        ("size", "All tensors, those that stay in their type included."),
        (
            "predicted",
            "Sum of the losses of all blocks, each measured by itself on the calibration tokens "
            f"(the fitting and the held-out ones), in {unit}.",
        ),
        (
            "KL",
            "Measured on the held-out tokens: KL(original || checkpoint) in nats per token, 0 for "
            "equal predictions.",
        ),
        ("perplexity", "Measured on the held-out tokens: exp of the mean nats per token."),
        (
            "top-1",
            "Measured on the held-out tokens: the share of positions where original and checkpoint "
            "find the same token likeliest.",
        ),
        (
            "held-out tokens",
            "Text that no quantizer was fitted to. Sensitivities, quantizers and plans were chosen "
            "by it too, so the numbers flatter a little; eval/perplexity.py on other text does "
            "not.",
        ),
    )


def caption(unit: str) -> str:
    """The legend in three sentences, where the table is one of many lines."""
    return (
        "* written. + over the budget, not packed. Predicted: on the calibration tokens, in "
        f"{unit}. KL (to the original, in nats per token), perplexity and top-1 (same likeliest "
        "token): on the held-out tokens."
    )


def _compared(facts: Facts) -> Iterator[Compared]:
    above = facts.record.above
    if above is not None:
        bits = above.bits_per_weight
        yield Compared(above.description, bits, bits, above.predicted_loss, None, None)
    for name, plan in facts.results.items():
        yield Compared(
            plan.description,
            plan.bits_asked,
            plan.bits_per_weight,
            plan.predicted_loss,
            facts.record.packs[name].tensor_bytes,
            facts.record.losses[name],
            plan.written,
        )


def _measured(loss: MeasuredLoss | None) -> tuple[str, str, str]:
    if loss is None:
        return ("", "", "")
    return (kl_text(loss.kl), f"{loss.perplexity:.4f}", f"{loss.top1_agreement:.2%}")
