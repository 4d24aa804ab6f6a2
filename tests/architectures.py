"""Tiny random models of every architecture that the installed transformers knows, made by rule.

A configuration starts from the family's defaults, and each field whose name says that it is a size
is made small, in nested configurations too. What rules cannot know is in ``ODD``. Nothing here is a
list of what is tested: that is what ``discovered`` finds in transformers.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from tiny import randomize
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto

LAYERS = 2
VOCABULARY = 257
SPECIAL = 256
"""Every token id of a default configuration that is not of this vocabulary becomes this one."""

HEADS_KEYS = r"(swa_|linear_)?head_dim|v_head_dim|kv_channels|linear_(key|value)_head_dim"

SIZES: Mapping[str, int] = {
    r"num_hidden_layers|num_layers|n_layers?|encoder_layers|depth": LAYERS,
    r"hidden_size|d_model|embed_dim|n_embd|text_hidden_size|out_hidden_size|output_dim": 64,
    r"moe_hidden_size|projector_hidden_size|adapter_out_dim|decoder_dim": 64,
    r"merged_hidden_size|projection_hidden_dim|hidden_size_per_layer_input": 32,
    r"(dense_|encoder_|projection_)?intermediate_size|ffn_hidden_size|mlp_dim|encoder_ffn_dim": 64,
    r"(moe|expert|shared)_(\w+_)?intermediate_size|shared_intermediate_size": 32,
    r"expert_ffn_hidden_size|router_hidden_size": 32,
    r"(swa_)?num_attention_heads|n_heads?|num_heads|encoder_attention_heads": 4,
    r"(swa_)?num_key_value_heads": 2,
    rf"{HEADS_KEYS}|qk_(rope|nope)_head_dim|rotary_dim|global_head_dim": 16,
    r"qk_head_dim|index_head_dim": 32,
    r"\w+_lora_rank": 32,
    r"(n|num|moe_num)_(routed_|local_)?experts": 4,
    r"num_experts_per_tok(en)?|moe_k|moe_top_?k|top_k_experts": 2,
    r"(n|num|moe_num)_shared_experts|first_k_dense_replace|num_dense_layers": 1,
    r"n_groups?|topk_group|num_expert_group|o_groups": 1,
    r"linear_num_key_heads|index_n_heads": 2,
    r"linear_num_value_heads|linear_num_heads|mamba_num_heads": 4,
    r"mamba_d_head|mamba_head_dim|mamba_d_state|ssm_state_size|mamba_dt_rank": 16,
    r"mamba_n_heads": 8,
    r"vocab_size(_per_layer_input)?|unpadded_vocab_size": VOCABULARY,
    r"max_position_embeddings": 128,
    r"sliding_window(_size)?|index_topk|index_block_size|block_size|(mamba_)?chunk_size": 8,
    r"image_size|num_position_embeddings|position_embedding_size|rel_extent": 64,
    r"index_kpool": 4,
    r"downsample_hidden_size|hc_lowrank|output_channels": 16,
}
"""Values of fields by a pattern of the whole name; a default that is smaller stays."""

GIVEN_WHERE_ABSENT = r"head_dim|\w*num_\w*experts\w*|n_(routed|shared)_experts|moe_topk"
"""Fields that are set even where the default is None: without them a family cannot be built."""

_WITH_EXPERTS = {
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
    "num_global_key_value_heads": 2,
    "layer_types": ["sliding_attention", "full_attention"],
}
_INDEXED = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "layer_types": ["linear_attention", "full_attention"],
}


def _axes(*section: int, **more: float) -> dict[str, Any]:
    """Rotary positions of several axes; half the head's width in all."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section), **more}
    return {"rope_parameters": rope}


ODD: Mapping[str, Mapping[str, Any]] = {
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_top_k": 2},
    },
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [16, 64]},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "doge": {"is_moe": True},
    "diffusion_gemma_text": _WITH_EXPERTS,
    "dots3_note_vision_encoder": {"adapter_in_dim": 64},
    "dots3_note_audio_encoder": {"adapter_input_size": 64},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [32, 32], **_axes(3, 3, 2)},
    "gemma4_text": _WITH_EXPERTS,
    "glm4v_moe_text": _axes(2, 1, 1, partial_rotary_factor=0.5),
    "granitemoe_swa": {"shared_intermediate_size": 32},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "granitemoeshared": {"shared_intermediate_size": 32},
    "inkling_audio": {"mel_vocab_size": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mistral4": {"head_dim": 32},
    "muse_spark_audio": {"hidden_sizes": [32, 32], "depths": [1, 1], "patch_sizes": [4, 4]},
    "qwen4_exp_text": _INDEXED,
    "radio": {"video_temporal_patch_size": 2},
    "unlimited_ocr_sam_vision_model": {"downsample_channels": [16, 64]},
}
"""What the rules cannot know, by the type of a configuration, nested ones included."""

KEEP: Mapping[str, str] = {"jamba": "dt_proj"}
"""``--keep`` that a type needs with ``--scope all``: its code reads this weight without a call."""

DENSE = (
    "llama",
    "qwen2",
    "qwen3",
    "gemma3_text",
    "gemma3",
    "phi3",
    "mistral",
    "olmo2",
    "gpt_neox",
)
"""Families without experts, beside those that are discovered."""

_PATTERNS = tuple((re.compile(pattern), value) for pattern, value in SIZES.items())

AUTO_CLASSES: Mapping[str, Mapping[str, str]] = {
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForImageTextToText": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}


@cache
def discovered() -> tuple[str, ...]:
    """Types of language models in whose modeling file a class has the experts interface.

    A type is here if an auto class of ``AUTO_CLASSES`` has a model for it, and its own code or that
    of a nested configuration is such a file.
    """
    root = Path(transformers.__file__).parent / "models"
    marked = {
        path.parent.name
        for path in root.glob("*/modeling_*.py")
        if "@use_experts_implementation" in path.read_text(encoding="utf-8")
    }
    return tuple(
        name
        for name in CONFIG_MAPPING
        if auto_class_of(name) is not None and not marked.isdisjoint(_folders(name))
    )


@cache
def others_with_experts() -> tuple[str, ...]:
    """Types of language models whose configuration counts experts, without the interface."""
    return tuple(
        name
        for name in CONFIG_MAPPING
        if auto_class_of(name) is not None
        and name not in discovered()
        and any(_EXPERT_COUNT.fullmatch(str(field)) for part in _parts(name) for field in part)
    )


_EXPERT_COUNT = re.compile(r"(moe_)?num_(local_)?experts|n_routed_experts")


def _folders(model_type: str) -> set[str]:
    """The folders of transformers that hold the code of a type and of its nested parts."""
    types = {part.get("model_type") for part in _parts(model_type)} & set(CONFIG_MAPPING)
    return {CONFIG_MAPPING[name].__module__.split(".")[2] for name in {model_type, *types}}


@cache
def _parts(model_type: str) -> list[Mapping[str, Any]]:
    """The fields of a type's default configuration, and of those nested in it."""
    try:
        found: list[Mapping[str, Any]] = [CONFIG_MAPPING[model_type]().to_dict()]
    except StrictDataclassError:  # some have no valid default
        return []
    for part in found:
        found.extend(value for value in part.values() if isinstance(value, dict))
    return found


def auto_class_of(model_type: str) -> Any:
    """The auto class that builds the whole of a type, None if there is none."""
    names = [name for name, mapping in AUTO_CLASSES.items() if model_type in mapping]
    return getattr(transformers, names[-1]) if names else None


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """A configuration of two layers of width 64."""
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**{**_small_fields(config_class()), **changes})


def tiny_model(model_type: str, *, seed: int = 0, **changes: Any) -> Any:
    """A random model in float32, in evaluation mode; norms and biases are random too."""
    config = tiny_config(model_type, **changes)
    model = auto_class_of(model_type).from_config(config, dtype=torch.float32)
    randomize(model, seed=seed)
    return model.eval()


def _small_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a default configuration that are to change, with their small values."""
    nested = type(config).sub_configs or {}
    fields = {}
    raw = config.to_dict()
    for name, value in raw.items():
        if name not in nested:
            small = _small_value(name, value, raw.get("num_hidden_layers"))
            if small != value:
                fields[name] = small
    if isinstance(raw.get("kv_lora_rank"), int):  # latent attention has a key for each head
        fields["num_key_value_heads"] = 4
    for name in nested:
        part = getattr(config, name, None)
        if part is not None:
            fields[name] = type(part)(**_small_fields(part))
    return {**fields, **ODD.get(config.model_type, {})}


def _small_value(name: str, value: Any, layers: Any) -> Any:
    if isinstance(value, list | tuple):
        return _per_layer(name, value, layers)
    if value is None:
        return _size(name) if re.fullmatch(GIVEN_WHERE_ABSENT, name) else None
    if isinstance(value, int) and not isinstance(value, bool):
        is_token = re.search(r"token_(id|index)$", name) is not None
        return min(value, SPECIAL if is_token else _size(name) or value)
    return value


def _size(name: str) -> int | None:
    return next((size for pattern, size in _PATTERNS if pattern.fullmatch(name)), None)


def _per_layer(name: str, value: Sequence[Any], layers: Any) -> Any:
    """The first and the last of a list with an entry for each layer."""
    if len(value) != layers or layers <= LAYERS:
        return (
            [index for index in value if index < LAYERS - 1] if name.endswith("_layers") else value
        )
    small = [value[0], value[-1]]
    return [min(v, i) if v == layers - 1 else v for i, v in enumerate(small)]
