"""Checkpoints: what keeps its type when loaded, and what is refused."""

import copy
import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from checkpoints import edit_config, tensors_of, write_checkpoint
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file
from tiny import logits_of, save_tiny, token_ids
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.utils import hub

from mxq.quantizers import quantize_gptq, quantize_rtn


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    source = save_tiny(tmp_path_factory.mktemp("moe"), "qwen2_moe", dtype=torch.bfloat16)
    return write_checkpoint(source, tmp_path_factory.mktemp("packed-moe"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    source = save_tiny(tmp_path_factory.mktemp("dense"), "llama")
    return write_checkpoint(source, tmp_path_factory.mktemp("packed-dense"))


@pytest.fixture
def copied(dense, tmp_path):
    """A copy of the dense checkpoint that a test may damage."""
    return Path(shutil.copytree(dense, tmp_path / "copy"))


IDS = token_ids(2, 8, seed=5)


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def first_shard(folder):
    return next(iter(sorted(folder.glob("model-layer-*.safetensors"))))


# What linears are fitted to


def test_linears_that_read_parts_of_one_tensor_are_fitted_to_their_own(tmp_path, monkeypatch):
    def write(name, part):
        def forward(mlp, x):
            # Two views of one storage, unless the part is made a tensor of its own.
            gate, up = (part(half) for half in torch.cat([x, x.flip(-1).square()]).chunk(2))
            return mlp.down_proj(mlp.act_fn(mlp.gate_proj(gate)) * mlp.up_proj(up))

        monkeypatch.setattr(LlamaMLP, "forward", forward)
        menu = "w3a16_g32_asym"
        folder = write_checkpoint(source, tmp_path / name, menu=menu, quantizer=quantize_gptq)
        return tensors_of(folder)[0]

    source = save_tiny(tmp_path / "source", "llama")
    views, own = write("views", lambda half: half), write("own", torch.clone)
    assert views.keys() == own.keys()
    assert [name for name in own if not torch.equal(views[name], own[name])] == []


# What is loaded


def test_a_cast_of_the_model_leaves_codes_and_scales_alone(moe):
    model = load(moe)
    tensors, _ = tensors_of(moe)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        held = dict(model.to(dtype).named_parameters())
        stored = [name for name in tensors if ".weight_" in name]
        assert len(stored) > 40
        for name in stored:
            assert held[name].dtype == tensors[name].dtype, name
            assert torch.equal(held[name].view(torch.uint8), tensors[name].view(torch.uint8)), name
    assert model.model.norm.weight.dtype == torch.float64


def test_a_checkpoint_loads_in_the_type_asked_for_and_scales_stay_float16(moe):
    model = load(moe, torch.bfloat16)
    held = dict(model.named_parameters())
    scales = {p.dtype for name, p in held.items() if name.endswith("weight_scale")}
    assert scales == {torch.float16}
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert logits_of(model, token_ids(1, 8)).dtype == torch.bfloat16


def test_what_is_kept_has_the_type_of_the_source(moe):
    tensors, _ = tensors_of(moe)
    kept = [tensor for name, tensor in tensors.items() if ".experts." not in name]
    kept_types = {
        t.dtype for n, t in tensors.items() if n.endswith(("norm.weight", "q_proj.weight"))
    }
    assert kept_types == {torch.bfloat16}
    assert len(kept) > 20


def test_a_layer_called_for_its_weight_decodes_it(dense):
    model = load(dense)
    linear = next(m for m in model.modules() if type(m).__name__ == "MxqLinear" and m.rotated)
    x = torch.randn(5, linear.in_features, generator=torch.Generator().manual_seed(0))
    by_weight = torch.nn.functional.linear(x, linear.weight, linear.bias)
    # Rounding of inputs apart, which only the call does.
    if linear.scheme.a_bits == 16:
        assert torch.allclose(by_weight, linear(x), atol=1e-5)
    assert linear.weight.shape == (linear.out_features, linear.in_features)


# Saving a loaded model


def test_save_pretrained_writes_the_same_checkpoint(moe, tmp_path):
    model = load(moe)
    model.generation_config.max_length = 77
    model.save_pretrained(tmp_path / "again")
    for path in [*moe.glob("*.safetensors*"), moe / "config.json"]:
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    again = load(tmp_path / "again")
    ids = token_ids(2, 8)
    assert torch.equal(logits_of(again, ids), logits_of(load(moe), ids))
    assert again.generation_config.max_length == 77


def test_a_model_is_saved_over_the_folder_that_it_was_loaded_from(copied):
    before = {path.name: path.read_bytes() for path in copied.glob("*.safetensors")}
    load(copied).save_pretrained(copied)
    assert {path.name: path.read_bytes() for path in copied.glob("*.safetensors")} == before


def test_a_deep_copy_is_saved_for_itself(dense, tmp_path):
    model = load(dense)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight += 1
    model.save_pretrained(tmp_path / "first")
    with pytest.raises(ValueError, match=r"model\.norm\.weight was changed since"):
        other.save_pretrained(tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_a_saved_model_does_not_outlive_its_last_name(dense):
    model = weakref.ref(load(dense))
    assert model() is None


@pytest.mark.parametrize("change", ["weights", "config.json", "shard"])
def test_a_model_whose_files_are_gone_or_others_is_not_saved(dense, copied, tmp_path, change):
    model = load(copied)
    if change == "weights":
        with torch.no_grad():
            model.model.embed_tokens.weight[3, 5] += 1
    elif change == "shard":
        first_shard(copied).unlink()
    else:
        edit_config(copied, lambda fields: fields["quantization_config"]["files"].popitem())
    expected = "embed_tokens.weight was changed" if change == "weights" else "is gone or holds anot"
    with pytest.raises(ValueError, match=expected):
        model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_saving_with_push_to_hub_uploads_what_was_saved(moe, tmp_path, monkeypatch):
    api = Mock(**{"create_repo.return_value.repo_id": "me/it"})
    monkeypatch.setattr("mxq.checkpoint.save.HfApi", lambda token: api)
    load(moe).save_pretrained(tmp_path / "it", push_to_hub=True, private=True, token=None)
    api.create_repo.assert_called_once_with("it", exist_ok=True, private=True)
    [call] = api.upload_folder.call_args_list
    assert (call.kwargs["folder_path"], call.kwargs["repo_id"]) == (tmp_path / "it", "me/it")


def set_bias(model):
    next(p for name, p in model.named_parameters() if name.endswith("q_proj.bias")).data.add_(1)


def set_scale(model):
    next(p for name, p in model.named_parameters() if name.endswith("weight_scale")).data.mul_(2)


def untie(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)


def unpack(model):
    mlp = model.model.layers[0].mlp
    mlp.down_proj = nn.Linear(mlp.down_proj.in_features, mlp.down_proj.out_features, bias=False)


def prune(model):
    model.model.layers = model.model.layers[:1]


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A dense model with biases, and with one matrix for embedding and head."""
    source = save_tiny(
        tmp_path_factory.mktemp("tied"), "llama", attention_bias=True, tie_word_embeddings=True
    )
    return write_checkpoint(source, tmp_path_factory.mktemp("packed-tied"), scope="all")


@pytest.mark.parametrize("change", [set_bias, set_scale, untie, unpack, prune])
def test_no_change_of_a_model_is_lost_without_a_word(tied, tmp_path, change):
    model = load(tied)
    model.save_pretrained(tmp_path / "as-it-was")
    change(model)
    with pytest.raises(ValueError, match=r"was changed since the model was loaded"):
        model.save_pretrained(tmp_path / "changed")
    assert not (tmp_path / "changed").exists()


def test_adapters_are_saved_by_transformers(dense, tmp_path, monkeypatch):
    model, saved = load(dense), []
    model._hf_peft_config_loaded = True
    monkeypatch.setattr(type(model), "save_pretrained", lambda *a, **o: saved.append((a, o)))
    model.save_pretrained(tmp_path / "adapter", max_shard_size="1GB")
    expected = (model, tmp_path / "adapter", True, None, False), {"max_shard_size": "1GB"}
    assert saved == [expected]


def test_a_changed_configuration_is_saved(tied, tmp_path):
    model = load(tied)
    model.config.rms_norm_eps = 0.5
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert again.config.rms_norm_eps == 0.5
    assert not torch.equal(logits_of(again, IDS), logits_of(load(tied), IDS))
    before = json.loads((tied / "config.json").read_text())
    after = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {name for name in after if after[name] != before.get(name)} == {"rms_norm_eps"}


def test_a_model_inside_of_a_loaded_one_is_not_saved(dense, tmp_path):
    with pytest.raises(ValueError, match="save the whole LlamaForCausalLM"):
        load(dense).model.save_pretrained(tmp_path / "inner")
    assert not (tmp_path / "inner").exists()


def test_a_shard_that_was_damaged_since_is_named(copied, tmp_path):
    model = load(copied)
    with first_shard(copied).open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"safetensors was damaged or edited since"):
        model.save_pretrained(tmp_path / "again")


def test_only_the_checkpoint_of_a_folder_is_uploaded(copied, monkeypatch):
    (copied / "work").mkdir()
    (copied / "work" / "calibration.safetensors").write_text("private")
    (copied / "notes.txt").write_text("private")
    uploaded = []

    def upload_folder(folder_path, repo_id, allow_patterns):
        paths = (str(path.relative_to(folder_path)) for path in folder_path.rglob("*"))
        uploaded.extend(filter_repo_objects(paths, allow_patterns=allow_patterns))

    api = Mock(upload_folder=upload_folder)
    monkeypatch.setattr("mxq.checkpoint.save.HfApi", lambda token: api)
    load(copied).save_pretrained(copied, push_to_hub=True)
    shards = {path.name for path in copied.glob("*.safetensors")}
    assert shards | {"config.json", "model.safetensors.index.json"} <= set(uploaded)
    assert not {"notes.txt", "work/calibration.safetensors"} & set(uploaded)


def test_what_is_saved_has_the_tokenizer_whole_or_not_at_all(tmp_path):
    source = save_tiny(tmp_path / "source", "llama")
    folder = write_checkpoint(source, tmp_path / "packed")
    load(folder).save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("tokenizer*"))
    assert list(folder.glob("tokenizer*"))


def test_push_to_hub_uploads_the_checkpoint(moe, monkeypatch):
    uploaded = {}

    def upload(model, folder, repository, **options):
        uploaded[repository] = sorted(path.name for path in Path(folder).iterdir())

    monkeypatch.setattr(PreTrainedModel, "_upload_modified_files", upload)
    monkeypatch.setattr(
        hub, "hf_api", lambda: Mock(**{"create_repo.return_value.repo_id": "me/it"})
    )
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: Mock())
    load(moe).push_to_hub("it")
    wanted = {path.name for path in moe.glob("*.safetensors*")} | {"config.json"}
    assert wanted <= set(uploaded["me/it"])


# What it was fitted to


def test_each_block_is_fitted_to_the_inputs_that_the_packed_model_gives_it(tmp_path):
    source = save_tiny(tmp_path / "source", "llama")
    fit = token_ids(4, 16, seed=2)
    seen = {}

    def spy(w_BNK, scheme, hessian_BKK):
        seen[w_BNK[0].flatten()[0].item()] = hessian_BKK[0]
        return quantize_rtn(w_BNK, scheme, None)

    options = {"menu": "w2a16_g32_asym", "quantizer": spy, "target": "local"}
    folder = write_checkpoint(source, tmp_path / "packed", **options)
    inputs = {}
    model = load(folder)
    for name, module in model.named_modules():
        if type(module).__name__ == "MxqLinear":
            module.register_forward_pre_hook(
                lambda module, args, name=name: inputs.update({name: args[0].flatten(0, 1)})
            )
    logits_of(model, fit)
    original = load(source)
    for name, x_TK in inputs.items():
        tokens, k = x_TK.shape
        own_KK = x_TK.T @ x_TK / tokens
        # An eighth of a token for each input is the weight of the mean on the diagonal.
        mean_KK = torch.eye(k) * own_KK.diagonal().mean()
        expected = (tokens * own_KK + k / 8 * mean_KK) / (tokens + k / 8)
        found = seen[original.get_submodule(name).weight.flatten()[0].item()]
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5), name
    assert len(inputs) == len(seen) == 14


# Without mxq


LOADS = """
import os, sys
import transformers
from transformers import LlamaForCausalLM, Qwen2MoeForCausalLM
{extra}
for number, (name, folder) in enumerate({cases!r}):
    child = os.fork()
    if child == 0:
        for stream, kind in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{place}/{{number}}.{{kind}}", os.O_WRONLY | os.O_CREAT), stream)
        model = getattr(transformers, name).from_pretrained(folder)
        print("loaded", type(model).__name__, "mxq" in sys.modules)
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
"""Loads in a process of their own each, forked from one that has paid for the imports."""

CASES = {
    "moe": ("AutoModelForCausalLM", "Qwen2MoeForCausalLM"),
    "dense": ("AutoModelForCausalLM", "LlamaForCausalLM"),
}


def load_elsewhere(folders, place, extra):
    """Exit status, output and errors of each load, by kind and class."""
    keys = [(kind, name) for kind, names in CASES.items() for name in names]
    cases = [(name, str(folders[kind])) for kind, name in keys]
    code = LOADS.format(cases=cases, place=place, extra=extra)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return {
        key: (
            int(status),
            (place / f"{number}.out").read_text(),
            (place / f"{number}.err").read_text(),
        )
        for number, (key, status) in enumerate(zip(keys, done.stdout.split(), strict=True))
    }


@pytest.fixture(scope="module")
def without_mxq(moe, dense, tmp_path_factory):
    folders = {"moe": moe, "dense": dense}
    return load_elsewhere(folders, tmp_path_factory.mktemp("without"), "")


@pytest.fixture(scope="module")
def with_mxq(moe, dense, tmp_path_factory):
    folders = {"moe": moe, "dense": dense}
    return load_elsewhere(folders, tmp_path_factory.mktemp("with"), "import mxq")


@pytest.mark.parametrize("place", [0, 1], ids=["Auto", "concrete"])
@pytest.mark.parametrize("kind", CASES)
def test_stock_transformers_stops_and_names_mxq(kind, place, without_mxq):
    status, output, errors = without_mxq[kind, CASES[kind][place]]
    assert status == 1
    assert "this checkpoint was quantized with mxq: run `import mxq` before" in errors
    assert output == ""


@pytest.mark.parametrize("place", [0, 1], ids=["Auto", "concrete"])
@pytest.mark.parametrize("kind", CASES)
def test_after_import_of_mxq_transformers_loads(kind, place, with_mxq):
    status, output, errors = with_mxq[kind, CASES[kind][place]]
    assert status == 0, errors
    assert output == f"loaded {CASES[kind][1]} True\n"


# Damage


def refuses(folder, message):
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_a_truncated_shard_is_refused(copied):
    shard = first_shard(copied)
    shard.write_bytes(shard.read_bytes()[:-100])
    refuses(copied, rf"{shard.name} is damaged or was edited: its SHA-256 is .* copy or download")


def test_one_flipped_byte_is_refused(copied):
    shard = first_shard(copied)
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    refuses(copied, rf"{shard.name} is damaged or was edited: its SHA-256 is .*, expected")


def test_an_edited_scheme_is_refused(copied):
    def widen(config):
        schemes = config["quantization_config"]["schemes"]
        schemes[schemes.index("w2a16_g32_asym")] = "w4a16_g32_asym"

    edit_config(copied, widen)
    refuses(
        copied, r"weight_\w+ has shape \[.*\], its scheme needs \[.*\]: the plan in config.json"
    )


def test_a_scheme_that_does_not_exist_is_refused(copied):
    def misspell(config):
        config["quantization_config"]["schemes"][0] = "w7a16_g32_asym"

    edit_config(copied, misspell)
    refuses(copied, "weight bits of 7 is not supported")


def test_a_plan_without_its_tables_is_refused(copied):
    edit_config(copied, lambda config: config["quantization_config"].pop("linears"))
    refuses(copied, r"quantization_config of this checkpoint was edited or damaged: .*linears")


def test_a_removed_shard_is_refused(copied):
    shard = first_shard(copied)
    shard.unlink()
    with pytest.raises((ValueError, OSError), match=shard.name):
        load(copied)


def test_a_shard_removed_from_the_index_too_is_refused(copied):
    shard = first_shard(copied)
    shard.unlink()
    index = copied / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    fields["weight_map"] = {k: f for k, f in fields["weight_map"].items() if f != shard.name}
    index.write_text(json.dumps(fields))
    refuses(
        copied, rf"files do not match its plan: absent \['{shard.name}'\], not in the plan \[\]"
    )


def test_a_foreign_shard_is_refused(copied):
    save_file({"model.extra": torch.zeros(2)}, copied / "extra.safetensors", {"format": "pt"})
    index = copied / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    fields["weight_map"]["model.extra"] = "extra.safetensors"
    index.write_text(json.dumps(fields))
    refuses(copied, r"absent \[\], not in the plan \['extra.safetensors'\]; copy the folder again")


def test_a_shard_of_another_model_is_refused(copied, moe):
    shard = first_shard(copied)
    shutil.copyfile(first_shard(moe), shard)
    refuses(copied, rf"{shard.name} is damaged or was edited")


def test_another_format_version_is_refused(copied):
    edit_config(copied, lambda config: config["quantization_config"].update(format_version=2))
    refuses(copied, "has mxq format version 2, this mxq reads 1; install the mxq that wrote it")


def test_a_plan_that_names_an_absent_linear_is_refused(copied):
    def rename(config):
        linears = config["quantization_config"]["linears"]
        linears["model.layers.9.mlp.up_proj"] = linears.pop("model.layers.1.mlp.up_proj")

    edit_config(copied, rename)
    refuses(copied, r"plan names a linear 'model.layers.9.mlp.up_proj', absent in this model")


def test_a_plan_that_names_absent_experts_is_refused(copied):
    def invent(config):
        config["quantization_config"]["experts"]["model.layers.0.mlp.experts"] = {"up_proj": [0]}

    edit_config(copied, invent)
    refuses(copied, r"plan names experts 'model.layers.0.mlp.experts', absent in this model")


def test_a_plan_that_forgets_a_linear_is_refused(copied):
    edit_config(
        copied,
        lambda config: config["quantization_config"]["linears"].pop("model.layers.1.mlp.up_proj"),
    )
    refuses(copied, r"model.layers.1.mlp.up_proj")
