"""The model card: README.md of a checkpoint, with front matter that the Hugging Face hub reads.

No dates and no paths of the output: the same run writes the same card.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from mxq.publish import CARD, ORIGIN
from mxq.report.comparison import HEADS, comparison, legend
from mxq.report.facts import Facts, gather
from mxq.report.origin import UNTOLD, Origin, command
from mxq.report.words import (
    coverage,
    headlines,
    measured_on,
    provenance,
    scheme_uses,
    warnings,
)
from mxq.storage import save_artifact, write_atomically

_INSTALLING = """Transformers loads it with the help of mxq ({version} wrote it), which needs Python
3.11 or newer. To install it, in a clone of its repository:

```bash
pip install .
```

Then, in this folder:"""

_TEXT_EXAMPLE = """import mxq  # registers the format
from transformers import {auto}, AutoTokenizer

folder = "."  # or this model's name on the hub
model = {auto}.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
prompt = tokenizer("The ", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=12)[0]))
"""

_IDS_EXAMPLE = """import mxq  # registers the format
import torch
from transformers import {auto}

folder = "."  # or this model's name on the hub
model = {auto}.from_pretrained(folder)
prompt_ids = torch.tensor([[1, 2, 3]])  # this folder has no tokenizer: put ids of your own here
print(model.generate(prompt_ids, max_new_tokens=12)[0].tolist())
"""


def write_card(folder: Path, work: Path, origin: Origin) -> None:
    """Write the origin and the card of a finished checkpoint; those that are there stay."""
    if not (folder / ORIGIN).is_file():
        save_artifact(folder / ORIGIN, origin)
    if not (folder / CARD).is_file():
        write_atomically(folder / CARD, model_card(gather(folder, work)))


def model_card(facts: Facts) -> str:
    """The card as Markdown; nothing in it depends on where the folder is."""
    sections = [
        _front_matter(facts),
        f"# {_plain(facts.name)}, {facts.plan.bits_per_weight:.2f} bits per weight",
        _opening(facts),
        "## How to load it\n\n" + _loading(facts),
        "## What was measured\n\n" + _measured(facts),
        "## Formats\n\n" + _schemes(facts),
        "## Coverage\n\n" + _listed(coverage(facts)),
    ]
    found = warnings(facts)
    if found:
        sections.append("## Warnings\n\n" + _listed(found))
    sections.append("## How it was made\n\n" + _made(facts))
    return "\n\n".join(sections) + "\n"


def _front_matter(facts: Facts) -> str:
    """YAML; texts are written as JSON, which YAML reads."""
    lines = ["library_name: transformers"]
    if facts.origin is not None:
        if facts.origin.hub_id is not None:
            lines += [f"base_model: {_quoted(facts.origin.hub_id)}"]
            lines += ["base_model_relation: quantized"]
        if facts.origin.auto_class == "AutoModelForCausalLM":
            lines.append("pipeline_tag: text-generation")
    kinds = ["moe"] if any(cell.expert is not None for cell in facts.cells) else []
    tags = ["mxq", "mixed-precision", "quantized", *kinds, facts.model_type]
    return "\n".join(["---", *lines, "tags:", *(f"- {_quoted(tag)}" for tag in tags), "---"])


def _opening(facts: Facts) -> str:
    text = (
        "Quantized with mxq: each weight matrix has the number format that a budget of bits and "
        "its measured loss gave it."
    )
    rows = [(line.label, line.value, line.remark) for line in headlines(facts)]
    return f"{text}\n\n{_table(('', '', ''), rows)}"


def _loading(facts: Facts) -> str:
    auto = "AutoModelForCausalLM" if facts.origin is None else facts.origin.auto_class
    example = _TEXT_EXAMPLE if facts.has_tokenizer else _IDS_EXAMPLE
    version = facts.record.provenance.versions.get("mxq", "a version that is not known")
    return f"""{_INSTALLING.format(version=version)}

```python
{example.format(auto=auto)}```"""


def _measured(facts: Facts) -> str:
    said = [f"{name}: {meaning}" for name, meaning in legend(facts.plan.unit)]
    return (
        f"{measured_on(facts.written.heldout_tokens)}.\n\n"
        f"{_table(HEADS, comparison(facts))}\n\n{_listed(said)}"
    )


def _schemes(facts: Facts) -> str:
    rows = [(str(use.scheme), str(use.of_experts), str(use.plain)) for use in scheme_uses(facts)]
    return _table(("format", "blocks of experts", "other linears"), rows)


def _made(facts: Facts) -> str:
    line = None if facts.origin is None else command(facts.origin)
    told = UNTOLD if line is None else _fenced(line)
    return f"{told}\n\n{_table(('', ''), provenance(facts))}"


def _fenced(text: str) -> str:
    """A code block that the text cannot end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}bash\n{text}\n{fence}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *([_plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _listed(lines: Sequence[str]) -> str:
    return "\n".join(f"- {_plain(line)}" for line in lines)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*\[\]<>|&])", r"\\\1", " ".join(text.split()))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
