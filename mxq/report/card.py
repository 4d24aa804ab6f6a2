"""The model card: README.md of a checkpoint, with front matter that the Hugging Face hub reads.

No dates and no paths of the output: the same run writes the same card.
"""

from pathlib import Path

from mxq.publish import CARD, ORIGIN
from mxq.report.comparison import HEADS, comparison, legend
from mxq.report.facts import Facts, gather
from mxq.report.markdown import fenced, front_matter, listed, plain, quoted, table
from mxq.report.origin import UNTOLD, Origin, command
from mxq.report.words import (
    coverage,
    headlines,
    kept_choices,
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
        f"# {plain(facts.name)}, {facts.plan.bits_per_weight:.2f} bits per weight",
        _opening(facts),
        "## How to load it\n\n" + _loading(facts),
        "## What was measured\n\n" + _measured(facts),
        "## Formats\n\n" + _schemes(facts),
        "## Coverage\n\n" + listed(coverage(facts)),
    ]
    found = warnings(facts)
    if found:
        sections.append("## Warnings\n\n" + listed(found))
    sections.append("## How it was made\n\n" + _made(facts))
    return "\n\n".join(sections) + "\n"


def hub_fields(origin: Origin | None) -> list[tuple[str, str]]:
    """What the hub reads of a model's origin."""
    fields = [("library_name", "transformers")]
    if origin is None:
        return fields
    if origin.hub_id is not None:
        fields += [("base_model", quoted(origin.hub_id)), ("base_model_relation", "quantized")]
    if origin.auto_class == "AutoModelForCausalLM":
        fields.append(("pipeline_tag", "text-generation"))
    return fields


def plans_table(facts: Facts) -> str:
    """The table of measured plans, and what its columns are."""
    said = [f"{name}: {meaning}" for name, meaning in legend(facts.plan.unit)]
    return f"{table(HEADS, comparison(facts))}\n\n{listed(said)}"


def _front_matter(facts: Facts) -> str:
    kinds = ["moe"] if any(cell.expert is not None for cell in facts.cells) else []
    tags = ["mxq", "mixed-precision", "quantized", *kinds, facts.model_type]
    return front_matter(hub_fields(facts.origin), tags)


def _opening(facts: Facts) -> str:
    text = (
        "Quantized with mxq: each weight matrix has the number format that a budget of bits and "
        "its measured loss gave it."
    )
    rows = [(line.label, line.value, line.remark) for line in headlines(facts)]
    return f"{text}\n\n{table(('', '', ''), rows)}"


def _loading(facts: Facts) -> str:
    auto = "AutoModelForCausalLM" if facts.origin is None else facts.origin.auto_class
    example = _TEXT_EXAMPLE if facts.has_tokenizer else _IDS_EXAMPLE
    version = facts.record.provenance.versions.get("mxq", "a version that is not known")
    return f"""{_INSTALLING.format(version=version)}

```python
{example.format(auto=auto)}```"""


def _measured(facts: Facts) -> str:
    title = f"{measured_on(facts.written.heldout_tokens)}."
    routed = kept_choices(facts.written_pack.expert_choices)
    return "\n\n".join([title, plans_table(facts), *routed])


def _schemes(facts: Facts) -> str:
    rows = [(str(use.scheme), str(use.of_experts), str(use.plain)) for use in scheme_uses(facts)]
    return table(("format", "blocks of experts", "other linears"), rows)


def _made(facts: Facts) -> str:
    line = None if facts.origin is None else command(facts.origin)
    told = UNTOLD if line is None else fenced(line)
    return f"{told}\n\n{table(('', ''), provenance(facts))}"
