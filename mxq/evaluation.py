"""Score a causal language model on token ids, and compare it with a reference model.

The convention is that of published perplexities: a text is cut into windows that do not overlap,
each window is read on its own, and every token but the first of a window is scored.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mxq.models.claims import check_config
from mxq.models.files import checkpoint_files, read_json
from mxq.models.skeleton import load_whole

Loaded = TypeVar("Loaded")

DEFAULT_WINDOW = 2048

CHUNK_POSITIONS = 256
"""Positions whose log-probabilities exist at a time: 150 MB for a vocabulary of 150 000."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Distance to a reference model on the same positions.

    ``kl`` is the mean KL(reference || model) in nats per token, ``top1`` the share of positions
    where both hold the same token for the likeliest, ``nll`` that of the reference itself.
    """

    kl: float
    top1: float
    nll: float


@dataclass(frozen=True, slots=True)
class Score:
    """Mean negative log-likelihood in nats per token over the ``tokens`` that are scored."""

    tokens: int
    nll: float
    agreement: Agreement | None

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return math.exp(self.nll)


def score(
    model: PreTrainedModel, batches: Iterable[Tensor], *, reference: PreTrainedModel | None = None
) -> Score:
    """The score of a model over batches of windows [B, T]; logits are compared in float32.

    Raises:
        ValueError: If the reference has another vocabulary, or logits are not finite.
    """
    tokens, sums = 0, torch.zeros(4, dtype=torch.float64)
    for ids_BT in batches:
        logits_BTV = _logits(model, ids_BT)
        # A model is its own reference at distance 0, also where its kernels do not repeat exactly.
        other_BTV = logits_BTV
        if reference is not None and reference is not model:
            other_BTV = _logits(reference, ids_BT)
        sums += compare_logits(logits_BTV, other_BTV, ids_BT)
        tokens += ids_BT[:, 1:].numel()
    if not sums.isfinite().all():
        raise ValueError("the logits are not finite somewhere in the text; the model is broken")
    nll, other_nll, kl, same = (sums / tokens).tolist()
    return Score(tokens, nll, None if reference is None else Agreement(kl, same, other_nll))


@torch.inference_mode()
def _logits(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """Logits [B, T - 1, V] of the tokens after the first, in the model's type."""
    logits_BTV: Tensor = model(input_ids=ids_BT.to(model.device), use_cache=False).logits
    return logits_BTV[:, :-1]


def compare_logits(logits_BTV: Tensor, other_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Sums over positions: nll, the reference's nll, KL(reference || model), equal top tokens.

    Logits [B, T - 1, V] predict the tokens after the first of ``ids_BT``; float64 [4].
    """
    if other_BTV.shape[-1] != logits_BTV.shape[-1]:
        raise ValueError(
            f"the reference gives {other_BTV.shape[-1]} logits per token, the model "
            f"{logits_BTV.shape[-1]}; compare models of one vocabulary"
        )
    sums = torch.zeros(4, dtype=torch.float64)
    tensors = (logits_BTV, other_BTV, ids_BT[:, 1:].to(logits_BTV.device))
    chunks = (torch.split(tensor.flatten(0, 1), CHUNK_POSITIONS) for tensor in tensors)
    for logits_TV, other_TV, ids_T in zip(*chunks, strict=True):
        log_p_TV = logits_TV.float().log_softmax(-1)
        log_q_TV = other_TV.to(log_p_TV).log_softmax(-1)
        nll_T, other_nll_T = (-log_TV.gather(-1, ids_T[:, None]) for log_TV in (log_p_TV, log_q_TV))
        kl_T = (log_q_TV.exp() * (log_q_TV - log_p_TV)).sum(-1)
        same_T = log_p_TV.argmax(-1) == log_q_TV.argmax(-1)
        parts = (nll_T, other_nll_T, kl_T, same_T)
        sums += torch.stack([part_T.double().sum().cpu() for part_T in parts])
    return sums


def windows(ids_T: Tensor, window: int, batch: int = 1) -> tuple[Tensor, ...]:
    """Batches [B, window] of consecutive windows, and the rest as a batch of one shorter window.

    A rest of one token has nothing to score and is left out.

    Raises:
        ValueError: If a window, the batch or the text is too short.
    """
    require_counts(window, batch)
    if len(ids_T) < 2:
        raise ValueError(f"the text has {len(ids_T)} tokens; scoring needs at least 2")
    whole = len(ids_T) // window * window
    rest_T = ids_T[whole:]
    full = torch.split(ids_T[:whole].reshape(-1, window), batch) if whole else ()
    return (*full, *((rest_T[None],) if len(rest_T) > 1 else ()))


def require_counts(window: int | None, batch: int) -> None:
    """Refuse a window or a batch with which nothing can be scored; None is no window asked for.

    Raises:
        ValueError: With the number and the least one that works.
    """
    if window is not None and window < 2:
        raise ValueError(f"window is {window}; it takes 2 tokens to score one, so at least 2")
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")


def require_folder_of(path: Path | None) -> None:
    """Refuse a result file that could not be written, before the work and not after it.

    Raises:
        ValueError: If its folder does not exist.
    """
    if path is not None and not path.absolute().parent.is_dir():
        raise ValueError(f"result file {path} needs the folder {path.parent}; make it first")


def window_length(model: PreTrainedModel, asked: int | None) -> int:
    """The window asked for, else the smaller of 2048 and the positions that the model knows.

    Raises:
        ValueError: If the window asked for is longer than that.
    """
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if asked is None:
        return min(DEFAULT_WINDOW, known or DEFAULT_WINDOW)
    if known is not None and asked > known:
        raise ValueError(f"window {asked} is longer than the {known} positions of the model")
    return asked


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model: a hub id, a folder, or ``demo`` for the embedded model.

    Raises:
        ValueError: If it cannot be loaded; the message says why in one line.
    """
    load = partial(AutoTokenizer.from_pretrained, trust_remote_code=False)
    tokenizer: PreTrainedTokenizerBase = _loaded(load, name)
    return tokenizer


def load_model(name: str, *, device: str | None = None) -> PreTrainedModel:
    """A model in its own type, ready to run: a hub id, a folder, or ``demo``.

    ``device`` None means a GPU if there is one; ``auto`` spreads the model over all of them.

    Raises:
        ValueError: If it cannot be loaded; the message says why in one line.
    """
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    load = partial(load_whole, device_map=place)
    model: PreTrainedModel = _loaded(load, name)
    return model


def _loaded(load: Callable[[str], Loaded], name: str) -> Loaded:
    path = _resolved(name)
    try:
        return load(path)
    except Exception as error:
        # transformers and the configurations' own checks share no base class for "wrong".
        where = "" if Path(path).is_dir() else " is no folder here, and from the hub it"
        reason = " ".join(str(error).split())
        raise ValueError(f"model {name!r}{where} could not be loaded: {reason}") from error


def _resolved(name: str) -> str:
    """What ``from_pretrained`` is to be given for a name."""
    if name == "demo":
        from mxq import demo

        return str(demo.model_path())
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"model folder {name} holds no config.json; {_MODEL_MENU}")
    # A hub id is "model" or "owner/model"; everything else can only be meant as a path.
    is_path = path.is_absolute() or len(path.parts) > 2 or name.startswith((".", "~"))
    if path.is_file() or (is_path and not path.exists()):
        found = "is a file" if path.is_file() else "does not exist"
        raise ValueError(f"model folder {name} {found}; {_MODEL_MENU}")
    if not path.is_dir():
        return name
    # transformers reads the configuration for a tokenizer too, and would build what it claims.
    stored = any(path.glob("*.safetensors"))
    check_config(
        path / "config.json",
        read_json(path / "config.json"),
        checkpoint_files(path) if stored else (),
    )
    return str(path)


_MODEL_MENU = "give a folder as save_pretrained writes it, a hub id, or demo"


def require_same_vocabulary(
    tokenizer: PreTrainedTokenizerBase, reference: PreTrainedTokenizerBase, names: Sequence[str]
) -> None:
    """Refuse to compare models whose token ids mean different things.

    Raises:
        ValueError: With the two models and the difference.
    """
    ours, theirs = tokenizer.get_vocab(), reference.get_vocab()
    if ours != theirs:
        different = len(set(ours.items()) ^ set(theirs.items()))
        raise ValueError(
            f"{names[0]} and {names[1]} have other vocabularies ({len(ours)} and {len(theirs)} "
            f"tokens, {different} entries differ); the reference must be a model of the same tokens"
        )
