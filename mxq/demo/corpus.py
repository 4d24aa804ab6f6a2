"""The demo corpus: five domains of synthetic text, in splits that share no document.

Each document knows its entropy, so the loss of a model can be set against the lowest loss that
any model can reach. Nothing is stored: a document is a function of its split, domain and number.
"""

import math
import random
from dataclasses import dataclass

from mxq.demo.domains import WRITERS
from mxq.demo.source import Consequence, Source

DOMAINS: tuple[str, ...] = tuple(WRITERS)
"""The names of the domains, in the order in which ``documents`` interleaves them."""

SPLITS: tuple[str, ...] = ("train", "calibration", "heldout")
"""Disjoint by seed; the questions come from a fourth seed."""

CHOICE_COUNT = 4


@dataclass(frozen=True, slots=True)
class Document:
    """One text and the -log p that the generator gives it.

    ``entropy_nats`` counts the choice of the domain (each has the same chance) and where the
    text ends, so it is comparable with the loss over all tokens of the text and its end mark.
    """

    domain: str
    text: str
    entropy_nats: float


@dataclass(frozen=True, slots=True)
class Question:
    """A text that breaks off where it determines what follows, and four ways to go on.

    ``prompt + choices[answer]`` is text of the domain; the other choices make it false. No
    choice is the beginning of another, so their summed log-likelihoods can be compared.
    """

    domain: str
    prompt: str
    choices: tuple[str, ...]
    answer: int


def documents(split: str, count: int, *, domain: str | None = None) -> tuple[Document, ...]:
    """The first ``count`` documents of a split, of one domain or of all in turn.

    Raises:
        ValueError: If the split or the domain is unknown, or ``count`` is negative.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; choose one of {', '.join(SPLITS)}")
    if domain is not None and domain not in WRITERS:
        raise ValueError(f"domain {domain!r} is unknown; choose one of {', '.join(DOMAINS)}")
    _require_count(count)
    if domain is not None:
        return tuple(_document(split, domain, number) for number in range(count))
    turns = (divmod(index, len(DOMAINS)) for index in range(count))
    return tuple(_document(split, DOMAINS[turn], number) for number, turn in turns)


def questions(count: int) -> tuple[Question, ...]:
    """The first ``count`` questions, the domains in turn.

    Raises:
        ValueError: If ``count`` is negative.
    """
    _require_count(count)
    turns = (divmod(index, len(DOMAINS)) for index in range(count))
    return tuple(_question(DOMAINS[turn], number) for number, turn in turns)


def _require_count(count: int) -> None:
    """Refuse a negative count, which ``range`` would take for none."""
    if count < 0:
        raise ValueError(f"count is {count}; ask for 0 or more")


def _written(split: str, domain: str, number: int) -> Source:
    """The source after it has written one document."""
    source = Source(f"{split}/{domain}/{number}")
    WRITERS[domain](source)
    return source


def _document(split: str, domain: str, number: int) -> Document:
    """The document with that number."""
    source = _written(split, domain, number)
    return Document(domain, source.text, source.entropy_nats + math.log(len(DOMAINS)))


def _question(domain: str, number: int) -> Question:
    """A question at a random consequence of a document that no split contains."""
    source = _written("questions", domain, number)
    rng = random.Random(f"choices/{domain}/{number}")
    asked = rng.choice(source.consequences)
    choices = [asked.answer, *_wrong_choices(asked, rng)]
    rng.shuffle(choices)
    answer = choices.index(asked.answer)
    return Question(domain, source.text[: asked.start], tuple(choices), answer)


def _wrong_choices(asked: Consequence, rng: random.Random) -> list[str]:
    """Enough false continuations for one question."""
    return rng.sample(asked.wrong, CHOICE_COUNT - 1)
