"""Where calibration and evaluation text comes from: files, and named sets of the Hugging Face hub.

Text leaves here as plain strings, lazily, and as token ids through ``encode``. A set of the hub is
fetched through ``datasets``, which is imported only then.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class HubSet:
    """A text set of the hub: what ``datasets.load_dataset`` is asked for.

    ``data_files`` None means the files that the set declares for a split. ``joined`` says that the
    rows are the lines of one running text rather than documents of their own.
    """

    path: str
    config: str | None = None
    data_files: Mapping[str, str] | None = None
    streaming: bool = True
    joined: bool = False


HUB_SETS: Mapping[str, HubSet] = {
    "wikitext2": HubSet("Salesforce/wikitext", "wikitext-2-raw-v1", streaming=False, joined=True),
    # One shard of the training split: 350 000 documents, of which a few hundred are read.
    "c4": HubSet("allenai/c4", data_files={"train": "en/c4-train.00000-of-01024.json.gz"}),
    "pile": HubSet("NeelNanda/pile-10k"),
}


def hub_texts(name: str, split: str = "train", *, otherwise: str) -> Iterator[str]:
    """Texts of a set in ``HUB_SETS``, in the order of the set, fetched as they are consumed.

    ``otherwise`` ends the error message: what to use where there is no network.

    Raises:
        ConnectionError: On the first text, if the set cannot be read for whatever reason.
    """
    hub_set = HUB_SETS[name]
    try:
        texts = (str(row["text"]) for row in _hub_rows(hub_set, split))
        # WikiText comes as lines; published perplexities are of the lines joined by an empty one.
        yield from ("\n\n".join(texts),) if hub_set.joined else texts
    except Exception as error:
        # datasets, fsspec and the hub client share no base class for "could not be fetched".
        reason = " ".join(str(error).split())
        raise ConnectionError(
            f"text set {name!r} ({hub_set.path} on the Hugging Face hub) could not be read "
            f"({type(error).__name__}: {reason}); is there a network? Without one, {otherwise}"
        ) from error


def _hub_rows(hub_set: HubSet, split: str) -> Iterable[Mapping[str, object]]:
    from datasets import load_dataset

    rows: Iterable[Mapping[str, object]] = load_dataset(
        hub_set.path,
        hub_set.config,
        data_files=hub_set.data_files,
        split=split,
        streaming=hub_set.streaming,
    )
    return rows


def file_texts(path: Path) -> Iterator[str]:
    """Texts of a file: the ``text`` fields of a .jsonl file, else the whole file as one text.

    Raises:
        ValueError: If the file is missing, empty or not UTF-8, or a line is not JSON with a text
            (that one when the line is reached).
    """
    if not is_there(path) or path.is_dir():
        found = "is a folder" if is_there(path) else "does not exist"
        raise ValueError(
            f"text file {shorten(str(path))} {found}; give a .txt file, or a .jsonl file "
            "with a 'text' field on each line"
        )
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text file {path} is not UTF-8 ({error}); convert it first") from error
    if not content.strip():
        raise ValueError(f"text file {path} is empty; give a file with text in it")
    return _json_texts(path, content) if path.suffix == ".jsonl" else iter((content,))


def is_there(path: Path) -> bool:
    """Whether a path exists; a text that cannot be a path at all does not."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a byte that no name has
        return False


def shorten(text: str, limit: int = 200) -> str:
    """The beginning of a text that may be long, for a message."""
    return text if len(text) <= limit else text[:limit] + "..."


def _json_texts(path: Path, content: str) -> Iterator[str]:
    # Not splitlines(): a JSON string may hold other line separators of Unicode, unescaped.
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            yield _json_text(line, f"{path} line {number}")


def _json_text(line: str, place: str) -> str:
    form = 'each line is an object such as {"text": "..."}'
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON ({error.msg}); {form}") from error
    text = row.get("text") if isinstance(row, dict) else None
    if isinstance(text, str):
        return text
    found = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
    raise ValueError(f"{place} has no string field 'text' (found: {found}); {form}")


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids of a text [T], int64, without special tokens."""
    # verbose=False: a text longer than the model's context is no mistake here, it is cut later.
    encoding = tokenizer(text, add_special_tokens=False, verbose=False)
    return torch.tensor(encoding["input_ids"], dtype=torch.int64)


def encode_joined(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Tensor:
    """Token ids [T] of all texts: end-of-text between two, begin-of-text once where it is used."""
    separator = _one_id(tokenizer.eos_token_id)
    pieces = [_one_id(bos_id(tokenizer))]
    for index, text in enumerate(texts):
        pieces += [separator] * (index > 0) + [encode(tokenizer, text)]
    return torch.cat(pieces)


def _one_id(token_id: object) -> Tensor:
    """The id as a tensor [1], or [0] for a tokenizer that has none."""
    return torch.tensor([token_id] if isinstance(token_id, int) else [], dtype=torch.int64)


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The begin-of-text id, where the tokenizer puts one before a text; else None."""
    ids = tokenizer("")["input_ids"]
    bos = tokenizer.bos_token_id
    return bos if isinstance(bos, int) and ids[:1] == [bos] else None
