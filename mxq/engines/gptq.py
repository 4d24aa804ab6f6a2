"""A ``quantization_config`` of the GPTQ format: one format, and overrides by pattern."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import regex

from mxq.engines.compressed import an_object, count_of
from mxq.engines.formats import DENSE, StoredFormat
from mxq.engines.targets import compiled, match

SKIPPED = "-:"
TAKEN = "+:"


@dataclass(frozen=True, slots=True)
class GptqConfig:
    """The format of all modules, and (pattern, format) in the order of ``dynamic``."""

    base: StoredFormat
    overrides: tuple[tuple["regex.Pattern[str]", StoredFormat], ...]

    @property
    def patterns(self) -> tuple[str, ...]:
        """What the overrides are about, in their order."""
        return tuple(pattern.pattern for pattern, _ in self.overrides)

    def format_of(self, module: str) -> StoredFormat:
        """The format under a module's name: the first override that matches, else the base."""
        found = (stored for pattern, stored in self.overrides if match(pattern, module))
        return next(found, self.base)


def read_gptq(fields: Mapping[str, object]) -> GptqConfig:
    """The formats of a ``quantization_config``.

    Raises:
        ValueError: If a field is of another type.
    """
    if "bits" not in fields or "group_size" not in fields:
        raise ValueError("its quantization_config lacks bits or group_size")
    base = _stored(fields, StoredFormat("packed"))
    stated = an_object(fields.get("dynamic") or {}, "dynamic")
    return GptqConfig(base, tuple(_override(str(k), v, base) for k, v in stated.items()))


def _override(
    pattern: str, fields: object, base: StoredFormat
) -> tuple["regex.Pattern[str]", StoredFormat]:
    if pattern.startswith(SKIPPED):
        return compiled(pattern.removeprefix(SKIPPED)), DENSE
    stated = an_object(fields, f"override {pattern!r}")
    return compiled(pattern.removeprefix(TAKEN)), _stored(stated, base)


def _stored(fields: Mapping[str, object], base: StoredFormat) -> StoredFormat:
    """The base with what the fields say instead."""
    bits, group = fields.get("bits", base.w_bits), fields.get("group_size", base.group_size or -1)
    is_ordered = fields.get("desc_act", base.order is not None)
    for name in ("sym", "desc_act"):
        if fields.get(name, False) not in (True, False):
            raise ValueError(f"its {name} is {fields[name]!r}, expected true or false")
    w_bits, group_size = count_of(bits), count_of(group)
    if w_bits is None or (group_size is None and group != -1):
        raise ValueError(f"its bits are {bits!r} and its group_size {group!r}, expected numbers")
    return replace(
        base,
        w_bits=w_bits,
        group_size=group_size,
        symmetric=fields.get("sym", base.symmetric) is not False,
        order="group" if is_ordered is True and group_size is not None else None,
    )
