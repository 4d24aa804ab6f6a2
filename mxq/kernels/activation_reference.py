"""Definitions of the operations between the products, in plain torch.

Inputs in every kind are defined by ``reference.make_inputs_torch``.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def relu2(x: Tensor) -> Tensor:
    """The square of the positive part."""
    return F.relu(x).square()


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": relu2,
    "identity": lambda x: x,
}
"""What each name of ``activation.Activation`` computes."""


def sum_slices_torch(
    z_SN: Tensor,
    partial_CSN: Tensor | None,
    splits_P: Tensor,
    experts_S: Tensor,
    parts: int = 1,
) -> Tensor:
    """Results of all problems, bfloat16 [S, N]; 0 in unused slots.

    A split problem is the sum of its slices in order, in float32, rounded once; an expert has
    ``parts`` problems of equal width.
    """
    out_SN = torch.zeros_like(z_SN)
    width = z_SN.shape[1] // parts
    for slot, expert in enumerate(experts_S.tolist()):
        for part in range(parts if expert >= 0 else 0):
            columns = slice(part * width, (part + 1) * width)
            split = int(splits_P[expert * parts + part])
            if split == 1 or partial_CSN is None:
                out_SN[slot, columns] = z_SN[slot, columns]
                continue
            total = torch.zeros(width, device=z_SN.device)
            for number in range(split):
                total += partial_CSN[number, slot, columns]
            out_SN[slot, columns] = total.to(torch.bfloat16)
    return out_SN


def gate_torch(z_SN: Tensor, activation: str, gated: bool = True) -> Tensor:
    """act(gate) * up in float32, rounded once to bfloat16; the gate is the first half."""
    function = ACTIVATIONS[activation]
    z = z_SN.to(torch.float32)
    if not gated:
        return function(z).to(torch.bfloat16)
    gate, up = z.chunk(2, dim=-1)
    return (function(gate) * up).to(torch.bfloat16)


def combine_torch(z_SN: Tensor, slots_TR: Tensor, weights_TR: Tensor) -> Tensor:
    """Weighted sum of the experts of each token: float32 in order, rounded once to bfloat16."""
    total = torch.zeros(slots_TR.shape[0], z_SN.shape[1], device=z_SN.device)
    for r in range(slots_TR.shape[1]):
        used_T1 = slots_TR[:, r, None] >= 0
        term = weights_TR[:, r, None].to(torch.float32) * z_SN[slots_TR[:, r].long().clamp(min=0)]
        total += torch.where(used_T1, term, 0.0)
    return total.to(torch.bfloat16)
