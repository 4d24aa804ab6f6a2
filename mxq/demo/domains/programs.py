"""Small Python programs whose comments say what each line yields.

Every line runs, and the comment behind ``#`` is its value or its output: ``b = a + 2 # 5``. All
numbers are single digits, and a variable is read only after it has been assigned.
"""

from mxq.demo.source import Source

VARIABLES = ("a", "b", "c")
WORDS = ("cat", "sun", "map", "log", "key", "fox")
LINE_COUNTS = (11, 12, 13)


def write_programs(source: Source) -> None:
    """Write a program that runs."""
    values = {}
    for name in VARIABLES:
        values[name] = source.pick(range(10))
        source.say(f"{name} = {values[name]}\n")
    kinds = (_write_add, _write_subtract, _write_compare, _write_branch, _write_loop, _write_word)
    for _ in range(source.pick(LINE_COUNTS)):
        source.pick(kinds)(source, values)
    source.say("exit()")


def _write_add(source: Source, values: dict[str, int]) -> None:
    """Assign a variable plus a constant, with a sum of one digit."""
    target, read = source.pick(VARIABLES), source.pick(VARIABLES)
    constant = source.pick(range(10 - values[read]))
    source.say(f"{target} = {read} + {constant} #")
    values[target] = values[read] + constant
    source.state(str(values[target]), _other_digits(values[target]))


def _write_subtract(source: Source, values: dict[str, int]) -> None:
    """Assign a variable minus a constant, with a difference that is not negative."""
    target, read = source.pick(VARIABLES), source.pick(VARIABLES)
    constant = source.pick(range(values[read] + 1))
    source.say(f"{target} = {read} - {constant} #")
    values[target] = values[read] - constant
    source.state(str(values[target]), _other_digits(values[target]))


def _write_compare(source: Source, values: dict[str, int]) -> None:
    """Print a variable beside a constant and the larger of the two."""
    read, constant = source.pick(VARIABLES), source.pick(range(10))
    source.say(f"print(max({read}, {constant})) #")
    larger = max(values[read], constant)
    source.state(str(larger), _other_digits(larger))


def _write_branch(source: Source, values: dict[str, int]) -> None:
    """Print one of two words, as a comparison tells."""
    read, constant = source.pick(VARIABLES), source.pick(range(1, 9))
    first, second = source.pick(WORDS), source.pick(WORDS)
    source.say(f"print('{first}' if {read} < {constant} else '{second}') #")
    word = first if values[read] < constant else second
    start = WORDS.index(word)
    others = [WORDS[(start + shift) % len(WORDS)] for shift in (1, 2, 3)]
    source.state(word, [first, second, *others])


def _write_loop(source: Source, values: dict[str, int]) -> None:
    """Print the numbers of a range that starts at a constant."""
    start = source.pick(range(7))
    length = source.pick((2, 3))
    source.say(f"print(*range({start}, {start + length})) #")
    numbers = " ".join(str(n) for n in range(start, start + length))
    wrong = [" ".join(str(n) for n in range(start + s, start + s + length)) for s in (1, 2)]
    wrong.append(" ".join(str(n) for n in range(start, start + length + 1)))
    source.state(numbers, wrong)


def _write_word(source: Source, values: dict[str, int]) -> None:
    """Print a letter of a word."""
    word, index = source.pick(WORDS), source.pick(range(3))
    source.say(f"print('{word}'[{index}]) #")
    source.state(word[index], [*word, *"xyz"])


def _other_digits(digit: int) -> list[str]:
    """Three digits that are near ``digit``, around the end."""
    return [str((digit + shift) % 10) for shift in (1, 9, 2)]
