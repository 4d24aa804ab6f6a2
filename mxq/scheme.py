"""A scheme is the number format of one weight: its fields, its one spelling, its exact storage.

The spelling is ``w<bits>a<bits>_g<size|row>_<sym|asym>`` for integer schemes, and ``fp8`` or
``bf16`` for the two formats that leave nothing to choose. ``grow`` means one group, so one scale,
for a whole output row.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import Literal

SCALE_BITS = 16
"""A scale is stored as float16, so that a cast of the model to another type cannot change it."""

WORD_BITS = 32
"""Codes and zero points are packed into words of that many bits."""

WEIGHT_BITS = (2, 3, 4, 5, 6, 8)
ACTIVATION_BITS = (4, 8, 16)
GROUP_SIZES = (32, 64, 128)

_SPELLING = re.compile(r"w([1-9]\d*)a([1-9]\d*)_g([1-9]\d*|row)_(sym|asym)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one weight, and the input that it multiplies, are represented.

    ``group_size`` None means one group for each output row. ``a_bits`` 16 leaves the input in its
    own type; a smaller value quantizes each token on the fly (symmetric, one scale per token).
    ``fp8`` is e4m3 for weight (one scale per row) and input (one scale per token).
    """

    w_bits: int
    a_bits: int = 16
    group_size: int | None = 128
    symmetric: bool = False
    kind: Literal["int", "fp8", "bf16"] = "int"

    def __post_init__(self) -> None:
        """Refuse what no quantizer here produces.

        Raises:
            ValueError: With the field, its value and the values allowed.
        """
        if self.kind == "int":
            _check_field("weight bits", self.w_bits, WEIGHT_BITS)
            _check_field("activation bits", self.a_bits, ACTIVATION_BITS)
            _check_field("group size", self.group_size, (*GROUP_SIZES, None))
            if self.a_bits < 16 and self.w_bits > self.a_bits:
                raise ValueError(f"weights of {self.w_bits} bits need activations of at least that")
        elif (self.w_bits, self.a_bits, self.group_size, self.symmetric) != _FLOATS[self.kind]:
            raise ValueError(f"{self.kind} has no options; write Scheme.parse({self.kind!r})")

    @classmethod
    def parse(cls, text: str) -> "Scheme":
        """Inverse of ``str(scheme)``.

        Raises:
            ValueError: If the text is not a scheme; the message shows the form.
        """
        if text == "fp8":
            return cls(*_FLOATS[text], kind="fp8")
        if text == "bf16":
            return cls(*_FLOATS[text], kind="bf16")
        match = _SPELLING.fullmatch(text)
        if match is None:
            raise ValueError(
                f"scheme {text!r} is not of the form w<bits>a<bits>_g<size|row>_<sym|asym> "
                "(e.g. 'w4a16_g128_asym', 'w8a8_grow_sym'), 'fp8' or 'bf16'"
            )
        w_bits, a_bits, group, grid = match.groups()
        group_size = None if group == "row" else int(group)
        return cls(int(w_bits), int(a_bits), group_size, grid == "sym")

    def __lt__(self, other: "Scheme") -> bool:
        """By weight bits, then input bits, then the number of scales, ``row`` first."""
        return self._order() < other._order()

    def __str__(self) -> str:
        if self.kind != "int":
            return self.kind
        group = "row" if self.group_size is None else self.group_size
        return f"w{self.w_bits}a{self.a_bits}_g{group}_{'sym' if self.symmetric else 'asym'}"

    def storage_bits(self, out_features: int, in_features: int) -> int:
        """Bits on disk for an [out_features, in_features] weight: codes, scales and zero points.

        Word padding (only where a dimension is not a multiple of 32) is not counted.
        """
        if self.kind == "bf16":
            return 16 * out_features * in_features
        groups = self.groups(in_features)
        zero_bits = 0 if self.symmetric else self.w_bits
        return out_features * (in_features * self.w_bits + groups * (SCALE_BITS + zero_bits))

    def _order(self) -> tuple[int, int, float, bool, str]:
        scales = 0.0 if self.group_size is None else 1 / self.group_size
        return self.w_bits, self.a_bits, scales, not self.symmetric, self.kind

    def groups(self, in_features: int) -> int:
        """Number of groups along an input of that width."""
        return 1 if self.group_size is None else ceil(in_features / self.group_size)

    def fits(self, in_features: int) -> bool:
        """Whether the groups divide an input of that width."""
        return self.group_size is None or in_features % self.group_size == 0


_FLOATS: dict[str, tuple[int, int, None, bool]] = {
    "fp8": (8, 8, None, True),
    "bf16": (16, 16, None, True),
}


def parse_schemes(texts: str | Iterable[str]) -> tuple[Scheme, ...]:
    """Schemes of a comma-separated string or of several spellings, each once, sorted.

    Raises:
        ValueError: If a spelling is wrong or none is given.
    """
    parts = texts.split(",") if isinstance(texts, str) else texts
    schemes = {Scheme.parse(part.strip()) for part in parts if part.strip()}
    if not schemes:
        raise ValueError("no scheme given; name at least one, e.g. 'w4a16_g128_asym'")
    return tuple(sorted(schemes))


def _check_field(name: str, value: int | None, allowed: tuple[int | None, ...]) -> None:
    if value not in allowed:
        menu = ", ".join("row" if item is None else str(item) for item in allowed)
        raise ValueError(f"{name} of {value} is not supported; choose one of {menu}")
