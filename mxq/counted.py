"""Counts in sentences: ``1 tensor``, ``12 tensors``, ``1,024 tokens``."""


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A count with its noun, in the plural unless it is 1; ``plural`` is one without an s.

    >>> counted(1, "entry", "entries"), counted(2000, "token")
    ('1 entry', '2,000 tokens')
    """
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {plural or noun + 's'}"
