"""The report on the demo model: measures it on held-out text and writes two files.

``report.json`` is for programs and tests, ``REPORT.md`` for people; both come from one record.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor, nn

from mxq.demo.corpus import CHOICE_COUNT, DOMAINS, documents, questions
from mxq.demo.measure import (
    DomainLoss,
    Tokenizer,
    answers,
    domain_of_expert,
    expert_shares,
    heldout_losses,
    specialisation_nats,
)

HELDOUT_DOCUMENTS = 500
QUESTIONS = 200


@dataclass(frozen=True, slots=True)
class RunFacts:
    """How a demo model came about."""

    seed: int
    steps: int
    tokens: int
    elapsed_s: float
    parameters: int
    balance_coefficient: float
    specialise_coefficient: float
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured: losses by domain and ``"all"``, routing shares [L, domains, E], answers.

    ``accuracy`` is a share of the questions for each domain and ``"all"``.
    """

    losses: Mapping[str, DomainLoss]
    shares_LDE: Tensor
    accuracy: Mapping[str, float]


def measure(model: nn.Module, tokenizer: Tokenizer) -> Measured:
    """Measure a model on held-out documents and on questions."""
    heldout = documents("heldout", HELDOUT_DOCUMENTS)
    asked = questions(QUESTIONS)
    right = [
        picked == question.answer
        for picked, question in zip(answers(model, tokenizer, asked), asked, strict=True)
    ]
    accuracy = {"all": sum(right) / len(right)}
    for domain in DOMAINS:
        own = [ok for ok, q in zip(right, asked, strict=True) if q.domain == domain]
        accuracy[domain] = sum(own) / len(own)
    losses = heldout_losses(model, tokenizer, heldout)
    return Measured(losses, expert_shares(model, tokenizer, heldout), accuracy)


def write_report(measured: Measured, facts: RunFacts, folder: Path) -> None:
    """Write ``report.json`` and ``REPORT.md`` into ``folder``."""
    record = {
        "run": asdict(facts),
        "heldout": {
            name: {
                **asdict(loss),
                "loss_per_token": round(loss.loss_per_token, 6),
                "entropy_per_token": round(loss.entropy_per_token, 6),
                "ratio": round(loss.ratio, 6),
            }
            for name, loss in measured.losses.items()
        },
        "accuracy": dict(measured.accuracy),
        "domains": list(DOMAINS),
        "expert_shares": _rounded(measured.shares_LDE),
        "specialisation_nats": [round(v, 4) for v in specialisation_nats(measured.shares_LDE)],
    }
    (folder / "report.json").write_text(json.dumps(record, indent=1) + "\n")
    sections = (_opening(facts), _loss_table(measured), _expert_tables(measured.shares_LDE))
    (folder / "REPORT.md").write_text("\n\n".join(sections) + "\n")


def _rounded(shares_LDE: Tensor) -> list[list[list[float]]]:
    """Nested lists with four decimals."""
    return [[[round(v, 4) for v in row] for row in layer] for layer in shares_LDE.tolist()]


def _opening(facts: RunFacts) -> str:
    """What the model is and how it came about."""
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    return f"""# The demo model

Written by `scripts/train_demo.py`; do not edit. `report.json` holds the same numbers.

A Qwen2-MoE model with {facts.parameters:,} parameters in bfloat16, trained on the synthetic
corpus of `mxq.demo`. Seed {facts.seed}, {facts.steps} steps, {facts.tokens:,} tokens in windows
of 256, {facts.elapsed_s:.0f} s on two CPU cores. {versions}.

The routers were trained with a load-balancing loss (coefficient {facts.balance_coefficient:g})
and with a reward for the mutual information of domain and expert (coefficient
{facts.specialise_coefficient:g}; 0 means that specialisation was left to itself)."""


def _loss_table(measured: Measured) -> str:
    """Loss beside entropy, and the accuracy of answers."""
    rows = [
        (
            name,
            f"{loss.tokens:,}",
            f"{loss.loss_per_token:.4f}",
            f"{loss.entropy_per_token:.4f}",
            f"{loss.ratio:.3f}",
            f"{measured.accuracy[name]:.1%}",
        )
        for name in (*DOMAINS, "all")
        for loss in (measured.losses[name],)
    ]
    heads = ("domain", "tokens", "loss, nats/token", "entropy, nats/token", "ratio", "accuracy")
    return f"""## Loss against entropy

{HELDOUT_DOCUMENTS} held-out documents, the saved bfloat16 weights loaded again and computed in
float32. Entropy is what the generator knows about its own choices, so no model can have a lower
loss in expectation. Accuracy is over {QUESTIONS} questions by summed log-likelihood of the
choice; chance is {1 / CHOICE_COUNT:.0%}.

{_table(heads, rows)}"""


def _expert_tables(shares_LDE: Tensor) -> str:
    """The use of experts by domain, one table for each layer."""
    experts = range(shares_LDE.shape[-1])
    heads = ("domain", *(f"expert {expert}" for expert in experts))
    owners_LDE = domain_of_expert(shares_LDE)
    information = specialisation_nats(shares_LDE)
    parts = [
        """## Use of experts

The share of each expert in the routing slots of a domain (each token takes two slots). The last
row is the share of the expert's slots that its most frequent domain has, the domains taken as
equally likely. The mutual information of domain and expert would be 0 without specialisation."""
    ]
    for layer, nats in enumerate(information):
        rows = [
            (domain, *(f"{share:.1%}" for share in shares_LDE[layer, index].tolist()))
            for index, domain in enumerate(DOMAINS)
        ]
        top = owners_LDE[layer].amax(0).tolist()
        rows.append(("main domain", *(f"{share:.1%}" for share in top)))
        parts.append(
            f"### Layer {layer}: mutual information {nats:.3f} nats\n\n{_table(heads, rows)}"
        )
    return "\n\n".join(parts)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, numbers to the right."""
    lines = [heads, ("---", *("---:" for _ in heads[1:])), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
