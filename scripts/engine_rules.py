"""Write the tables of docs/engines.md from the rules in mxq/engines/rules.

tests/unit/test_engines.py compares the page with them; after a change of the rules run

    .venv/bin/python scripts/engine_rules.py
"""

from pathlib import Path

from mxq.engines import ENGINES, EngineRules, load_rules

PAGE = Path(__file__).resolve().parents[1] / "docs" / "engines.md"
START, END = "<!-- rules: made by scripts/engine_rules.py -->", "<!-- /rules -->"


def page_with_rules(text: str) -> str:
    """The page with its tables made anew."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    tables = "\n".join(_section(load_rules(engine)) for engine in ENGINES)
    return f"{before}{START}\n\n{tables}\n{END}{after}"


def _section(rules: EngineRules) -> str:
    lines = [
        f"### `--engine {rules.engine}`: {rules.title} {rules.version}",
        "",
        f"Read in {rules.source}.",
        "",
        "| rule | | what it says | what to do | read in |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| `{rule.id}` | {rule.severity} | {_cell(rule.says)} | {_cell(rule.remedy)} "
        f"| {_cell(rule.source)} |"
        for rule in rules.rules
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")


if __name__ == "__main__":
    PAGE.write_text(page_with_rules(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
