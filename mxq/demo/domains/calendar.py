"""Dates, times of day and units: ``Tue 5 Apr plus 2 days is Thu 7 Apr``, ``3 h is 180 min``.

Weekdays wrap after seven, days wrap at the end of a month, minutes carry into hours.
"""

from mxq.demo.source import Source

WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
MONTH_DAYS = (
    ("Jan", 31),
    ("Feb", 28),
    ("Mar", 31),
    ("Apr", 30),
    ("May", 31),
    ("Jun", 30),
    ("Jul", 31),
    ("Aug", 31),
    ("Sep", 30),
    ("Oct", 31),
    ("Nov", 30),
    ("Dec", 31),
)
"""The months of a year that is no leap year, with their lengths in days."""

UNITS = (("h", 60, "min"), ("kg", 1000, "g"), ("m", 100, "cm"), ("weeks", 7, "days"))
"""One of the first unit is so many of the last."""

STEP_MINUTES = (5, 10, 15, 20, 30)
LINE_COUNTS = (10, 11, 12)


def write_calendar(source: Source) -> None:
    """Write a page of an almanac."""
    source.say("almanac\n")
    for _ in range(source.pick(LINE_COUNTS)):
        source.pick((_write_date, _write_clock, _write_unit))(source)
    source.say("close")


def _write_date(source: Source) -> None:
    """Write a date some days later; the first date is never after the 28th."""
    weekday, day = source.pick(range(7)), source.pick(range(1, 29))
    month, step = source.pick(range(12)), source.pick((1, 2, 3, 7))
    name, length_days = MONTH_DAYS[month]
    source.say(f"{WEEKDAYS[weekday]} {day} {name} plus {step} days is")
    last = day + step
    if last <= length_days:
        date = f"{last} {name}"
    else:
        date = f"{last - length_days} {MONTH_DAYS[(month + 1) % 12][0]}"
    right = (weekday + step) % 7
    wrong = [f"{WEEKDAYS[(right + shift) % 7]} {date}" for shift in (1, 6, 2)]
    source.state(f"{WEEKDAYS[right]} {date}", wrong)


def _write_clock(source: Source) -> None:
    """Write a time of day some minutes later, on the same day or just past midnight."""
    hour, minute = source.pick(range(24)), source.pick(range(0, 60, 5))
    step = source.pick(STEP_MINUTES)
    source.say(f"{_clock(hour * 60 + minute)} plus {step} min is")
    later = hour * 60 + minute + step
    source.state(_clock(later), [_clock(later + shift) for shift in (5, -10, 60, -60)])


def _clock(minutes: int) -> str:
    """The time of day that many minutes after midnight."""
    return f"{minutes // 60 % 24:02d}:{minutes % 60:02d}"


def _write_unit(source: Source) -> None:
    """Write a conversion."""
    large, factor, small = source.pick(UNITS)
    count = source.pick(range(2, 10))
    source.say(f"{count} {large} is")
    value = count * factor
    wrong = [f"{v} {small}" for v in (value + factor, value - factor, value + 2 * factor)]
    source.state(f"{value} {small}", wrong)
