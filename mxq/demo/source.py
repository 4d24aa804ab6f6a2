"""A text source that knows its own entropy: what the domains of the demo corpus are written with.

A domain writes a document by three verbs. ``pick`` makes a random choice and adds its -log p,
``say`` appends text that follows from the choices made, and ``state`` appends text that a reader
could have worked out, together with wrong alternatives. The domains keep one rule: the text
determines the choices, so that the sum of the -log p is that of the text.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

Option = TypeVar("Option")


@dataclass(frozen=True, slots=True)
class Consequence:
    """A place in a text where the continuation is determined by what is above it.

    ``start`` is the index of its first character, ``wrong`` are false continuations. Answer and
    wrong ones end with the same delimiter, so that none of them is the beginning of another.
    """

    start: int
    answer: str
    wrong: tuple[str, ...]


class Source:
    """The document that is being written: its text, its entropy and its consequences so far."""

    def __init__(self, seed: str) -> None:
        self._rng = random.Random(seed)
        self._parts: list[str] = []
        self._consequences: list[Consequence] = []
        self._length_chars = 0
        self._entropy_nats = 0.0

    @property
    def text(self) -> str:
        """All that has been written."""
        return "".join(self._parts)

    @property
    def entropy_nats(self) -> float:
        """The -log p of all choices so far."""
        return self._entropy_nats

    @property
    def consequences(self) -> tuple[Consequence, ...]:
        """The places whose text was determined, in the order of the text."""
        return tuple(self._consequences)

    def pick(self, options: Sequence[Option]) -> Option:
        """One of ``options``, which must differ from each other, each with the same chance."""
        self._entropy_nats += math.log(len(options))
        return options[self._rng.randrange(len(options))]

    def say(self, text: str) -> None:
        """Append ``text``."""
        self._parts.append(text)
        self._length_chars += len(text)

    def state(self, answer: str, wrong: Sequence[str], *, lead: str = " ", end: str = "\n") -> None:
        """Append ``answer`` between ``lead`` and ``end``; ``wrong`` would have been false there.

        The space belongs to what is stated, because tokenizers join it to the word behind it.
        """
        false = tuple(f"{lead}{text}{end}" for text in dict.fromkeys(wrong) if text != answer)
        stated = f"{lead}{answer}{end}"
        self._consequences.append(Consequence(self._length_chars, stated, false))
        self.say(stated)
