"""Tables, lists and quoted texts of a model card."""

import json
import re
from collections.abc import Sequence


def fenced(text: str, language: str = "bash") -> str:
    """A code block that the text cannot end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; cells are shown as they are."""
    lines = [heads, ["---"] * len(heads), *([plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def listed(lines: Sequence[str]) -> str:
    """A list with one line for each text."""
    return "\n".join(f"- {plain(line)}" for line in lines)


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*\[\]<>|&])", r"\\\1", " ".join(text.split()))


def front_matter(fields: Sequence[tuple[str, str]], tags: Sequence[str]) -> str:
    """What the Hugging Face hub reads, as YAML; texts are written as JSON, which YAML reads."""
    lines = [f"{name}: {value}" for name, value in fields]
    return "\n".join(["---", *lines, "tags:", *(f"- {quoted(tag)}" for tag in tags), "---"])


def quoted(text: str) -> str:
    """A text as YAML and JSON read it."""
    return json.dumps(text, ensure_ascii=False)
