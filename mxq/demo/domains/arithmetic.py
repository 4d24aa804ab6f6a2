"""Sums with small operands, one a line: ``7+5=12``, ``12-4=8``, ``3*6=18``, ``max(4,9)=9``.

The operands are random and the result is not, so a model that has learnt the tables is surprised
by the operands only.
"""

from mxq.demo.source import Source

LINE_COUNTS = (28, 30, 32)


def write_arithmetic(source: Source) -> None:
    """Write a sheet of sums."""
    source.say("sums\n")
    for _ in range(source.pick(LINE_COUNTS)):
        _write_sum(source)
    source.say("end")


def _write_sum(source: Source) -> None:
    """Write one line; the operator decides the range of the operands."""
    operator = source.pick("+-*m")
    if operator == "m":
        left, right = source.pick(range(1, 20)), source.pick(range(1, 20))
        source.say(f"max({left},{right})=")
        value = max(left, right)
        # The smaller operand is the tempting mistake.
        wrong = (min(left, right), value + 1, value + 2, value + 10)
        source.state(str(value), [str(v) for v in wrong], lead="")
        return
    if operator == "+":
        left, right = source.pick(range(1, 13)), source.pick(range(1, 13))
        value = left + right
    elif operator == "-":
        left = source.pick(range(1, 21))
        right = source.pick(range(1, left + 1))
        value = left - right
    else:
        left, right = source.pick(range(1, 10)), source.pick(range(1, 10))
        value = left * right
    source.say(f"{left}{operator}{right}=")
    source.state(str(value), [str(value + d) for d in (1, -1, 2, 10) if value + d >= 0], lead="")
