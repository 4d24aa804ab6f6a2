"""Rules about the configuration of an exported folder: what it targets, ignores and leaves out."""

from collections.abc import Callable, Mapping

from mxq.artifacts import BlockInfo
from mxq.counted import counted
from mxq.engines.blocks import fused_linear
from mxq.engines.deployment import ConfigGroup, Deployment, Exported, Finding
from mxq.engines.formats import DENSE
from mxq.engines.rules import Rule

REGEX = "re:"
"""Start of a target that is a regular expression."""


def _claimed(rule: Rule, deployment: Deployment, exported: Exported) -> Finding | None:
    names = exported.claimed
    said = "is plain, and the configuration does not leave it out"
    return Finding(rule, names, f"{names[0]} {said}") if names else None


def _ungrouped(rule: Rule, deployment: Deployment, exported: Exported) -> Finding | None:
    names = exported.ungrouped
    said = "is packed, and the configuration leaves it out"
    return Finding(rule, names, f"{names[0]} {said}") if names else None


def _unmatched(rule: Rule, deployment: Deployment, exported: Exported) -> Finding | None:
    names = exported.unmatched
    return Finding(rule, names, f"{names[0]!r} matches no module") if names else None


def _several_groups(rule: Rule, deployment: Deployment, exported: Exported) -> Finding | None:
    names = tuple(group.name for group in exported.groups)
    if len(names) <= 1:
        return None
    return Finding(rule, names, f"it has {len(names)} groups")


def _misread_experts(rule: Rule, deployment: Deployment, exported: Exported) -> Finding | None:
    """Experts whose format is not that of the one group that is taken for all of them."""
    experts = [(block, stored) for block, stored in deployment.pairs("experts") if stored != DENSE]
    if not experts or not exported.groups:
        return None
    taken = _group_of_experts(exported.groups)
    names = tuple(block.name for block, stored in experts if stored != taken.format)
    return Finding(rule, names, f"{taken.name} ({taken.format}) is taken") if names else None


def _group_of_experts(groups: tuple[ConfigGroup, ...]) -> ConfigGroup:
    """The first group that names experts in a pattern, else the first with another target."""
    for group in groups:
        if any(t.startswith(REGEX) and "experts" in t for t in group.targets):
            return group
    for group in groups:
        if any(not t.startswith(REGEX) for t in group.targets):
            return group
    return groups[0]


def _fused_differ(rule: Rule, deployment: Deployment, exported: Exported) -> Finding | None:
    """Linears that the configuration gives another format under the name of the fused one."""
    names, first = [], ""
    for block, stored in deployment.pairs():
        name = fused_name(rule, block)
        asked = stored if name is None else exported.fused.get(name, stored)
        if asked != stored:
            names.append(block.name)
            first = first or f"{block.name} is {stored}, but {name} would be {asked}"
    return Finding(rule, tuple(names), first) if names else None


def fused_name(rule: Rule, block: BlockInfo) -> str | None:
    """What the engine calls the linear that a block becomes a part of, None if it stays alone."""
    return block.site if block.expert is not None else fused_linear(rule, block)


def _overridden(rule: Rule, deployment: Deployment, exported: Exported) -> Finding | None:
    names = exported.overrides
    return Finding(rule, names, f"it has {counted(len(names), 'pattern')}") if names else None


def _renamed(rule: Rule, deployment: Deployment, exported: Exported) -> Finding | None:
    names = exported.renamed
    said = "is one tensor for each projection in the original"
    return Finding(rule, names, f"{names[0]} {said}") if names else None


EXPORT_KINDS: Mapping[str, Callable[[Rule, Deployment, Exported], Finding | None]] = {
    "ignored": _claimed,
    "grouped": _ungrouped,
    "targets match": _unmatched,
    "one group": _several_groups,
    "group of experts": _misread_experts,
    "fused names": _fused_differ,
    "no overrides": _overridden,
    "expert names": _renamed,
}
"""``(rule, deployment, exported configuration) -> finding``."""
