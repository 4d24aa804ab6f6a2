"""Write docs/architectures.md: what becomes of every architecture of the installed transformers.

Each type is made tiny, quantized, saved, loaded and compared; tests/pipeline/test_architectures.py
runs the same and compares with the page. Run it where a new transformers has new types:

    .venv/bin/python scripts/list_architectures.py
"""

import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architectures.md"

HEADER = """\
# Architectures

Made by `scripts/list_architectures.py` with transformers {version}; do not edit. No list in mxq
names a model: a type is found by the interface that its experts have, and what is below is what
happened to a tiny random model of it. Each was quantized with a mix of formats (every linear of
the decoder layers, the second layer rotated), saved, and loaded by `from_pretrained`; its logits
equal those of the original with the decoded weights in place.

## Mixtures of experts behind transformers' experts interface: {covered} of {found}

Of a model that also reads images or sound, the language part is quantized; the other parts are
written as they were, bit for bit. Where two classes are named, the checkpoint loads with the one
that wrote the original. Norms, biases, embeddings, head and routers stay everywhere; the last
column is what else stays with `--scope all`.

| type | loads with | experts (`-`: gate over up, stored [out, in]) | notes |
| --- | --- | --- | --- |
"""

REFUSED = """
## Refused

| type | what mxq says |
| --- | --- |
"""

OTHERS = """
## Experts in a form of their own

Outside the interface. mxq stops with the names of the parameters; with `--keep`, the experts stay
in their type, and attention and shared linears are quantized.

| type | what mxq says |
| --- | --- |
"""

DENSE = """
## Dense families that are tested

Any model of plain linears is read; these are tested.

| type | loads with | experts | notes |
| --- | --- | --- | --- |
"""


def page(outcomes: Iterable, others: Iterable, dense: Iterable, version: str) -> str:
    """The text of the page."""
    outcomes = list(outcomes)
    covered = [trip.row for trip in outcomes if trip.refusal is None]
    refused = [trip.row for trip in outcomes if trip.refusal is not None]
    return "".join(
        [
            HEADER.format(version=version, covered=len(covered), found=len(outcomes)),
            *(f"{row}\n" for row in covered),
            REFUSED,
            *(f"{row}\n" for row in refused),
            OTHERS,
            *(f"{trip.row}\n" for trip in others),
            DENSE,
            *(f"{trip.row}\n" for trip in dense),
        ]
    )


def main() -> None:
    """Run every type and write the page."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "pipeline")]
    import architectures
    import transformers
    from roundtrip import RoundTrip, round_trip

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    def run(model_type: str) -> RoundTrip:
        with tempfile.TemporaryDirectory() as folder:
            trip = round_trip(model_type, Path(folder))
        print(trip.row)
        if trip.refusal is None and not trip.is_right:
            raise SystemExit(f"{trip} is wrong: tests/pipeline/test_architectures.py fails too")
        return trip

    lists = [
        [run(model_type) for model_type in types]
        for types in (
            architectures.discovered(),
            architectures.others_with_experts(),
            architectures.DENSE,
        )
    ]
    PAGE.write_text(page(*lists, version=transformers.__version__), encoding="utf-8")


if __name__ == "__main__":
    main()
