"""Calibration sets: the token ids on which a model is observed before it is quantized.

A set is cut from texts or token ids of one or several domains, in equal shares. The same request
gives the same ids, and ``digest`` tells two sets apart in the provenance of everything made from
them. Where texts come from is told in ``texts.py``, what a name stands for in ``calib_data/``.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mxq.counted import counted
from mxq.profiling.texts import HUB_SETS, file_texts, hub_texts, is_there, shorten
from mxq.profiling.windows import (
    POOL_WINDOWS,
    STREAM_POOL_WINDOWS,
    Cutter,
    Domain,
    as_item,
    cut,
    is_ids,
)

Sampler = Callable[[int, int, torch.Generator], Tensor]
"""``(batch, seqlen, generator) -> ids [batch, seqlen]``: text that a model writes by itself."""

SELF_BATCH = 8
DEMO_DOCUMENTS = 64


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Token ids [samples, seqlen] (int64), the domain of each sample, and where they come from.

    Two sets are equal if ids, domains and name are; ``digest`` is the sha256 of ids and domains.
    """

    input_ids: Tensor = field(compare=False, repr=False)
    domains: tuple[str, ...] = field(repr=False)
    name: str
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        """Compute the digest.

        Raises:
            ValueError: If the ids are not a non-empty int64 matrix with one domain per row.
        """
        ids = self.input_ids
        if ids.dtype != torch.int64 or ids.ndim != 2 or ids.numel() == 0:
            raise ValueError(
                f"calibration ids are {ids.dtype} of shape {tuple(ids.shape)}; "
                "give int64 of shape [samples, seqlen], with at least one sample and one token"
            )
        if len(self.domains) != len(ids):
            raise ValueError(
                f"{counted(len(self.domains), 'domain')} for {counted(len(ids), 'sample')}; give "
                "one each"
            )
        object.__setattr__(self, "digest", _digest(ids, self.domains))

    @property
    def tokens(self) -> int:
        """Number of tokens in all samples."""
        return self.input_ids.numel()

    def split(self, holdout: float) -> tuple["CalibrationSet", "CalibrationSet"]:
        """The set to fit on and the set held out: every n-th sample of each domain.

        ``holdout`` below 1 is the fraction held out, from 1 on the number of samples.

        Raises:
            ValueError: If either part would be empty.
        """
        samples = len(self.domains)
        held = round(holdout * samples) if 0 < holdout < 1 else int(holdout)
        if not 0 < held < samples:
            raise ValueError(
                f"holding out {holdout:g} of {counted(samples, 'sample')} leaves {samples - held} "
                f"to fit and {held} held out; both need at least one: change "
                "the holdout or give more samples"
            )
        # Sorted by domain, so that equal steps through the order are equal steps in each domain.
        order = sorted(range(samples), key=lambda index: self.domains[index])
        places = {order[(step + 1) * samples // held - 1] for step in range(held)}
        fit = [index for index in range(samples) if index not in places]
        return self._part(fit, "fit"), self._part(sorted(places), "heldout")

    def _part(self, rows: list[int], label: str) -> "CalibrationSet":
        domains = tuple(self.domains[row] for row in rows)
        return CalibrationSet(self.input_ids[rows], domains, f"{self.name} ({label})")


def _digest(ids: Tensor, domains: tuple[str, ...]) -> str:
    # Explicitly little-endian, so that the digest does not depend on the machine.
    content = ids.cpu().contiguous().numpy().astype("<i8").tobytes()
    header = repr((tuple(ids.shape), domains)).encode()
    return hashlib.sha256(header + content).hexdigest()


def load_calibration(  # noqa: PLR0913  (one request: what, how much of it, for which model)
    spec: str | Tensor | Mapping[str, object] | Iterable[object],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    samples: int = 128,
    seqlen: int = 512,
    seed: int = 0,
    vocab_size: int | None = None,
    model: Sampler | None = None,
    disjoint: bool = False,
) -> CalibrationSet:
    """The calibration set that ``spec`` describes; the same arguments give the same ids.

    ``spec`` is one of
      * ``wikitext2``, ``c4``, ``pile``, or several of them separated by commas: sets of the hub;
      * ``file:PATH`` or ``file:NAME=PATH,NAME=PATH``: .txt, or .jsonl with a ``text`` field;
      * ``demo``: the embedded corpus; ``self``: text that ``model`` writes;
      * texts, or token ids (1-D pieces are cut into windows; 2-D rows are the samples themselves,
        whatever ``samples`` and ``seqlen`` say), or dataset rows with ``text`` or ``input_ids``,
        or any iterable of those, consumed only as far as needed;
      * a mapping from domain names to any of the previous item (or to ``file:PATH``).

    Texts of a domain are joined, an end-of-text token between two, and cut into windows at random
    offsets. Windows are disjoint where the domain is long enough, else they overlap by at most
    half, or are refused where ``disjoint`` asks for it: a set of which a part is to be held out.
    Where the tokenizer starts a text with a begin-of-text token, so does each window.

    Raises:
        ValueError: With what was found, what was expected and what to change.
        ConnectionError: If a set of the hub cannot be fetched.
    """
    if samples < 1 or seqlen < 1:
        raise ValueError(f"samples is {samples} and seqlen is {seqlen}; both must be at least 1")
    cutter = Cutter(tokenizer, seqlen, torch.Generator().manual_seed(seed), disjoint)
    name = spec if isinstance(spec, str) else "own data"
    if isinstance(spec, str) and spec == "self":  # an array compares by element
        windows = {"self": _written_by(model, samples, cutter)}
    else:
        domains = _named(spec) if isinstance(spec, str) else _given(spec)
        shares = _shares(samples, [domain.name for domain in domains])
        windows = {domain.name: cut(cutter, domain, shares[domain.name]) for domain in domains}
    result = _assembled(windows, name)
    _check_ids(result.input_ids, vocab_size)
    return result


def _named(spec: str) -> tuple[Domain, ...]:
    """Domains of a spelling."""
    otherwise = "give your own text as file:PATH, or use demo or self"
    if spec.startswith("file:"):
        return tuple(Domain(*named, POOL_WINDOWS) for named in _files(spec.removeprefix("file:")))
    if spec == "demo":
        return _demo()
    names = spec.split(",")
    if not all(name in HUB_SETS for name in names):
        hint = f"; for the file of that name write file:{spec}" if is_there(Path(spec)) else ""
        raise ValueError(
            f"calibration set {shorten(spec, 80)!r} is unknown; choose {', '.join(HUB_SETS)} (or "
            "several, separated by commas), demo, self, file:PATH or file:NAME=PATH,NAME=PATH"
            f"{hint}; in Python, texts are given as a list"
        )
    return tuple(
        Domain(
            name,
            hub_texts(name, otherwise=otherwise),
            pool=POOL_WINDOWS if HUB_SETS[name].joined else STREAM_POOL_WINDOWS,
            clipped=not HUB_SETS[name].joined,
        )
        for name in names
    )


def _files(listing: str) -> Iterator[tuple[str, Iterator[str]]]:
    """Name and texts of ``PATH`` or ``NAME=PATH,NAME=PATH``."""
    if is_there(Path(listing)) or "=" not in listing:
        yield Path(listing).stem, file_texts(Path(listing))
        return
    for part in listing.split(","):
        name, equals, path = part.partition("=")
        if not name or not equals:
            raise ValueError(
                f"{part!r} in file:{listing} has no domain name; write file:PATH for one file, or "
                "file:NAME=PATH,NAME=PATH for several"
            )
        yield name, file_texts(Path(path))


def _demo() -> tuple[Domain, ...]:
    from mxq import demo

    def texts(domain: str) -> Iterator[str]:
        # A document depends on its number alone, so asking for more repeats the first ones.
        for end in count(DEMO_DOCUMENTS, DEMO_DOCUMENTS):
            more = demo.documents("calibration", end, domain=domain)[-DEMO_DOCUMENTS:]
            yield from (document.text for document in more)

    return tuple(Domain(domain, texts(domain), STREAM_POOL_WINDOWS) for domain in demo.DOMAINS)


def _given(data: object) -> tuple[Domain, ...]:
    """Domains of Python data."""
    if not isinstance(data, Mapping) or "input_ids" in data:
        return (_given_domain("own data", data),)
    if not data:
        raise ValueError("the mapping of calibration domains is empty; give at least one domain")
    return tuple(_given_domain(str(name), value) for name, value in data.items())


def _given_domain(name: str, value: object) -> Domain:
    if isinstance(value, str):
        texts = file_texts(Path(value[5:])) if value.startswith("file:") else (value,)
        return Domain(name, texts, POOL_WINDOWS)
    if isinstance(value, Mapping) or is_ids(value):
        item = as_item(value, name)
        rows = isinstance(item, Tensor) and item.ndim == 2
        return Domain(name, item if rows else (item,), POOL_WINDOWS)
    if not isinstance(value, Iterable):
        raise ValueError(  # noqa: TRY004  (every mistake of the user is a ValueError)
            f"calibration domain {name!r} is a {type(value).__name__}; give texts, token ids or an "
            "iterable of them"
        )
    # An iterable that is not a sequence may be endless or costly: read no more than is used.
    return Domain(name, value, POOL_WINDOWS if isinstance(value, Sequence) else 1)


def _shares(samples: int, names: Sequence[str]) -> dict[str, int]:
    """How many samples each domain gives: equal numbers, the first ones one more if need be."""
    if len(set(names)) < len(names):
        raise ValueError(f"calibration domains {', '.join(names)} are not all different")
    if samples < len(names):
        raise ValueError(
            f"{counted(samples, 'sample')} cannot be shared between "
            f"{counted(len(names), 'domain')} ({', '.join(names)}); ask for at least {len(names)}"
        )
    whole, rest = divmod(samples, len(names))
    return {name: whole + (index < rest) for index, name in enumerate(names)}


def _written_by(model: Sampler | None, samples: int, cutter: Cutter) -> Tensor:
    """Samples that the model writes."""
    if model is None:
        raise ValueError(
            "calibration set 'self' is written by the model; pass it as model=, a function "
            "(batch, seqlen, generator) -> token ids"
        )
    batches = [
        model(min(SELF_BATCH, samples - start), cutter.seqlen, cutter.generator)
        for start in range(0, samples, SELF_BATCH)
    ]
    ids = torch.cat(batches).to("cpu", torch.int64)
    if ids.shape != (samples, cutter.seqlen):
        raise ValueError(
            f"the model wrote ids of shape {tuple(ids.shape)}; expected {(samples, cutter.seqlen)}"
        )
    return ids


def _assembled(windows: Mapping[str, Tensor], name: str) -> CalibrationSet:
    """One set of all domains, their samples in turn, so that its beginning holds them all."""
    lengths = {domain: ids.shape[1] for domain, ids in windows.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{domain} {length}" for domain, length in lengths.items())
        raise ValueError(f"samples of the domains differ in length ({listed}); give one seqlen")
    in_turn = sorted(
        (turn, place) for place, ids in enumerate(windows.values()) for turn in range(len(ids))
    )
    names, ids = tuple(windows), tuple(windows.values())
    rows = torch.stack([ids[place][turn] for turn, place in in_turn])
    return CalibrationSet(rows, tuple(names[place] for _, place in in_turn), name)


def _check_ids(ids: Tensor, vocab_size: int | None) -> None:
    wrong = (ids < 0) if vocab_size is None else (ids < 0) | (ids >= vocab_size)
    if wrong.any():
        sample, position = wrong.nonzero()[0].tolist()
        known = "" if vocab_size is None else f" of {vocab_size}"
        raise ValueError(
            f"token id {ids[sample, position]} (sample {sample}, position {position}) is outside "
            f"the vocabulary{known}; use the tokenizer that belongs to the model"
        )
