"""The texts that models are scored on, by domain: files, ``wikitext2`` and ``demo``."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mxq.counted import counted
from mxq.evaluation.loading import load_tokenizer, require_same_vocabulary
from mxq.profiling.texts import encode_joined, file_texts, hub_texts, is_there

DEMO_DOCUMENTS = 200
"""Documents of ``demo`` over all of its domains."""

Texts = Mapping[str, Sequence[str]]


def read_texts(spec: str) -> dict[str, tuple[str, ...]]:
    """Texts by domain of a spelling: ``SET`` or ``NAME=SET,NAME=SET``.

    A set is a .txt or .jsonl file, ``wikitext2`` (its test split) or ``demo`` (held out from
    calibration), which alone has domains of its own.

    Raises:
        ValueError: If a file cannot be read, or a domain is named twice or not at all.
        ConnectionError: If a set of the hub cannot be fetched.
    """
    if spec == "demo":
        from mxq import demo

        each = DEMO_DOCUMENTS // len(demo.DOMAINS)
        return {
            domain: tuple(text.text for text in demo.documents("heldout", each, domain=domain))
            for domain in demo.DOMAINS
        }
    found: dict[str, tuple[str, ...]] = {}
    for name, text_set in _named_sets(spec):
        if name in found:
            raise ValueError(f"--text {spec} names the domain {name!r} twice; give each a name")
        found[name] = tuple(_set_texts(text_set))
    return found


def encode_texts(
    texts: Texts, models: Sequence[str], limit: int | None = None
) -> dict[str, Tensor]:
    """Token ids [T] by domain, no more than ``limit`` of each, the same for every model.

    Raises:
        ValueError: If a tokenizer cannot be loaded or gives other ids, or a domain is too short.
    """
    if limit is not None and limit < 2:
        raise ValueError(f"limit is {counted(limit, 'token')}; scoring needs at least 2")
    first = load_tokenizer(models[0])
    ids = {name: encode_joined(first, domain) for name, domain in texts.items()}
    for model in models[1:]:
        other = load_tokenizer(model)
        require_same_vocabulary(first, other, (models[0], model))
        # One vocabulary can still be cut and framed in two ways: merges, begin-of-text.
        for name, domain in texts.items():
            if not torch.equal(encode_joined(other, domain), ids[name]):
                raise ValueError(
                    f"{models[0]} and {model} turn the text {name!r} into other token ids; only "
                    "models with one tokenizer can be compared"
                )
    for name, ids_T in ids.items():
        if len(ids_T) < 2:
            raise ValueError(
                f"the text {name!r} has {counted(len(ids_T), 'token')}; scoring needs at least 2"
            )
    return {name: ids_T[:limit] for name, ids_T in ids.items()}


def _named_sets(spec: str) -> Iterator[tuple[str, str]]:
    """Domain and set of each part of a spelling."""
    if "=" not in spec or is_there(Path(spec)):
        yield spec if spec == "wikitext2" else Path(spec).stem, spec
        return
    for part in spec.split(","):
        name, equals, text_set = part.partition("=")
        if not name or not equals or not text_set:
            raise ValueError(
                f"{part!r} in --text {spec} is no NAME=PATH; write PATH for one text, or "
                "NAME=PATH,NAME=PATH for several"
            )
        yield name, text_set


def _set_texts(text_set: str) -> Iterable[str]:
    if text_set == "wikitext2":
        return hub_texts(text_set, "test", otherwise="give a file: --text PATH, or use --text demo")
    if text_set == "demo":
        from mxq import demo

        return (document.text for document in demo.documents("heldout", DEMO_DOCUMENTS))
    return file_texts(Path(text_set))
