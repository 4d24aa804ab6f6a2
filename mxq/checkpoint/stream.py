"""A packed checkpoint of which one decoder layer at a time is in memory.

The skeleton, the checks and the packed modules are those of ``from_pretrained``; only the layers
are read when their turn comes. What runs is what was written.
"""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from mxq.checkpoint.engine import packed_modules
from mxq.checkpoint.format import CheckpointPlan
from mxq.checkpoint.load import MxqConfig, check_files, check_tensors, swap_modules
from mxq.compute import CPU
from mxq.models.skeleton import build_skeleton
from mxq.models.source import ModelSource


def open_packed(folder: Path, dtype: torch.dtype, device: torch.device = CPU) -> ModelSource:
    """A checkpoint written by mxq, computing in ``dtype`` on ``device``, without any decoder layer.

    Weights are decoded for each call on every device, so the type is the one that was asked for.

    Raises:
        ValueError: If the folder is not such a checkpoint, or a file is absent or was changed.
    """
    config, plan = read_plan(folder)
    model = checked_model(folder, config, plan, dtype)
    for module in packed_modules(model):
        module.engine = "decoded"
    return ModelSource(folder, model, dtype, converts=False, device=device)


def read_plan(folder: Path) -> tuple[PreTrainedConfig, CheckpointPlan]:
    """The configuration of a checkpoint's original model, and the plan.

    Raises:
        ValueError: If the folder is not a checkpoint of mxq.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    packed = getattr(config, "quantization_config", None)
    if not isinstance(packed, dict) or packed.get("quant_method") != "mxq":
        raise ValueError(f"{folder} is not a checkpoint of mxq")
    plan = MxqConfig(**packed).plan()
    del config.quantization_config
    config.transformers_weights = None
    return config, plan


def checked_model(
    folder: Path, config: PreTrainedConfig, plan: CheckpointPlan, dtype: torch.dtype
) -> PreTrainedModel:
    """The module tree with packed modules on the meta device, which is what the files hold.

    Raises:
        ValueError: If a file is absent or was changed, or does not fit the plan.
    """
    model = build_skeleton(config, dtype)
    paths = sorted(folder.glob("*.safetensors"))
    check_files(plan, paths)
    swap_modules(model, plan, dtype)
    check_tensors(model, paths)
    return model


def share_equal(model: nn.Module, other: nn.Module) -> None:
    """Let a model's parameters outside its layers be those of ``other`` where they are equal.

    Two models that were read from files and hold the same embeddings then hold them once.
    """
    known = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        twin = known.get(name)
        if parameter.is_meta or twin is None or twin.is_meta or twin.shape != parameter.shape:
            continue
        if twin.dtype == parameter.dtype and torch.equal(twin, parameter):
            parameter.data = twin.data
