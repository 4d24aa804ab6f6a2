"""The module tree of a language model, without weights: its class, and its decoder layers.

Which class builds a model is transformers' choice, and where the decoder layers are is read from
the tree; no family is known here.
"""

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from mxq.models.claims import check_folder

EXPERTS_FUNCTION = "mxq"
"""Name under which mxq's experts function is registered with transformers."""


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The module tree on the meta device, its experts going through mxq's experts function."""
    auto = auto_class(config)
    try:
        with torch.device("meta"):
            model = auto.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:
        # A damaged configuration fails anywhere in the modeling code.
        said = " ".join(str(error).split())
        raise ValueError(
            f"transformers cannot build a {type(config).__name__} of these sizes: {said}; "
            "config.json is damaged, or needs another version of transformers"
        ) from error
    # A wrapper from another file than its language part does not pass the choice down.
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part._can_set_experts_implementation():
            part.set_experts_implementation(EXPERTS_FUNCTION)
    return cast(PreTrainedModel, model.eval())


def auto_class(config: PreTrainedConfig) -> Any:
    """The auto class whose ``from_pretrained`` builds the model that the files hold.

    Where transformers has several models for a configuration, the one that ``architectures`` names
    wrote the files: the whole model, say, and not its language part alone.

    Raises:
        ValueError: If transformers has no language model for this configuration.
    """
    named = set(config.architectures or ())
    found = []
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            model: Any = auto._model_mapping[type(config)]
            if model.__name__ in named:
                return auto
            found.append(auto)
    if not found:
        raise ValueError(
            f"transformers has no causal language model for {type(config).__name__}, nor one that "
            "turns images and text into text; give the folder of a language model"
        )
    return found[0]


def load_whole(model: str | Path, **options: object) -> PreTrainedModel:
    """``from_pretrained`` of the auto class that the configuration asks for.

    Raises:
        ValueError: If a folder claims more than it holds; see ``claims.py``.
    """
    if Path(model).is_dir():
        check_folder(Path(model))
    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    auto = auto_class(config)
    whole = auto.from_pretrained(model, use_safetensors=True, trust_remote_code=False, **options)
    return cast(PreTrainedModel, whole)


def find_decoder_layers(model: PreTrainedModel) -> tuple[str, tuple[nn.Module, ...]]:
    """The longest list of decoder layers of the language part, with its path."""
    decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]  # of transformers
    path = next((name for name, module in model.named_modules() if module is decoder), "")
    best: tuple[str, tuple[nn.Module, ...]] | None = None
    for name, module in decoder.named_modules(prefix=path):
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        are_layers = all(isinstance(item, GradientCheckpointingLayer) for item in module)
        if are_layers and (best is None or len(module) > len(best[1])):
            best = (name, tuple(module))
    if best is None:
        raise ValueError(f"{type(model).__name__} has no list of decoder layers that mxq can find")
    _check_layers_are_their_own(model, best[0])
    return best


def _check_layers_are_their_own(model: PreTrainedModel, layers_name: str) -> None:
    """Raise ValueError if a decoder layer shares a weight: one layer at a time is in memory."""
    tied = model.all_tied_weights_keys or {}
    shared = sorted(n for pair in tied.items() for n in pair if n.startswith(f"{layers_name}."))
    if shared:
        raise ValueError(
            f"the decoder layers of {type(model).__name__} share weights with each other or with "
            f"another part of the model, first {shared[0]!r}; mxq does not quantize such models"
        )
