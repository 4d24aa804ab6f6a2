"""Tiny random models of many families, saved as folders that ``from_pretrained`` loads.

Every parameter and buffer is random, biases and norms included, so that one that a test forgets
changes the logits. Two decoder layers of width 64, four experts of width 32, two of them taken.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 257
"""One id for each byte, and the end of a text."""

_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_ROUTED = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
_DEEPSEEK = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "qwen2_moe": {**_ROUTED, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    "qwen3_moe": {**_ROUTED, "head_dim": 16},
    "mixtral": {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "gpt_oss": {
        "intermediate_size": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "nemotron_h": {
        "layers_block_type": ["moe", "attention"],
        "head_dim": 16,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "llama": {},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
}
"""What each family's configuration has beside the common fields; the last two are dense."""

MOE_FAMILIES = tuple(name for name in FAMILIES if name not in ("llama", "qwen3"))


def make_model(family, *, seed=0, **changes):
    """A random model in float32, in evaluation mode."""
    fields = {**_COMMON, **FAMILIES[family], **changes}
    if "layers_block_type" in fields:
        del fields["num_hidden_layers"]
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**fields), dtype=torch.float32)
    randomize(model, seed=seed)
    return model.eval()


def randomize(model, *, seed):
    """Give every parameter, and the buffers that files hold, random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            # Wide enough that the predictions of a random model are far from uniform.
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(0.15 * noise)
            else:
                parameter.add_(0.1 * noise)
        for name, buffer in sorted(model.named_buffers()):
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))


def save_tiny(
    folder, family="qwen2_moe", *, seed=0, dtype=torch.float32, tokenizer=True, **changes
):
    """Save a random model, with a byte tokenizer unless told otherwise; the folder."""
    folder = Path(folder)
    make_model(family, seed=seed, **changes).to(dtype).save_pretrained(folder)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer():
    """Ids 0 to 255 are the bytes of a text in GPT-2's spelling, 256 ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)} | {"<eos>": 256}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def token_ids(samples, seqlen, *, seed=0):
    """Random token ids [samples, seqlen]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY - 1, (samples, seqlen), generator=generator)


def logits_of(model, ids):
    """Logits of a model of transformers, without a graph."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits
