"""From the texts or token ids of one domain to its samples: read what is needed, cut windows.

An item of a domain is a text, token ids [T], or rows of token ids [B, T] that are samples already.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mxq.counted import counted
from mxq.profiling.texts import bos_id, encode

POOL_WINDOWS = 32
"""Windows are drawn from the first 32 times as many tokens as they take: enough to spread over,
and a long list of texts is not tokenized to its end."""

STREAM_POOL_WINDOWS = 4
"""The same for texts that are fetched or made while they are read."""


@dataclass(frozen=True, slots=True)
class Domain:
    """Texts or token ids of one domain, or a tensor [samples, seqlen] that is taken as it is.

    ``pool`` is how many tokens to read, at least, per token used (as far as there are so many).
    ``clipped``: a document gives at most one window, so that a long one does not fill the set.
    """

    name: str
    items: Iterable[object] | Tensor
    pool: int = 1
    clipped: bool = False


@dataclass(frozen=True, slots=True)
class Cutter:
    """How every domain of a set is cut: with which tokenizer, how long, from which randomness."""

    tokenizer: PreTrainedTokenizerBase | None
    seqlen: int
    generator: torch.Generator
    disjoint: bool = False


def cut(cutter: Cutter, domain: Domain, share: int) -> Tensor:
    """The samples of one domain, [share, seqlen] int64, or the rows that it consists of.

    Raises:
        ValueError: If there are too few tokens, or items of the wrong kind.
    """
    if isinstance(domain.items, Tensor):
        return domain.items
    rest = (as_item(item, domain.name) for item in domain.items)
    first = next(rest, None)
    if first is None:
        raise ValueError(f"calibration domain {domain.name!r} is empty; give text or token ids")
    items = chain((first,), rest)
    if isinstance(first, Tensor) and first.ndim == 2:
        return _rows(domain.name, items, share)
    stream = _stream(cutter, domain, items, share * cutter.seqlen * domain.pool)
    starts = _starts(cutter, domain.name, len(stream), share)
    windows = stream[starts[:, None] + torch.arange(cutter.seqlen)]
    if isinstance(first, str) and cutter.tokenizer is not None:
        bos = bos_id(cutter.tokenizer)
        windows[:, 0] = windows[:, 0] if bos is None else bos
    return windows


def _stream(cutter: Cutter, domain: Domain, items: Iterable[str | Tensor], wanted: int) -> Tensor:
    """Token ids [T] of the first items that have ``wanted`` tokens, or of all."""
    eos = None if cutter.tokenizer is None else cutter.tokenizer.eos_token_id
    chunks: list[Tensor] = []
    found = 0
    for item in items:
        ids = _ids(cutter, item, domain.name)
        if domain.clipped and len(ids) > cutter.seqlen:
            start = int(_random(cutter, len(ids) - cutter.seqlen + 1, 1))
            ids = ids[start : start + cutter.seqlen]
        if chunks and isinstance(item, str) and isinstance(eos, int):
            chunks.append(torch.tensor([eos]))
        chunks.append(ids)
        found += len(ids)
        if found >= wanted:
            break
    return torch.cat(chunks)


def _ids(cutter: Cutter, item: str | Tensor, name: str) -> Tensor:
    if isinstance(item, Tensor) and item.ndim == 1:
        return item
    if isinstance(item, Tensor):
        raise _mixed(name)
    if cutter.tokenizer is None:
        raise ValueError(
            f"calibration domain {name!r} is text, and text needs a tokenizer; pass the "
            "model's tokenizer (tokenizer.json in its folder), or token ids instead of text"
        )
    return encode(cutter.tokenizer, item)


def _starts(cutter: Cutter, name: str, length: int, share: int) -> Tensor:
    """First token of each window: disjoint and random if that fits, else evenly overlapping."""
    seqlen = cutter.seqlen
    step = seqlen if cutter.disjoint else -(-seqlen // 2)
    needed = seqlen + (share - 1) * step
    if length < needed:
        rule = "held-out text shares none" if cutter.disjoint else "two may overlap by half"
        raise ValueError(
            f"calibration domain {name!r} has {counted(length, 'token')}, but "
            f"{counted(share, 'window')} of {seqlen} {'needs' if share == 1 else 'need'} at least "
            f"{needed} ({rule}); give more text, or lower samples or seqlen"
        )
    steps = torch.arange(share)
    slack = length - share * seqlen
    if slack < 0:
        return steps * (length - seqlen) // (share - 1)
    # Sorted random gaps in front of the windows: every disjoint placement can occur.
    return _random(cutter, slack + 1, share).sort().values + steps * seqlen


def _random(cutter: Cutter, limit: int, count: int) -> Tensor:
    return torch.randint(limit, (count,), generator=cutter.generator)


def as_item(value: object, name: str) -> str | Tensor:
    """A text, or token ids as int64 [T] or [B, T]; a dataset row gives its text or ids.

    Raises:
        ValueError: If the value is neither; ``name`` is the domain named in the message.
    """
    if isinstance(value, Mapping):
        value = _field(value, name)
    if isinstance(value, str):
        return value
    try:
        ids = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"calibration domain {name!r} holds a {type(value).__name__}; give texts, or token ids "
            "as lists or integer tensors"
        ) from error
    is_integer = not ids.is_floating_point() and ids.dtype != torch.bool
    if (len(ids.ravel()) > 0 and not is_integer) or ids.ndim not in (1, 2):
        raise ValueError(
            f"calibration domain {name!r} holds {ids.dtype} of shape {tuple(ids.shape)}; token ids "
            "are integers of shape [tokens] or [samples, seqlen]"
        )
    return ids.to("cpu", torch.int64)


def is_ids(value: object) -> bool:
    """Whether a value is itself token ids: a tensor, numbers, or rows of one length."""
    if isinstance(value, Tensor) or hasattr(value, "__array__"):
        return True
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        return False
    rows = [row for row in value if isinstance(row, list | tuple)]
    return isinstance(value[0], int) or (len(rows) == len(value) and len(set(map(len, rows))) == 1)


def _field(row: Mapping[object, object], name: str) -> object:
    """The field of a dataset row that holds its content."""
    if "input_ids" not in row and "text" not in row:
        found = ", ".join(map(str, row))
        raise ValueError(
            f"calibration domain {name!r} holds rows with the fields {found}; expected 'text' or "
            "'input_ids'"
        )
    mask = row.get("attention_mask")
    if mask is not None and not bool(torch.as_tensor(mask).all()):
        raise ValueError(
            f"calibration domain {name!r} holds padded rows (attention_mask has zeros); give the "
            "texts, or ids without padding"
        )
    return row["input_ids"] if "input_ids" in row else row["text"]


def _rows(name: str, items: Iterable[str | Tensor], share: int) -> Tensor:
    """The first ``share`` rows of batches [B, T], read only as far as needed."""
    rows = list(_first_rows(name, items, share))
    if len(rows) < share:
        raise ValueError(
            f"calibration domain {name!r} has {counted(len(rows), 'row')} of token ids, but "
            f"{counted(share, 'sample')} {'is' if share == 1 else 'are'} needed; give more rows, "
            "or lower samples"
        )
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise ValueError(
            f"calibration domain {name!r} has rows of {lengths[0]} and of {lengths[-1]} tokens; "
            "rows of samples must be of one length"
        )
    return torch.stack(rows)


def _first_rows(name: str, items: Iterable[str | Tensor], limit: int) -> Iterator[Tensor]:
    taken = 0
    for item in items:
        if isinstance(item, str) or item.ndim != 2:
            raise _mixed(name)
        yield from item[: limit - taken]
        taken += len(item)
        if taken >= limit:
            return


def _mixed(name: str) -> ValueError:
    return ValueError(
        f"calibration domain {name!r} mixes rows of samples with other items; give either rows "
        "[samples, seqlen] only, or none"
    )
