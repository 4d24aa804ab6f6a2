"""Plain values of JSON -> frozen dataclasses, each value held against its type hint.

A file may come from anyone, so a value of another type is refused and never converted: a count
written as 3.7 is not 3, and a text is no list of letters.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from mxq.counted import counted
from mxq.scheme import Scheme

Decoded = TypeVar("Decoded")

LONGEST_SHOWN = 60
"""Characters of a wrong value that a message quotes."""


def decode(hint: type[Decoded], value: object) -> Decoded:
    """The value of that type which ``value``, as JSON holds it, stands for.

    Raises:
        ValueError: If there is none, with the place and what was expected there.
    """
    return cast(Decoded, _decode(hint, value, hint.__name__))


def _decode(hint: Any, value: Any, place: str) -> Any:
    if hint is Any:
        _check_finite(value, place)
        return value
    if hint in _PLAIN:
        return _PLAIN[hint](value, place)
    if is_dataclass(hint):
        return _decode_dataclass(hint, value, place)
    return _decode_generic(hint, value, place)


def _check_finite(value: object, place: str) -> None:
    """Raise ValueError for a number that JSON has no form for, anywhere in a value."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _check_finite(item, place)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place} holds {value}, expected a finite number")


def _decode_dataclass(hint: Any, value: Any, place: str) -> Any:
    content = _expect(dict, value, place, "an object")
    hints = get_type_hints(hint)
    absent = [f.name for f in fields(hint) if f.name not in content and _is_required(f)]
    if absent:
        raise ValueError(f"{place} has no {absent[0]}")
    held = [f.name for f in fields(hint) if f.name in content]
    return hint(**{name: _decode(hints[name], content[name], name) for name in held})


def _is_required(field: Field[Any]) -> bool:
    """Whether a file has to hold it; a field with a default may be younger than the file."""
    return field.default is MISSING and field.default_factory is MISSING


def _decode_generic(hint: Any, value: Any, place: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        options = [option for option in arguments if option is not NoneType]
        return None if value is None else _decode(options[0], value, place)
    if origin is tuple:
        return _decode_tuple(arguments, _expect(list, value, place, "a list"), place)
    assert issubclass(origin, Mapping), f"{hint} is no type of an artifact"
    content = _expect(dict, value, place, "an object")
    return {key: _decode(arguments[1], item, place) for key, item in content.items()}


def _decode_tuple(arguments: tuple[Any, ...], value: list[Any], place: str) -> tuple[Any, ...]:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        raise ValueError(
            f"{place} has {counted(len(value), 'entry', 'entries')}, expected {len(arguments)}"
        )
    return tuple(_decode(hint, item, place) for hint, item in zip(arguments, value, strict=True))


def _expect(kind: type, value: object, place: str, what: str) -> Any:
    # Not isinstance: True would pass for an integer.
    if type(value) is not kind:
        shown = repr(value)
        shown = shown if len(shown) <= LONGEST_SHOWN else shown[:LONGEST_SHOWN] + "..."
        raise ValueError(f"{place} is {shown}, expected {what}")
    return value


def _text(value: object, place: str) -> str:
    return cast(str, _expect(str, value, place, "a text"))


def _number(value: object, place: str) -> float:
    """A float; those that JSON has no form for are {"float": "inf"}."""
    if type(value) is dict and value.keys() == {"float"}:
        spelled = _text(value["float"], place)
        if spelled in ("inf", "-inf", "nan"):
            return float(spelled)
    if type(value) is int and abs(value) < 2**63:
        return float(value)
    return cast(float, _expect(float, value, place, "a number"))


_PLAIN: Mapping[Any, Callable[[Any, str], Any]] = {
    Scheme: lambda value, place: Scheme.parse(_text(value, place)),
    Path: lambda value, place: Path(_text(value, place)),
    str: _text,
    int: lambda value, place: _expect(int, value, place, "an integer"),
    bool: lambda value, place: _expect(bool, value, place, "true or false"),
    float: _number,
}
