"""What a model makes of the demo corpus: loss beside entropy, use of experts, answers.

Needs torch, and so is not imported with ``mxq.demo``. A document is measured as it was trained
on: behind an end mark, and with the loss of its own end mark counted.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from mxq.demo.corpus import DOMAINS, Document, Question

BATCH_SEQUENCES = 16


class Tokenizer(Protocol):
    """The two things that are asked of a tokenizer of transformers."""

    eos_token_id: int

    def encode(self, text: str) -> list[int]:
        """The token ids of ``text``."""
        ...


@dataclass(frozen=True, slots=True)
class DomainLoss:
    """The loss of a model over the documents of one domain, or of all, and their entropy."""

    documents: int
    tokens: int
    loss_nats: float
    entropy_nats: float

    @property
    def loss_per_token(self) -> float:
        """Nats per token that the model needs."""
        return self.loss_nats / self.tokens

    @property
    def entropy_per_token(self) -> float:
        """Nats per token that no model can do without."""
        return self.entropy_nats / self.tokens

    @property
    def ratio(self) -> float:
        """Loss over entropy; 1 is the best that can be expected."""
        return self.loss_nats / self.entropy_nats


def heldout_losses(
    model: nn.Module, tokenizer: Tokenizer, documents: Sequence[Document]
) -> dict[str, DomainLoss]:
    """The loss for each domain that occurs in ``documents``, and for ``"all"``."""
    sequences = [_marked(tokenizer, document.text) for document in documents]
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0] * 4)
    losses = _token_losses(model, sequences)
    for document, loss_T in zip(documents, losses, strict=True):
        row = (1.0, float(loss_T.numel()), float(loss_T.sum()), document.entropy_nats)
        for name in (document.domain, "all"):
            sums[name] = [a + b for a, b in zip(sums[name], row, strict=True)]
    return {
        name: DomainLoss(int(count), int(tokens), loss_nats, entropy_nats)
        for name, (count, tokens, loss_nats, entropy_nats) in sums.items()
    }


def expert_shares(model: nn.Module, tokenizer: Tokenizer, documents: Sequence[Document]) -> Tensor:
    """The share of each expert in the routing slots of each domain, [L, domains, E] in float64.

    A token takes ``num_experts_per_tok`` slots. Each [layer, domain] row sums to 1.
    """
    rows = []
    for domain in DOMAINS:
        own = [_marked(tokenizer, d.text) for d in documents if d.domain == domain]
        slots_LE = _slot_counts(model, own)
        rows.append(slots_LE / slots_LE.sum(-1, keepdim=True))
    return torch.stack(rows, dim=1)


def specialisation_nats(shares_LDE: Tensor) -> tuple[float, ...]:
    """The mutual information between domain and expert for each layer, the domains equally likely.

    It is 0 if all domains use the experts alike and at most the log of the number of domains.
    """
    overall_L1E = shares_LDE.mean(dim=1, keepdim=True)
    # An expert that no domain uses has no part in the sum; xlogy makes its 0 log 0 a 0.
    logs_LDE = torch.xlogy(shares_LDE, shares_LDE) - torch.xlogy(shares_LDE, overall_L1E)
    return tuple(float(value) for value in logs_LDE.sum(-1).mean(-1))


def domain_of_expert(shares_LDE: Tensor) -> Tensor:
    """The share of each domain in the slots of each expert, [L, domains, E].

    The domains are taken as equally likely. The column of an expert without slots is 0.
    """
    total_L1E = shares_LDE.sum(dim=1, keepdim=True)
    return torch.where(total_L1E > 0, shares_LDE / total_L1E, torch.zeros_like(shares_LDE))


def answers(
    model: nn.Module, tokenizer: Tokenizer, questions: Sequence[Question]
) -> tuple[int, ...]:
    """The choice with the highest summed log-likelihood, for each question."""
    picked = []
    for question in questions:
        start = len(tokenizer.encode(question.prompt))
        whole = [tokenizer.encode(question.prompt + choice) for choice in question.choices]
        sequences = [[tokenizer.eos_token_id, *ids] for ids in whole]
        losses = _token_losses(model, sequences)
        # Loss i is that of token i of the text, so the choice begins at loss ``start``.
        nats = [float(loss_T[start:].sum()) for loss_T in losses]
        picked.append(min(range(len(nats)), key=nats.__getitem__))
    return tuple(picked)


def _marked(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text between two end marks."""
    return [tokenizer.eos_token_id, *tokenizer.encode(text), tokenizer.eos_token_id]


def _token_losses(model: nn.Module, sequences: Sequence[list[int]]) -> list[Tensor]:
    """The -log p of each token but the first, for each sequence."""
    losses = []
    for batch, ids_BT in _batches(sequences):
        with torch.no_grad():
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits.float()
        log_p_BTV = logits_BTV[:, :-1].log_softmax(-1)
        loss_BT = -log_p_BTV.gather(-1, ids_BT[:, 1:, None])[..., 0]
        losses += [row[: len(ids) - 1] for row, ids in zip(loss_BT, batch, strict=True)]
    return losses


def _slot_counts(model: nn.Module, sequences: Sequence[list[int]]) -> Tensor:
    """How many slots each expert of each layer got, [L, E] in float64."""
    counts_LE = torch.zeros(())
    for batch, ids_BT in _batches(sequences):
        with torch.no_grad():
            output = model(input_ids=ids_BT, use_cache=False, output_router_logits=True)
        logits_LTE = torch.stack([logits.float() for logits in output.router_logits])
        lengths = torch.tensor([len(ids) for ids in batch])
        real_T = (torch.arange(ids_BT.shape[1]) < lengths[:, None]).flatten()
        top_k: int = model.config.num_experts_per_tok  # type: ignore[union-attr, assignment]
        picked = logits_LTE[:, real_T].topk(top_k, dim=-1).indices
        experts = torch.arange(logits_LTE.shape[-1])
        counts_LE = counts_LE + (picked[..., None] == experts).sum(dim=(1, 2)).double()
    return counts_LE


def _batches(sequences: Sequence[list[int]]) -> Iterator[tuple[Sequence[list[int]], Tensor]]:
    """Groups of sequences with their ids, padded on the right where causal attention is blind."""
    for start in range(0, len(sequences), BATCH_SEQUENCES):
        batch = sequences[start : start + BATCH_SEQUENCES]
        width = max(len(ids) for ids in batch)
        yield batch, torch.tensor([ids + [0] * (width - len(ids)) for ids in batch])
