"""Which rules of an engine a deployment breaks. Nothing is loaded or run."""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping

from mxq.artifacts import BlockInfo
from mxq.counted import counted
from mxq.engines.blocks import BLOCK_KINDS, SAME_KINDS, reason
from mxq.engines.deployment import Deployment, Finding, is_of
from mxq.engines.exported import EXPORT_KINDS
from mxq.engines.formats import StoredFormat
from mxq.engines.rules import EngineRules, Rule

FEW = 3
"""Formats of a group that a message lists."""


def check(deployment: Deployment, rules: EngineRules) -> tuple[Finding, ...]:
    """The broken rules, errors first."""
    about = [rule for rule in rules.rules if rule.is_about(deployment.read_as)]
    found = [_finding(rule, deployment) for rule in about if _is_checked(rule, deployment)]
    broken = [finding for finding in found if finding is not None]
    return tuple(sorted(broken, key=lambda finding: not finding.rule.is_error))


def unchecked(deployment: Deployment, rules: EngineRules) -> tuple[Rule, ...]:
    """The rules about an exported configuration, where there is none."""
    about = [rule for rule in rules.rules if rule.is_about(deployment.read_as)]
    return tuple(rule for rule in about if not _is_checked(rule, deployment))


def _is_checked(rule: Rule, deployment: Deployment) -> bool:
    return rule.kind not in EXPORT_KINDS or deployment.exported is not None


def _finding(rule: Rule, deployment: Deployment) -> Finding | None:
    if rule.kind in BLOCK_KINDS:
        return _of_blocks(rule, deployment)
    if rule.kind in SAME_KINDS:
        return _unequal(rule, deployment)
    if rule.kind in EXPORT_KINDS:
        assert deployment.exported is not None
        return EXPORT_KINDS[rule.kind](rule, deployment, deployment.exported)
    return PLAN_KINDS[rule.kind](rule, deployment)


def _of_blocks(rule: Rule, deployment: Deployment) -> Finding | None:
    """Experts of a layer are alike, so each shape and format is looked at once."""
    seen: dict[Hashable, str | None] = {}
    names, first = [], ""
    for block, stored in deployment.pairs(rule.part):
        key = (block.expert is None, block.projection, block.out_features, block.in_features)
        if (key, stored) not in seen:
            seen[key, stored] = reason(rule, block, stored, deployment.tensor_parallel)
        why = seen[key, stored]
        if why is not None:
            names.append(block.name)
            first = first or why
    return Finding(rule, tuple(names), first) if names else None


def _unequal(rule: Rule, deployment: Deployment) -> Finding | None:
    groups: dict[Hashable, list[tuple[BlockInfo, StoredFormat]]] = {}
    for block, stored in deployment.pairs():
        label = SAME_KINDS[rule.kind](rule, block)
        if label is not None:
            groups.setdefault(label, []).append((block, stored))
    mixed = [group for group in groups.values() if len({stored for _, stored in group}) > 1]
    names = tuple(block.name for group in mixed for block, _ in group)
    return Finding(rule, names, _mixture(mixed[0])) if mixed else None


def _mixture(group: list[tuple[BlockInfo, StoredFormat]]) -> str:
    """The formats of a group of blocks, the most frequent first."""
    counts = Counter(str(stored) for _, stored in group).most_common()
    listed = ", ".join(f"{count} x {stored}" for stored, count in counts[:FEW])
    more = f" and {counted(len(counts) - FEW, 'more format')}" if len(counts) > FEW else ""
    return f"{group[0][0].name} and those with it: {listed}{more}"


def _is_rotated(rule: Rule, deployment: Deployment) -> Finding | None:
    names = tuple(block.name for block in deployment.blocks if block.name in deployment.rotated)
    return Finding(rule, names, f"{names[0]} has rotated inputs") if names else None


def _formats_differ(rule: Rule, deployment: Deployment) -> Finding | None:
    part = [pair for pair in deployment.quantized if is_of(pair[0], rule.part)]
    if len({stored for _, stored in part}) < 2:
        return None
    return Finding(rule, tuple(block.name for block, _ in part), _mixture(part))


def _storages_differ(rule: Rule, deployment: Deployment) -> Finding | None:
    """Names all blocks but those of the most frequent storage."""
    counts = Counter(stored.storage for _, stored in deployment.quantized)
    if len(counts) < 2:
        return None
    most = counts.most_common(1)[0][0]
    names = tuple(block.name for block, s in deployment.quantized if s.storage != most)
    listed = ", ".join(
        f"{counted(count, 'block')} {storage}" for storage, count in counts.most_common()
    )
    return Finding(rule, names, listed)


def _is_refused(rule: Rule, deployment: Deployment) -> Finding | None:
    if deployment.method not in rule.refused:
        return None
    return Finding(rule, (), f"quant_method is {deployment.method!r}")


PLAN_KINDS: Mapping[str, Callable[[Rule, Deployment], Finding | None]] = {
    "not rotated": _is_rotated,
    "one storage": _storages_differ,
    "same where quantized": _formats_differ,
    "method": _is_refused,
}
"""``(rule, deployment) -> finding``."""
