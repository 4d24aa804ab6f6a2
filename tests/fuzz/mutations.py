"""Bytes of a fuzzer -> edits of a JSON document, so that most inputs get past the parser."""

import json
from copy import deepcopy
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from mxq.scheme import Scheme

VALUES = (
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**31, 2**63, 10**12, 10**30, -(2**63), 0.5, -0.0,
    1e300, float("inf"), float("-inf"), float("nan"), "", "a", "w4a16_g128_asym", "w2a16_g32_sym",
    "w4a8_grow_sym", "fp8", "bf16", "w" * 200, "../x", "/etc/passwd", "..", "a/b", "\0", "\ud800",
    "__class__", "plan", "self", "F32", "I64", "F8_E4M3", "mxq", "inf", [], {}, [[]], [1, 2],
    {"float": "inf"}, {"float": "x"}, {"float": []}, {"a": 1}, {"": {}}, [None], [[0, 4]],
)  # fmt: skip
"""What stands where something else is expected."""


class Choices:
    """The bytes of an input, taken one after the other; zeros once they are used up."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def byte(self) -> int:
        value = self.data[self.place] if self.place < len(self.data) else 0
        self.place += 1
        return value

    def below(self, limit: int) -> int:
        return (256 * self.byte() + self.byte()) % limit

    def is_left(self) -> bool:
        return self.place < len(self.data)


def edited(document: Any, data: bytes) -> Any:
    """The document with a few edits that the bytes choose; at most 8."""
    document, choices = deepcopy(document), Choices(data)
    for _ in range(8):
        if not choices.is_left():
            break
        _edit(document, choices)
    return document


def _edit(document: Any, choices: Choices) -> None:
    node = document
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = keys[choices.below(len(keys))]
        if not isinstance(node[key], dict | list) or choices.byte() % 4 == 0:
            break
        node = node[key]
    _replace(node, key, choices)


def _replace(node: Any, key: Any, choices: Choices) -> None:
    match choices.byte() % 8:
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node[str(VALUES[choices.below(len(VALUES))])] = node.pop(key)
        case 2 if isinstance(node, list):
            node.append(deepcopy(node[key]))
        case 3:
            node[key] = [deepcopy(node[key])]
        case 4 if isinstance(node[key], int):
            node[key] += choices.byte() - 128
        case _:
            node[key] = deepcopy(VALUES[choices.below(len(VALUES))])


def example(hint: Any) -> Any:
    """The smallest JSON that an artifact of this type can have, two entries in each list."""
    if hint in _PLAIN:
        return _PLAIN[hint]
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        return {f.name: _NAMED.get(f.name, example(hints[f.name])) for f in fields(hint)}
    return _example_of_many(hint)


_PLAIN = {str: "a", int: 1, float: 1.5, bool: True, Scheme: "w4a16_g128_asym", Path: "a", Any: "a"}

_NAMED = {"scope": "auto", "rotation": "auto", "target": "local", "samples": 2, "seqlen": 2}
"""Fields that take few values."""


def _example_of_many(hint: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return example(next(option for option in arguments if option is not NoneType))
    if origin is tuple:
        each = arguments[:1] * 2 if arguments[-1] is Ellipsis else arguments
        return [example(argument) for argument in each]
    return {"triton": example(arguments[1]), "b": example(arguments[1])}


def as_text(document: Any) -> str:
    """JSON as Python writes it, NaN and lone surrogates included."""
    return json.dumps(document)
