"""A ``quantization_config`` of compressed-tensors: groups, and the modules that they target."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mxq.engines.deployment import ConfigGroup
from mxq.engines.formats import StoredFormat
from mxq.engines.targets import Targets, targets_of

_STORAGES = {
    "pack-quantized": "packed",
    "int-quantized": "int",
    "float-quantized": "float",
    "naive-quantized": "float",
}
"""Storage of each format that mxq knows rules about."""


@dataclass(frozen=True, slots=True)
class CompressedConfig:
    """Groups with their targets in one list, and what is ignored.

    ``owners`` is the place of the group of each target.
    """

    groups: tuple[ConfigGroup, ...]
    targets: Targets
    owners: tuple[int, ...]
    ignore: Targets

    def is_ignored(self, module: str) -> bool:
        """Whether a module is in ``ignore``."""
        return self.ignore.find(module, is_linear=False) is not None

    def group_of(self, module: str) -> ConfigGroup | None:
        """The group whose target a module meets first; ignored or not."""
        place = self.targets.find(module)
        return None if place is None else self.groups[self.owners[place]]


def read_compressed(fields: Mapping[str, object]) -> CompressedConfig:
    """The groups of a ``quantization_config``.

    Raises:
        ValueError: If it has none, or a field is of another type.
    """
    stated = an_object(fields.get("config_groups"), "config_groups")
    if not stated:
        raise ValueError("its config_groups are empty")
    whole = fields.get("format")
    groups = tuple(_group(str(name), group, whole) for name, group in stated.items())
    entries = [(t, place) for place, group in enumerate(groups) for t in group.targets]
    return CompressedConfig(
        groups,
        targets_of([target for target, _ in entries]),
        tuple(place for _, place in entries),
        targets_of(_texts(fields.get("ignore") or [], "ignore")),
    )


def an_object(value: object, name: str) -> dict[str, object]:
    """The value, if it is an object of JSON.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, dict):
        return value
    raise ValueError(f"its {name} is {str(value)[:40]!r}, expected an object")


def _group(name: str, stated: object, whole: object) -> ConfigGroup:
    fields = an_object(stated, f"config group {name!r}")
    targets = tuple(_texts(fields.get("targets"), f"targets of {name!r}"))
    storage = _STORAGES.get(str(fields.get("format") or whole), "other")
    weights = an_object(fields.get("weights"), f"weights of {name!r}")
    stored = _stored(weights, fields.get("input_activations"), storage)
    return ConfigGroup(name, targets, stored)


def _stored(weights: Mapping[str, object], inputs: object, storage: str) -> StoredFormat:
    """The format of a group; one that no rule can be about is spelled out."""
    strategy, group_size = weights.get("strategy"), count_of(weights.get("group_size"))
    w_bits, a_bits = count_of(weights.get("num_bits")), _input_bits(inputs)
    is_known = weights.get("type", "int") == ("float" if storage == "float" else "int")
    has_scales = strategy == "channel" or (strategy == "group" and group_size is not None)
    if storage == "other" or not is_known or not has_scales or w_bits is None or a_bits is None:
        spelling = f"{weights.get('type')}{w_bits} by {strategy} {group_size}"
        return StoredFormat("other", spelling=spelling)
    return StoredFormat(
        storage,
        w_bits,
        a_bits,
        group_size if strategy == "group" else None,
        weights.get("symmetric") is not False,
        _order(weights.get("actorder")),
    )


def count_of(value: object) -> int | None:
    """The value if it is an integer above 0, of 32 bits."""
    return value if type(value) is int and 0 < value < 2**31 else None


def _input_bits(inputs: object) -> int | None:
    """Bits that inputs are rounded to, token by token as they come; None for another way."""
    if inputs is None:
        return 16
    if not isinstance(inputs, dict) or inputs.get("strategy") != "token":
        return None
    return count_of(inputs.get("num_bits")) if inputs.get("dynamic") is True else None


def _order(stated: object) -> str | None:
    """The declared activation order; True is the old spelling of "group"."""
    if stated is None or stated is False:
        return None
    return "group" if stated is True else str(stated)


def _texts(value: object, name: str) -> Sequence[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"its {name} are no list of texts")
    return value
