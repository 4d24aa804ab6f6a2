"""Which experts tokens go to in the quantized model, held against the original beside it.

Routers keep their type, but what they read comes from quantized layers, so a token may be sent to
other experts. Counted is each router by itself, on what the quantized layers before it give it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ExpertChoices:
    """How many of the original's choices of experts a layer of the quantized model makes too.

    A choice is a token, held out from fitting, with one of the experts that it goes to; there are
    ``choices`` of them for ``tokens`` tokens, and the order of a token's experts does not count.
    """

    layer: int
    tokens: int
    choices: int
    kept: int

    def __post_init__(self) -> None:
        """Raise ValueError for counts that no router gives."""
        if self.tokens < 1 or not 0 <= self.kept <= self.choices or self.choices < 1:
            raise ValueError(
                f"{self.kept} of {self.choices} choices kept for {self.tokens} tokens in layer "
                f"{self.layer} is no count of choices"
            )

    @property
    def share(self) -> float:
        """The part that is kept, 0 to 1."""
        return self.kept / self.choices


def count_kept(index_TR: Tensor, origin_TR: Tensor, experts: int) -> tuple[int, int]:
    """``(kept, choices)`` of the experts chosen now and in the original, for the same tokens.

    An index of ``experts`` or more is a sentinel for "no expert", and no choice.
    """
    assert len(index_TR) == len(origin_TR)
    is_choice_TR = origin_TR < experts
    is_kept_TR = torch.zeros_like(is_choice_TR)
    for index_T in index_TR.unbind(1):
        is_kept_TR |= origin_TR == index_T[:, None]
    return int((is_kept_TR & is_choice_TR).sum()), int(is_choice_TR.sum())


def sum_sites(
    layer: int, tokens: int, counts: Mapping[str, tuple[int, int]]
) -> ExpertChoices | None:
    """Those of a layer from ``(kept, choices)`` of its sites; None where no choice was counted."""
    kept, choices = (sum(count[part] for count in counts.values()) for part in (0, 1))
    return ExpertChoices(layer, tokens, choices, kept) if choices > 0 else None
