"""Which blocks share a scheme: the group of each block, for ``mxq.search.problem.tie``."""

from collections.abc import Callable, Hashable, Mapping, Sequence

from mxq.artifacts import BlockInfo

GATE_UP = frozenset({"gate", "up", "gate_proj", "up_proj"})


def _of_expert(block: BlockInfo) -> str:
    return block.name if block.expert is None else f"{block.site} expert {block.expert}"


GRANULARITIES: Mapping[str, Callable[[BlockInfo], str]] = {
    "block": lambda block: block.name,
    "expert": _of_expert,
    "projection": lambda block: f"{block.site} {block.projection}",
    "layer": lambda block: block.site,
}
"""``block``: each linear alone. ``expert``: the projections of an expert together. ``projection``:
the same projection of all experts of a site together. ``layer``: a whole site together."""


def group_labels(
    blocks: Sequence[BlockInfo], granularity: str, *, tie_gate_up: bool
) -> tuple[str, ...]:
    """A label for each block; blocks of the same label share a scheme.

    With ``tie_gate_up`` the groups of a gate and an up projection with the same parent are one.

    Raises:
        ValueError: If there is no such granularity.
    """
    if granularity not in GRANULARITIES:
        menu = ", ".join(GRANULARITIES)
        raise ValueError(f"no granularity {granularity!r}; choose one of {menu}")
    labels = tuple(GRANULARITIES[granularity](block) for block in blocks)
    return joined_labels(labels, _pairs(blocks)) if tie_gate_up else labels


def joined_labels(labels: Sequence[str], ties: Sequence[Hashable]) -> tuple[str, ...]:
    """The labels after joining the groups whose blocks have the same tie; None ties nothing."""
    joined = {label: label for label in labels}

    def root(label: str) -> str:
        while joined[label] != label:
            label = joined[label]
        return label

    partner: dict[Hashable, str] = {}
    for tie, label in zip(ties, labels, strict=True):
        if tie is not None:
            joined[root(label)] = root(partner.setdefault(tie, label))
    return tuple(root(label) for label in labels)


def _pairs(blocks: Sequence[BlockInfo]) -> list[str | None]:
    """The parent of each gate and up projection."""
    return [b.name.rpartition(".")[0] if b.projection in GATE_UP else None for b in blocks]
