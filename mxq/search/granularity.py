"""Which blocks share a scheme: the group of each block, for ``mxq.search.problem.tie``."""

from collections.abc import Callable, Mapping, Sequence

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
    labels = [GRANULARITIES[granularity](block) for block in blocks]
    return _merged(blocks, labels) if tie_gate_up else tuple(labels)


def _merged(blocks: Sequence[BlockInfo], labels: Sequence[str]) -> tuple[str, ...]:
    """The labels after joining the groups that a gate and an up projection connect."""
    joined = {label: label for label in labels}

    def root(label: str) -> str:
        while joined[label] != label:
            label = joined[label]
        return label

    partner: dict[str, str] = {}
    for block, label in zip(blocks, labels, strict=True):
        if block.projection in GATE_UP:
            parent = block.name.rpartition(".")[0]
            joined[root(label)] = root(partner.setdefault(parent, label))
    return tuple(root(label) for label in labels)
