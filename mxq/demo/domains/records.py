"""Records of a staff file: fields in a fixed order, of which half repeat or follow from others.

The land follows from the city, the mail from name and team, the tag from name and number, and
the head is the person whom the title names.
"""

from mxq.demo.source import Source

FIRST_NAMES = (
    *("mara", "jon", "lena", "oskar", "vera", "nils"),
    *("tara", "hugo", "olga", "emil", "rosa", "finn"),
)
LAST_NAMES = (
    *("lind", "berg", "moss", "kern", "vale", "stone"),
    *("frost", "brook", "hill", "winter", "sand", "wolf"),
)
TEAMS = ("sales", "legal", "store", "tools", "press", "fleet")
LANDS = {
    "oslo": "norway",
    "bergen": "norway",
    "rome": "italy",
    "milan": "italy",
    "paris": "france",
    "lyon": "france",
    "cairo": "egypt",
    "luxor": "egypt",
    "lima": "peru",
    "cusco": "peru",
}
"""The land of each city."""

RECORD_COUNTS = (4, 5)


def write_records(source: Source) -> None:
    """Write a staff file."""
    head = source.pick(FIRST_NAMES)
    source.say(f"[staff of {head}]\n")
    for _ in range(source.pick(RECORD_COUNTS)):
        _write_record(source, head)
    source.say("[done]")


def _write_record(source: Source, head: str) -> None:
    """Write one person."""
    number = source.pick(range(10, 100))
    first, last = source.pick(FIRST_NAMES), source.pick(LAST_NAMES)
    team, city = source.pick(TEAMS), source.pick(tuple(LANDS))
    source.say(f"id: {number}\nname: {first} {last}\nteam: {team}\ncity: {city}\nland:")
    source.state(LANDS[city], tuple(LANDS.values()))
    source.say("mail:")
    mails = [f"{_after(FIRST_NAMES, first, 1)}@{team}"]
    mails += [f"{first}@{_after(TEAMS, team, shift)}" for shift in (1, 2)]
    source.state(f"{first}@{team}", mails)
    source.say("tag:")
    tags = [f"{_after(LAST_NAMES, last, 1)}-{number}"]
    tags += [f"{last}-{10 + (number - 10 + shift) % 90}" for shift in (1, 10)]
    source.state(f"{last}-{number}", tags)
    source.say("head:")
    source.state(head, [_after(FIRST_NAMES, head, shift) for shift in (1, 2, 3)])


def _after(names: tuple[str, ...], name: str, shift: int) -> str:
    """The name ``shift`` places after ``name``, around the end."""
    return names[(names.index(name) + shift) % len(names)]
