"""Names and arrangement of weights in the files of the original model.

mxq stores weights under the paths of transformers' module tree, expert by expert; other tools look
for the names that the original has. Both ways are transformers' own: what follows is what its
``save_pretrained`` does with a model.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from mxq.checkpoint.export.packed import PackedBlock
from mxq.models.experts import (
    Experts,
    expert_count,
    expert_weight,
    is_fused_experts,
    projection_shapes,
)

_INNER, _OUTER = 2, 3
"""Features of an expert in a marker: unequal, so that a transposed one is told apart."""


@dataclass(frozen=True, slots=True)
class Stored:
    """The original's files as transformers writes them: ``shapes`` of all tensors by name."""

    model: PreTrainedModel
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Stored":
        """For a module tree on the meta device."""
        tensors = _revert(model, model.state_dict())
        return cls(model, {name: tuple(tensor.shape) for name, tensor in tensors.items()})

    def restore(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by their names in the module tree -> those of the files.

        Raises:
            ValueError: If they are not what the files have: a part of a tensor is missing, say.
        """
        restored = _revert(self.model, tensors)
        for name, tensor in restored.items():
            if self.shapes.get(name) != tuple(tensor.shape):
                raise ValueError(
                    f"{name} {list(tensor.shape)} is not what transformers saves of a "
                    f"{type(self.model).__name__} ({self.shapes.get(name, 'no such tensor')}); "
                    "this model cannot be exported in this format"
                )
        return restored

    def modules_of(self, paths: Iterable[str]) -> list[str]:
        """Stored modules of those paths in the module tree that hold a weight."""
        weights = {f"{path}.weight" for path in paths}
        state = self.model.state_dict()
        stored = _revert(self.model, {name: state[name] for name in state if name in weights})
        return [name.removesuffix(".weight") for name in stored if name.endswith(".weight")]


def stored_modules(model: PreTrainedModel, blocks: Iterable[PackedBlock]) -> dict[str, str]:
    """``{path of a block: its module in files of the original}``.

    A block is absent if its weight is no tensor [N, K] of its own there: because the files have all
    experts of a layer in one tensor, say.
    """
    state = dict(model.state_dict())
    linears = [block.path for block in blocks if block.experts is None]
    # What is only renamed comes back as the same object.
    found = {id(state[f"{path}.weight"]): path for path in linears}
    marks: dict[int, tuple[str, Tensor]] = {}
    for path, module in model.named_modules():
        if is_fused_experts(module):
            small = _marked(module, len(marks) * _INNER * _OUTER)
            state |= {f"{path}.{name}": p.detach() for name, p in small.named_parameters()}
            marks |= _marks(path, small)
    names = {}
    for name, tensor in _revert(model, state).items():
        stored, _, leaf = name.rpartition(".")
        block_path = found.get(id(tensor)) or _marked_path(tensor, marks)
        if leaf == "weight" and block_path is not None:
            names[block_path] = stored
    return names


def _revert(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    try:
        stored = revert_weight_conversion(model, dict(tensors))
    except Exception as error:
        # The conversions of families share no base class for "cannot".
        said = " ".join(str(error).split())
        raise ValueError(
            f"transformers cannot give the tensors of a {type(model).__name__} the names that the "
            f"original's files have: {said}"
        ) from error
    return dict(stored)


def _marked(module: nn.Module, first: int) -> nn.Module:
    """Experts with the flags of a module, whose weights are small and count from ``first``.

    Names and order of parts do not depend on sizes, and real ones would fill a layer's memory.
    """
    flags, experts = cast(Experts, module), expert_count(module)
    shapes = {"down_proj": (_OUTER, _INNER)}
    if flags.has_gate:
        shapes["gate_up_proj"] = (2 * _INNER, _OUTER)
    else:
        shapes["up_proj"] = (_INNER, _OUTER)
    small = copy.copy(module)
    small._parameters, small._modules = {}, {}
    for name, (n, k) in shapes.items():
        count = torch.arange(first, first + experts * n * k)
        first += experts * n * k
        stored = count.view(experts, *((k, n) if flags.is_transposed else (n, k)))
        small._parameters[name] = nn.Parameter(stored, requires_grad=False)
    return small


def _marks(path: str, small: nn.Module) -> dict[int, tuple[str, Tensor]]:
    """Path and weight of each projection of marked experts, by the weight's first value."""
    found = {}
    for expert in range(expert_count(small)):
        for projection in projection_shapes(small):
            w_NK = expert_weight(small, expert, projection).detach()
            found[int(w_NK[0, 0])] = (f"{path}.{expert}.{projection}_proj", w_NK)
    return found


def _marked_path(tensor: Tensor, marks: Mapping[int, tuple[str, Tensor]]) -> str | None:
    """The path whose marked weight a tensor is, None if it is none."""
    if tensor.is_meta or tensor.dim() != 2:
        return None
    path, w_NK = marks.get(int(tensor[0, 0]), (None, None))
    return path if w_NK is not None and torch.equal(w_NK, tensor) else None
