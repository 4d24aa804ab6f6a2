"""Counts in sentences: ``1 tensor``, ``1,024 tokens``, ``1.5 GiB``, ``about 20 minutes``."""


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A count with its noun, in the plural unless it is 1; ``plural`` is one without an s.

    >>> counted(1, "entry", "entries"), counted(2000, "token")
    ('1 entry', '2,000 tokens')
    """
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {plural or noun + 's'}"


def spoken_bytes(count: float) -> str:
    """Bytes in the largest unit that they fill."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 2**power:
            return f"{count / 2**power:,.1f} {unit}"
    return f"{count:.0f} bytes"


def spoken_seconds(seconds: float) -> str:
    """A duration with one digit that means something."""
    if seconds < 90:
        return "about a minute" if seconds > 40 else "less than a minute"
    if seconds < 90 * 60:
        return f"about {round(seconds / 60, -1 if seconds > 1200 else 0):.0f} minutes"
    hours = seconds / 3600
    return f"about {hours:.0f} hours" if hours < 36 else f"about {hours / 24:.0f} days"
