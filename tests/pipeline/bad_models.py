"""Models that are damaged, hostile or only odd, and what mxq answers: see ``bad_case.py``."""

from collections.abc import Mapping

import damage
import torch
from bad_case import RUN, Case

WEIGHTS: Mapping[str, Case] = {
    "no weights": Case(
        ("model has no model.safetensors and no index; only safetensors are read", "save_pretrain"),
        mistake=damage.remove("model/model.safetensors"),
    ),
    "empty weights": Case(
        ("model.safetensors is not a whole safetensors file", "copy or download it again"),
        mistake=damage.write("model/model.safetensors", b""),
    ),
    "weights cut in the tensors": Case(
        ("model.safetensors is not a whole safetensors file", "copy or download it again"),
        mistake=damage.cut("model/model.safetensors", -100),
    ),
    "weights cut in the header": Case(
        ("model.safetensors is not a whole safetensors file", "copy or download it again"),
        mistake=damage.cut("model/model.safetensors", 100),
    ),
    "a flipped bit in the header": Case(
        ("model.safetensors is not a whole safetensors file", "copy or download it again"),
        mistake=damage.flip("model/model.safetensors", 8),
    ),
    "a flipped bit in the length of the header": Case(
        ("model.safetensors is not a whole safetensors file", "copy or download it again"),
        mistake=damage.flip("model/model.safetensors", 7),
    ),
    "a header that claims 2^60 elements": Case(
        ("model.safetensors is not a whole safetensors file", "copy or download it again"),
        mistake=damage.header(lambda h: h["lm_head.weight"].update(shape=[2**30, 2**30])),
    ),
    "a header with an unknown type": Case(
        ("model.safetensors is not a whole safetensors file", "copy or download it again"),
        mistake=damage.header(lambda h: h["lm_head.weight"].update(dtype="F7")),
    ),
    "a weight of integers": Case(
        ("model.layers.0.self_attn.q_proj.weight",),
        mistake=damage.tensor(
            "model.layers.0.self_attn.q_proj.weight", lambda w: (100 * w).to(torch.int32)
        ),
    ),
    "a weight of another shape": Case(
        ("model.layers.0.self_attn.q_proj.weight",),
        mistake=damage.tensor("model.layers.0.self_attn.q_proj.weight", lambda w: w[:, :-1]),
    ),
    "a weight that is absent": Case(
        ("lacks 1 weight of its own architecture, first 'model.layers.1.self_attn.o_proj.weight",),
        mistake=damage.tensor("model.layers.1.self_attn.o_proj.weight", lambda w: None),
    ),
    "an expert that is absent": Case(
        ("experts.gate_up_proj is made from 5 tensors", "needs 6; the checkpoint is incomplete"),
        mistake=damage.tensor("model.layers.1.mlp.experts.3.up_proj.weight", lambda w: None),
    ),
    "NaN in an expert": Case(
        ("layers.1.experts.2.down: 1 of 2048 values are NaN or infinite",),
        mistake=damage.tensor(
            "model.layers.1.mlp.experts.2.down_proj.weight", damage.value(float("nan"))
        ),
    ),
    "infinity in attention": Case(
        ("model.layers.0.self_attn.k_proj.weight: 1 of 2048 values are NaN or infinite",),
        mistake=damage.tensor("model.layers.0.self_attn.k_proj.weight", damage.value(float("inf"))),
    ),
    "NaN in a norm": Case(
        ("model.layers.1.input_layernorm.weight: 1 of 64 values are NaN or infinite",),
        mistake=damage.tensor("model.layers.1.input_layernorm.weight", damage.value(float("nan"))),
    ),
    "NaN in the embedding": Case(
        ("model.embed_tokens.weight: 1 of",),
        mistake=damage.tensor("model.embed_tokens.weight", damage.value(float("nan"), 255, 0)),
    ),
    "NaN in the head": Case(
        ("lm_head.weight: 1 of",),
        mistake=damage.tensor("lm_head.weight", damage.value(float("nan"))),
    ),
    "NaN in the head, text by the model": Case(
        ("lm_head.weight: 1 of",),
        RUN + " --calibration self",
        mistake=damage.tensor("lm_head.weight", damage.value(float("nan"))),
    ),
    "weights that overflow": Case(
        ("layers.0",),
        mistake=damage.tensor(
            "model.layers.0.mlp.shared_expert.up_proj.weight", lambda w: 1e38 * w
        ),
    ),
    "weights that overflow, text by the model": Case(
        ("logits of", "are not finite while it writes calibration text", "give text of your own"),
        RUN + " --calibration self",
        damage.tensor("lm_head.weight", lambda w: 1e38 * w),
    ),
    "an expert that no token reaches": Case(
        ("experts got no token at all", "e.g. layers.0.experts.4"),
        mistake=damage.unreached_experts,
        status=0,
    ),
    "an expert that no token reaches, by gradients": Case(
        ("experts got no token at all", "e.g. layers.0.experts.4"),
        RUN + " --sensitivity fisher --quantizer gptq",
        mistake=damage.unreached_experts,
        status=0,
    ),
    "a layer with activations of zero": Case(
        ("Written to",),
        RUN + " --sensitivity fisher --quantizer gptq",
        mistake=damage.silent_layer,
        status=0,
    ),
}

FOLDERS: Mapping[str, Case] = {
    "an index that names an absent file": Case(
        ("c.safetensors is named by the index but absent; the download is incomplete",),
        mistake=damage.index(damage.rename("a.safetensors", "c.safetensors")),
    ),
    "an index that leaves the folder": Case(
        ("names '../a.safetensors', which is outside the folder",),
        mistake=damage.beside("../a.safetensors"),
    ),
    "an index with an absolute path": Case(
        ("a.safetensors', which is outside the folder",),
        mistake=damage.beside("{root}/a.safetensors"),
    ),
    "an index that names a folder": Case(
        ("outside the folder",),
        mistake=damage.index(damage.rename("a.safetensors", "..")),
    ),
    "an index that names the empty text": Case(
        ("names '', which is outside the folder",),
        mistake=damage.index(damage.rename("a.safetensors", "")),
    ),
    "an index with numbers for files": Case(
        ("is not a safetensors index",),
        mistake=damage.index(damage.rename("a.safetensors", 7)),
    ),
    "an index that is a list": Case(
        ("is not a safetensors index",),
        mistake=damage.index(list),
    ),
    "an index without files": Case(
        ("index.json is not a safetensors index: weight_map names no files",),
        mistake=damage.index(lambda files: {}),
    ),
    "an index with a tensor that its file lacks": Case(
        ("says that a.safetensors holds model.embed_tokens.weight, but it does not",),
        mistake=damage.index(lambda files: dict.fromkeys(files, "a.safetensors")),
    ),
    "an index that is no JSON": Case(
        ("model.safetensors.index.json is not a safetensors index",),
        mistake=damage.together(
            damage.index(dict), damage.cut("model/model.safetensors.index.json", -20)
        ),
    ),
    "weights that are a link to outside": Case(
        ("model.safetensors", "link", "outside"),
        mistake=damage.link_outside("model/model.safetensors"),
    ),
    "a tokenizer that is a link to outside": Case(
        ("tokenizer.json", "link", "outside"),
        mistake=damage.link_outside("model/tokenizer.json"),
    ),
    "a snapshot of the hub, all of links": Case(
        ("Written to",),
        RUN.replace("{model}", "{root}/hub/snapshots/1f"),
        damage.snapshot_of_the_hub,
        status=0,
    ),
    "no config": Case(
        ("has no config.json: it is not a Hugging Face model folder",),
        mistake=damage.remove("model/config.json"),
    ),
    "a config that is no JSON": Case(
        ("config.json",),
        mistake=damage.cut("model/config.json", -5),
    ),
    "a config that is a list": Case(
        ("config.json",), mistake=damage.write("model/config.json", "[]")
    ),
    "a config nested 100000 deep": Case(
        ("config.json",), mistake=damage.write("model/config.json", "[" * 100_000)
    ),
    "a config without a family": Case(
        ("cannot be read by transformers: it is for model type None",),
        mistake=damage.config(model_type=None),
    ),
    "an unknown family": Case(("nonesuch",), mistake=damage.config(model_type="nonesuch")),
    "a family of code in the folder": Case(
        ("auto_map", "runs no code of a checkpoint"),
        mistake=damage.together(
            damage.config(model_type="nonesuch", auto_map={"AutoConfig": "own.Config"}),
            damage.write("model/own.py", "raise SystemExit('code of the folder has run')"),
        ),
    ),
    "a known family with code in the folder": Case(
        ("Written to",),
        mistake=damage.together(
            damage.config(auto_map={"AutoModelForCausalLM": "own.Model", "AutoConfig": "own.C"}),
            damage.config("model/tokenizer_config.json", auto_map={"AutoTokenizer": "own.T"}),
            damage.write("model/own.py", "raise SystemExit('code of the folder has run')"),
        ),
        status=0,
    ),
    "an encoder": Case(
        ("causal language model",),
        mistake=damage.config(model_type="distilbert"),
    ),
    "a billion layers": Case(
        ("num_hidden_layers", "1000000000"), mistake=damage.config(num_hidden_layers=10**9)
    ),
    "a billion layers under another name": Case(
        ("n_layer", "1000000000"), mistake=damage.config(n_layer=10**9, model_type="gpt2")
    ),
    "a billion experts": Case(
        ("num_experts", "1000000000"), mistake=damage.config(num_experts=10**9)
    ),
    "a trillion tokens": Case(
        ("vocab_size", "1000000000000"), mistake=damage.config(vocab_size=10**12)
    ),
    "a width of a trillion": Case(
        ("hidden_size", "1000000000000"), mistake=damage.config(hidden_size=10**12)
    ),
    "a head of a trillion": Case(("head_dim",), mistake=damage.config(head_dim=10**12)),
    "an activation that does not exist": Case(
        ("transformers cannot build a Qwen2MoeConfig of these sizes", "config.json is damaged"),
        mistake=damage.config(hidden_act="nonesuch"),
    ),
    "sizes that do not fit each other": Case(
        ("config.json",),
        mistake=damage.config(num_attention_heads=0),
    ),
    "a layer more than the files hold": Case(
        ("weights of its own architecture, first 'model.layers.2.",),
        mistake=damage.config(num_hidden_layers=3, layer_types=None),
    ),
    "a layer less than the files hold": Case(
        ("the files hold layer 1 (model.layers.1.", "describes 1 layer; num_hidden_layers there"),
        mistake=damage.config(num_hidden_layers=1, layer_types=None),
    ),
    "layers of more types than there are": Case(
        ("config.json cannot be read by transformers", "`layer_types`"),
        mistake=damage.config(num_hidden_layers=3),
    ),
    "an attention that the hub is to deliver": Case(
        ("Written to",),
        mistake=damage.config(
            attn_implementation="kernels-community/none", _attn_implementation="some/kernel"
        ),
        status=0,
    ),
    "a model of another quantizer": Case(
        ("is already quantized (awq); give the original model",),
        mistake=damage.config(quantization_config={"quant_method": "awq", "bits": 4}),
    ),
    "a checkpoint of mxq": Case(
        ("is already quantized (mxq); give the original model",),
        RUN.replace("{model}", "{packed}"),
    ),
    "a model that does not exist": Case(
        ("absent is not a folder; give a model folder or a hub id",),
        RUN.replace("{model}", "{root}/absent"),
    ),
    "a model that is a file": Case(
        ("text.txt is not a folder; give a model folder or a hub id",),
        RUN.replace("{model}", "{text}"),
    ),
    "a revision of a folder": Case(("revision",), RUN + " --revision main"),
}
