"""What a planner may choose so that a plan breaks no rule of an engine.

Warnings restrict nothing: they name what an engine needs beside itself, such as another kernel.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from mxq.artifacts import BlockInfo
from mxq.counted import counted
from mxq.engines.blocks import BLOCK_KINDS, SAME_KINDS, accepts, reason
from mxq.engines.formats import StoredFormat, format_of
from mxq.engines.rules import EXPORTED, EngineRules, Rule
from mxq.scheme import Scheme

Allowed = tuple[tuple[bool, ...], ...]

MENU_BITS = (2, 3, 4, 5, 6, 8)
MENU_GROUPS = (128, 64, 32)
ROW_BITS = (2, 3, 4)
"""Widths of the default menu, in groups and in whole rows."""


@dataclass(frozen=True, slots=True)
class Restriction:
    """The plans that an engine takes.

    A plan is inside if its schemes are allowed by one of ``alternatives``, each [blocks][schemes],
    and blocks with the same label of one of ``ties`` have the same scheme; None ties nothing.
    """

    tensor_parallel: int
    alternatives: tuple[Allowed, ...]
    ties: tuple[tuple[Hashable, ...], ...]


def restrict(
    rules: EngineRules, blocks: Sequence[BlockInfo], schemes: Sequence[Scheme], ranks: int = 1
) -> Restriction:
    """What of these schemes the engine takes for each block, on that many ranks.

    Raises:
        ValueError: If it takes none of them for some block.
    """
    allowed = _allowed(rules, blocks, schemes, ranks)
    for block, row in zip(blocks, allowed, strict=True):
        if not any(row):
            raise ValueError(_none_taken(rules, block, schemes, ranks))
    alternatives = [allowed]
    if rules.of_kind("one storage"):
        alternatives = _by_storage(allowed, schemes)
    if not alternatives:
        raise ValueError(
            f"{rules.title} wants all weights stored one way, and none of "
            f"{_listed(schemes)} fits all blocks; offer a scheme that does"
        )
    same = [rule for kind in SAME_KINDS for rule in rules.of_kind(kind)]
    ties = tuple(tuple(SAME_KINDS[r.kind](r, block) for block in blocks) for r in same)
    return Restriction(ranks, tuple(alternatives), ties)


def fitting_schemes(
    rules: EngineRules, blocks: Sequence[BlockInfo], ranks: int = 1
) -> tuple[Scheme, ...]:
    """The default menu for an engine: of each width what it takes for all blocks.

    Groups are the largest that serve. Grids are asymmetric where the engine takes that without a
    warning. An engine that takes no integers gets fp8 and bf16.

    Raises:
        ValueError: If it takes nothing for all blocks.
    """
    menu = _default_menu(rules, blocks, ranks)
    if menu:
        return menu
    if ranks == 1 or not _default_menu(rules, blocks, 1):
        raise ValueError(_none_taken(rules, blocks[0], (Scheme.parse("bf16"),), 1))
    raise ValueError(
        f"{rules.title} {rules.version} takes no scheme on {ranks} ranks: they do not divide "
        f"the sizes of the blocks, e.g. {blocks[0].name} with "
        f"{counted(blocks[0].out_features, 'output')} and "
        f"{counted(blocks[0].in_features, 'input')}; give another --tp"
    )


def _default_menu(
    rules: EngineRules, blocks: Sequence[BlockInfo], ranks: int
) -> tuple[Scheme, ...]:
    def first_of(bits: int, group: int | None) -> list[Scheme]:
        grids = [Scheme(bits, 16, group, symmetric) for symmetric in (False, True)]
        taken = [s for s in grids if _fits_all(rules, blocks, s, ranks)]
        return sorted(taken, key=lambda s: bool(format_warnings(rules, (s,))))[:1]

    groups = ([s for bits in MENU_BITS for s in first_of(bits, g)] for g in MENU_GROUPS)
    menu = next((found for found in groups if found), [])
    menu += [s for bits in ROW_BITS for s in first_of(bits, None)]
    if not menu:
        floats = (Scheme.parse("fp8"), Scheme.parse("bf16"))
        menu = [s for s in floats if _fits_all(rules, blocks, s, ranks)]
    return tuple(sorted(menu))


def format_warnings(rules: EngineRules, schemes: Iterable[Scheme]) -> tuple[str, ...]:
    """What to know of schemes that the engine takes with a warning, such as that of a kernel."""
    found = []
    for rule in rules.rules:
        if rule.kind == "formats" and not rule.is_error and rule.is_about(EXPORTED):
            warned = sorted({s for s in schemes if not accepts(rule, format_of(s))})
            found += [f"{_listed(warned)}: {rule.says}"] if warned else []
    return tuple(found)


def _fits_all(rules: EngineRules, blocks: Sequence[BlockInfo], scheme: Scheme, ranks: int) -> bool:
    return all(row[0] for row in _allowed(rules, blocks, (scheme,), ranks))


def _allowed(
    rules: EngineRules, blocks: Sequence[BlockInfo], schemes: Sequence[Scheme], ranks: int
) -> Allowed:
    """Whether no rule about one block forbids a scheme, and its groups divide the inputs."""
    formats = [format_of(scheme) for scheme in schemes]
    seen: dict[Hashable, tuple[bool, ...]] = {}
    for block in blocks:
        key = _shape(block)
        if key not in seen:
            seen[key] = tuple(
                scheme.fits(block.in_features) and _broken(rules, block, stored, ranks) is None
                for scheme, stored in zip(schemes, formats, strict=True)
            )
    return tuple(seen[_shape(block)] for block in blocks)


def _shape(block: BlockInfo) -> Hashable:
    """All that a rule about one block looks at."""
    return block.expert is None, block.projection, block.out_features, block.in_features


def _broken(
    rules: EngineRules, block: BlockInfo, stored: StoredFormat, ranks: int
) -> tuple[Rule, str] | None:
    """The first rule that forbids the format, and why."""
    for kind in BLOCK_KINDS:
        for rule in rules.of_kind(kind):
            why = reason(rule, block, stored, ranks)
            if why is not None:
                return rule, why
    return None


def _by_storage(allowed: Allowed, schemes: Sequence[Scheme]) -> list[Allowed]:
    """One alternative for each storage that has a scheme for every block."""
    storages = [format_of(scheme).storage for scheme in schemes]
    alternatives = []
    for storage in sorted({*storages} - {"dense"}) or ["dense"]:
        may = [found in (storage, "dense") for found in storages]
        rows = tuple(tuple(a and b for a, b in zip(row, may, strict=True)) for row in allowed)
        if all(any(row) for row in rows):
            alternatives.append(rows)
    return alternatives


def _none_taken(rules: EngineRules, block: BlockInfo, schemes: Sequence[Scheme], ranks: int) -> str:
    broken = next(
        (found for s in schemes if (found := _broken(rules, block, format_of(s), ranks))), None
    )
    start = f"{rules.title} {rules.version} takes none of {_listed(schemes)} for {block.name}"
    if broken is None:
        return f"{start}, whose {block.in_features} inputs no group divides; offer smaller groups"
    rule, why = broken
    # A rule about formats says which ones to offer; what it advises is asked for already.
    what = f"Remedy: {rule.remedy}" if rule.kind != "formats" else "Measure others."
    return f"{start} ({why}): {rule.says} {what}"


def _listed(schemes: Sequence[Scheme]) -> str:
    return ", ".join(str(scheme) for scheme in schemes)
