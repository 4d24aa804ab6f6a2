"""How a weight is stored, as an inference engine sees it: what a kernel is chosen by.

A scheme of mxq is one of these. A checkpoint of other tools may hold more: orders of the inputs,
groups of other sizes, and storages that no rule here is about ("other", with its own spelling).
"""

from dataclasses import dataclass

from mxq.scheme import Scheme

STORAGES = ("packed", "int", "float", "dense", "other")
"""Integer codes in words, int8 with rounded inputs, fp8, the model's own type, anything else."""


@dataclass(frozen=True, slots=True)
class StoredFormat:
    """Storage, widths and grid of one weight.

    ``group_size`` None means one scale for an output row. ``order`` is the activation order that a
    checkpoint declares, None for the natural one. ``spelling`` is that of an "other" storage.
    """

    storage: str
    w_bits: int = 16
    a_bits: int = 16
    group_size: int | None = None
    symmetric: bool = True
    order: str | None = None
    spelling: str = ""

    def __post_init__(self) -> None:
        """Raise ValueError for a storage that does not exist."""
        if self.storage not in STORAGES:
            raise ValueError(f"storage {self.storage!r} is none of {', '.join(STORAGES)}")

    def __str__(self) -> str:
        """The spelling of the scheme, with the order where there is one."""
        if self.storage == "other":
            return self.spelling
        if self.storage == "dense":
            return "unquantized"
        group = "row" if self.group_size is None else self.group_size
        grid = "sym" if self.symmetric else "asym"
        kind = "fp" if self.storage == "float" else "w"
        order = "" if self.order is None else f" (actorder {self.order})"
        return f"{kind}{self.w_bits}a{self.a_bits}_g{group}_{grid}{order}"


DENSE = StoredFormat("dense")
"""A weight that stays in the model's own type."""


def format_of(scheme: Scheme) -> StoredFormat:
    """How a scheme of mxq is stored for an engine."""
    if scheme.kind == "bf16":
        return DENSE
    if scheme.kind == "fp8":
        return StoredFormat("float", 8, 8)
    storage = "packed" if scheme.a_bits == 16 else "int"
    return StoredFormat(storage, scheme.w_bits, scheme.a_bits, scheme.group_size, scheme.symmetric)
