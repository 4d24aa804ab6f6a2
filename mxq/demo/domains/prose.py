"""Templated prose about people of a village, in which much follows from what has been said.

The pronoun follows from the name, the ware from the trade, the climate from the region, number
and verb from the count, and what someone takes from what he or she prefers.
"""

from dataclasses import dataclass

from mxq.demo.source import Source

PRONOUNS = {
    "Anna": "She",
    "Clara": "She",
    "Eva": "She",
    "Ida": "She",
    "Julia": "She",
    "Nora": "She",
    "Ben": "He",
    "David": "He",
    "Felix": "He",
    "Karl": "He",
    "Peter": "He",
    "Tom": "He",
}
"""The pronoun of each name."""

WARES = {
    "baker": "bread",
    "smith": "nails",
    "farmer": "corn",
    "weaver": "cloth",
    "brewer": "beer",
    "miller": "flour",
    "potter": "bowls",
    "fisher": "eels",
}
"""What each trade sells."""

CLIMATES = {"north": "cold", "south": "hot", "east": "dry", "west": "wet"}
"""The weather of each region."""

ANIMALS = ("dog", "cat", "goat", "horse", "cow", "hen", "pig", "duck")
COUNTS = ("one", "two", "three", "four")
COLOURS = ("black", "white", "brown", "grey")
THINGS = ("tea", "milk", "water", "wine", "juice", "cider", "soup")
PERSON_COUNTS = (3, 4)


@dataclass(frozen=True, slots=True)
class _Person:
    """Who a paragraph is about."""

    name: str
    trade: str
    pronoun: str


def write_prose(source: Source) -> None:
    """Write a story about three or four people."""
    for _ in range(source.pick(PERSON_COUNTS)):
        _write_person(source)
    source.say("The end.")


def _write_person(source: Source) -> None:
    """Write a paragraph about one person, in which that person is named and then referred to."""
    name, trade = source.pick(tuple(PRONOUNS)), source.pick(tuple(WARES))
    source.say(f"{name} is a {trade}.")
    pronoun, other = PRONOUNS[name], "He" if PRONOUNS[name] == "She" else "She"
    wares = [ware for ware in WARES.values() if ware != WARES[trade]]
    wrong = [f"{other} sells {WARES[trade]}", *(f"{pronoun} sells {ware}" for ware in wares)]
    source.state(f"{pronoun} sells {WARES[trade]}", wrong, end=".")
    person = _Person(name, trade, pronoun)
    for _ in range(2):
        source.pick((_write_region, _write_animals, _write_taste))(source, person)
    source.say("\n")


def _write_region(source: Source, person: _Person) -> None:
    """Write where the person lives and what the weather is like there."""
    region = source.pick(tuple(CLIMATES))
    source.say(f" In the {region}, where {person.name} lives, it is")
    source.state(CLIMATES[region], tuple(CLIMATES.values()), end=".")


def _write_animals(source: Source, person: _Person) -> None:
    """Write which animals the person has and their colour, with agreement in number."""
    count, animal, colour = source.pick(COUNTS), source.pick(ANIMALS), source.pick(COLOURS)
    source.say(f" The {person.trade} has {count} {colour} ")
    noun = animal if count == "one" else f"{animal}s"
    source.say(f"{noun}, and the")
    is_one = count == "one"
    right = f"{noun} {'is' if is_one else 'are'} {colour}"
    wrong = [f"{noun} {'are' if is_one else 'is'} {colour}"]
    start = COLOURS.index(colour)
    others = [COLOURS[(start + shift) % len(COLOURS)] for shift in (1, 2)]
    wrong += [f"{noun} {'is' if is_one else 'are'} {other}" for other in others]
    source.state(right, wrong, end=".")


def _write_taste(source: Source, person: _Person) -> None:
    """Write what the person prefers and therefore takes."""
    liked = source.pick(THINGS)
    disliked = source.pick(tuple(thing for thing in THINGS if thing != liked))
    source.say(f" {person.pronoun} likes {liked} but not {disliked}, so {person.name} buys")
    source.state(liked, [disliked, *(t for t in THINGS if t != disliked)], end=".")
