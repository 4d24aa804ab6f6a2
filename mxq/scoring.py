"""Losses of a causal language model from its logits, and its distance to a reference's logits.

The convention is that of published perplexities: a text is cut into windows that do not overlap,
each window is read on its own, and every token but the first of a window is scored.
"""

import torch
from torch import Tensor

from mxq.counted import counted

CHUNK_POSITIONS = 256
"""Positions whose log-probabilities exist at a time: 150 MB for a vocabulary of 150 000."""


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
        raise ValueError(f"the text has {counted(len(ids_T), 'token')}; scoring needs at least 2")
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
