"""Rules about one block, and rules about which blocks are alike.

Both serve two readers: the check of a plan that exists, and the planner, which forbids schemes by
the first and ties blocks by the second.
"""

from collections.abc import Callable, Hashable, Mapping

from mxq.artifacts import BlockInfo
from mxq.counted import counted
from mxq.engines.deployment import is_of
from mxq.engines.formats import StoredFormat
from mxq.engines.rules import Accepted, Rule
from mxq.scheme import WORD_BITS


def takes(rule: Rule, block: BlockInfo, stored: StoredFormat, ranks: int) -> str | None:
    """Why the format is not taken; storages that no rule is about are another rule's."""
    return None if accepts(rule, stored) else f"{block.name} is {stored}"


def accepts(rule: Rule, stored: StoredFormat) -> bool:
    """Whether a rule about formats lists one, or is not about its storage."""
    return stored.storage == "other" or any(_matches(a, stored) for a in rule.accepts)


def divides(rule: Rule, block: BlockInfo, stored: StoredFormat, ranks: int) -> str | None:
    """Why inputs or outputs cannot be split over the ranks, None if they can."""
    why = None
    if ranks > 1 and block.projection in rule.column:
        why = _uneven(block, "outputs", block.out_features, ranks)
        why = why or _cut_words(block, stored, ranks)
    if ranks > 1 and block.projection in rule.row:
        why = _uneven(block, "inputs", block.in_features, ranks)
        why = why or _cut_groups(block, stored, ranks)
    return why


def is_multiple(rule: Rule, block: BlockInfo, stored: StoredFormat, ranks: int) -> str | None:
    """Why a kernel does not take the sizes on one rank, None if it does."""
    if stored.storage != "packed":
        return None
    inputs, outputs = block.in_features, block.out_features
    multiples: tuple[int, ...] = (1, 1)
    if block.projection in rule.row:
        inputs, multiples = inputs // ranks, rule.row_multiples
    elif block.projection in rule.column:
        outputs, multiples = outputs // ranks, rule.column_multiples
    if inputs % multiples[0] == 0 and outputs % multiples[1] == 0:
        return None
    return f"{block.name} is {outputs} x {inputs} on a rank, not of {multiples[1]} x {multiples[0]}"


def has_order(rule: Rule, block: BlockInfo, stored: StoredFormat, ranks: int) -> str | None:
    """Why the activation order is refused, None if it is not."""
    return f"{block.name} is {stored}" if stored.order in rule.refused else None


def is_known(rule: Rule, block: BlockInfo, stored: StoredFormat, ranks: int) -> str | None:
    """Why nothing is said of the format."""
    return f"{block.name} is {stored}" if stored.storage == "other" else None


BlockKind = Callable[[Rule, BlockInfo, StoredFormat, int], str | None]

BLOCK_KINDS: Mapping[str, BlockKind] = {
    "formats": takes,
    "divisible": divides,
    "multiples": is_multiple,
    "orders": has_order,
    "known": is_known,
}
"""``(rule, block, format, ranks) -> why it is broken``."""


def reason(rule: Rule, block: BlockInfo, stored: StoredFormat, ranks: int) -> str | None:
    """Why a block in a format breaks a rule of ``BLOCK_KINDS``, None if it does not."""
    if not is_of(block, rule.part):
        return None
    return BLOCK_KINDS[rule.kind](rule, block, stored, ranks)


def _of_projection(rule: Rule, block: BlockInfo) -> Hashable:
    return None if block.expert is None else (block.site, block.projection)


def _of_expert(rule: Rule, block: BlockInfo) -> Hashable:
    return None if block.expert is None else (block.site, block.expert)


def _of_fused(rule: Rule, block: BlockInfo) -> Hashable:
    return None if block.expert is not None else fused_linear(rule, block)


def fused_linear(rule: Rule, block: BlockInfo) -> str | None:
    """Path of the linear that a plain linear becomes a part of, None if it stays alone."""
    parent = block.name.rpartition(".")[0]
    names = (fused.name for fused in rule.fused if block.projection in fused.projections)
    name = next(names, None)
    return None if name is None else f"{parent}.{name}"


def _of_part(rule: Rule, block: BlockInfo) -> Hashable:
    return rule.part if is_of(block, rule.part) else None


SAME_KINDS: Mapping[str, Callable[[Rule, BlockInfo], Hashable]] = {
    "same across experts": _of_projection,
    "same across projections": _of_expert,
    "same in a fused linear": _of_fused,
    "same in the model": _of_part,
}
"""``(rule, block) -> label``: blocks of one label have one format; None is tied to no other."""


def _matches(accepted: Accepted, stored: StoredFormat) -> bool:
    if accepted.storage != stored.storage:
        return False
    return stored.storage == "dense" or (
        stored.w_bits in accepted.bits
        and stored.a_bits in accepted.a_bits
        and (stored.group_size or 0) in accepted.groups
        and stored.symmetric in accepted.symmetric
    )


def _uneven(block: BlockInfo, what: str, count: int, ranks: int) -> str | None:
    return f"{block.name}: {count} {what} over {ranks} ranks" if count % ranks else None


def _cut_groups(block: BlockInfo, stored: StoredFormat, ranks: int) -> str | None:
    share, group = block.in_features // ranks, stored.group_size
    if group is None or share % group == 0:
        return None
    return f"{block.name}: {counted(share, 'input')} on each of {ranks} ranks, in groups of {group}"


def _cut_words(block: BlockInfo, stored: StoredFormat, ranks: int) -> str | None:
    """Zero points lie in words along the outputs, and a rank gets whole words of them."""
    share = block.out_features // ranks
    if stored.storage != "packed" or stored.symmetric or share * stored.w_bits % WORD_BITS == 0:
        return None
    return (
        f"{block.name}: zero points of {counted(share, 'output')} on a rank do not fill whole words"
    )
