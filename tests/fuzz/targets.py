"""What is fuzzed: every reader of a file that may come from someone else.

A target takes the bytes of a fuzzer and a folder that it may fill. It returns whether the input was
accepted; a ``ValueError`` means that it was refused. Anything else is a finding: another exception,
an input that takes longer than LIMIT_S, a file outside of the folder, or an accepted input that
breaks what the reader promises (asserted here).
"""

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path

import torch
from mutations import as_text, edited, example
from safetensors.torch import save
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

from mxq.artifacts import Allocation, SensitivityTable
from mxq.checkpoint.format import CheckpointPlan
from mxq.checkpoint.load import MxqConfig, check_files, check_tensors, swap_modules
from mxq.checkpoint.pack import PackedLayer
from mxq.config import AllocateOptions, parse_shapes, parse_size
from mxq.engines.compressed import read_compressed
from mxq.engines.gptq import read_gptq
from mxq.heldout import MeasuredLoss
from mxq.models.files import checkpoint_files, is_inside, open_safetensors
from mxq.models.source import open_source
from mxq.profiling.activation import ActivationStats
from mxq.profiling.losses import LayerLosses
from mxq.profiling.texts import file_texts
from mxq.publish import RunRecord
from mxq.scheme import Scheme, parse_schemes
from mxq.search.device import load_device
from mxq.search.profiles import DeviceProfile
from mxq.storage import load_artifact, save_artifact
from mxq.workspace import RunSettings, Workspace

LIMIT_S = 5
"""Seconds that an input may take; the slowest reader takes a tenth of one for a valid file."""

Target = Callable[[bytes, Path], None]

ARTIFACTS = (
    *(RunSettings, ActivationStats, SensitivityTable, Allocation, DeviceProfile, RunRecord),
    *(LayerLosses, PackedLayer, MeasuredLoss),
)
"""Every kind that is read from a file."""


def plan_fields(data: bytes, folder: Path) -> None:
    """``quantization_config`` of a checkpoint: what is accepted comes back equal."""
    fields = edited(_plan(), data)
    if not isinstance(fields, dict):
        return
    plan = MxqConfig.from_dict(fields).plan()
    again = CheckpointPlan.from_json(plan.to_json())
    assert again == plan
    assert all(Path(name).name == name for name in plan.files)


def plan_modules(data: bytes, folder: Path) -> None:
    """A plan put into a model, held against its files; nothing is allocated for it."""
    fields = edited(_plan(), data)
    plan = CheckpointPlan.from_json(fields if isinstance(fields, dict) else {})
    model = deepcopy(_model())
    swap_modules(model, plan, torch.float32)
    assert all(parameter.is_meta for parameter in model.parameters())
    path = folder / "model.safetensors"
    path.write_bytes(_packed())
    (folder / "config.json").write_text("{}")
    check_tensors(model, [path])
    check_files(plan, [path])


def safetensors_header(data: bytes, folder: Path) -> None:
    """A safetensors file with an edited header, or of any bytes: nothing larger than it is told."""
    path = folder / "model.safetensors"
    path.write_bytes(data[1:] if data[:1] == b"\xff" else _with_header(data))
    for key in checkpoint_files(folder):
        with open_safetensors(path) as file:
            piece = file.get_slice(key)
            assert _elements(piece.get_shape()) <= 8 * path.stat().st_size


def index_file(data: bytes, folder: Path) -> None:
    """An index beside two files: only names inside of the folder are accepted."""
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).write_bytes(_weights())
    files = {"lm_head.weight": "a.safetensors", "model.norm.weight": "b.safetensors"}
    seed = {"metadata": {}, "weight_map": files}
    index = folder / "model.safetensors.index.json"
    text = data[1:] if data[:1] == b"\xff" else as_text(edited(seed, data)).encode()
    index.write_bytes(text)
    for key, name in checkpoint_files(folder).items():
        assert isinstance(key, str)
        assert (folder / name).is_file()
        assert is_inside(folder, folder / name)


def model_config(data: bytes, folder: Path) -> None:
    """config.json of a model to be quantized: built without weights or refused, and soon."""
    (folder / "model.safetensors").write_bytes(_weights())
    (folder / "config.json").write_text(as_text(edited(_config(), data)))
    source = open_source(folder)
    assert all(parameter.is_meta for parameter in source.layers[0].parameters())


def model_header(data: bytes, folder: Path) -> None:
    """Weights with an edited header under a config.json that is right."""
    (folder / "model.safetensors").write_bytes(_with_header(data))
    (folder / "config.json").write_text(as_text(_config()))
    open_source(folder).load_layer(0)


def artifact(data: bytes, folder: Path) -> None:
    """An artifact of any kind with a checksum that is right: what is accepted comes back equal."""
    kind = ARTIFACTS[(data[0] if data else 0) % len(ARTIFACTS)]
    content = edited(_example(kind), data[2:])
    path = folder / "artifact.json"
    path.write_text(as_text(_document(kind.__name__, content)))
    if data[1:2] == b"\xff":
        path.write_bytes(data[2:])
    found = load_artifact(path, kind)
    save_artifact(path, found)
    # NaN is equal to nothing, so texts are compared.
    assert repr(load_artifact(path, kind)) == repr(found)


def artifact_document(data: bytes, folder: Path) -> None:
    """The document around an artifact: kind, version, checksum."""
    document = _document("Allocation", _example(Allocation))
    path = folder / "artifact.json"
    path.write_text(as_text(edited(document, data)))
    load_artifact(path, Allocation)


def calibration_tokens(data: bytes, folder: Path) -> None:
    """The token ids of a work folder."""
    ids = torch.arange(12, dtype=torch.int64).reshape(3, 4)
    whole = save({"fit": ids, "heldout": ids[:1].clone()})
    raw = data[1:] if data[:1] == b"\xff" else _edited_file(whole, data)
    (folder / "calibration.safetensors").write_bytes(raw)
    tokens = Workspace(folder).tokens()
    assert tokens.fit_ids.dtype == tokens.heldout_ids.dtype == torch.int64


def device_file(data: bytes, folder: Path) -> None:
    """A device file of the user's own."""
    path = folder / "device.json"
    path.write_text(as_text(edited(_device(), data)))
    load_device(path)


def text_rows(data: bytes, folder: Path) -> None:
    """A .jsonl file of calibration text."""
    path = folder / "rows.jsonl"
    path.write_bytes(data)
    assert all(isinstance(text, str) for text in file_texts(path))


def spellings(data: bytes, folder: Path) -> None:
    """Options that are texts."""
    text = data[1:].decode(errors="replace")
    match (data[0] if data else 0) % 5:
        case 0:
            assert parse_size(text) >= 0
        case 1:
            assert all(n > 0 and k > 0 for n, k in parse_shapes(text))
        case 2:
            assert all(Scheme.parse(str(scheme)) == scheme for scheme in parse_schemes(text))
        case 3:
            AllocateOptions(plan=text)
        case _:
            assert str(Scheme.parse(text)) == text


def exported_config(data: bytes, folder: Path) -> None:
    """``quantization_config`` of other tools, as ``mxq check`` reads it."""
    place = (data[0] if data else 0) % 2
    fields = edited((_compressed(), _gptq())[place], data[1:])
    if not isinstance(fields, dict):
        return
    name = "model.layers.0.mlp.experts.1.up_proj"
    if place == 0:
        config = read_compressed(fields)
        group = config.group_of(name)
        assert group is None or group in config.groups
        assert config.is_ignored(name) in (True, False)
    else:
        assert read_gptq(fields).format_of(name).storage in ("packed", "dense")


TARGETS: Mapping[str, Target] = {
    function.__name__: function
    for function in (
        *(plan_fields, plan_modules, safetensors_header, index_file, model_config, model_header),
        *(artifact, artifact_document, calibration_tokens, device_file, text_rows, spellings),
        exported_config,
    )
}


# Valid files, made once


@cache
def _config():
    config = Qwen2MoeConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=32, moe_intermediate_size=32, num_experts=2,
        num_experts_per_tok=1, shared_expert_intermediate_size=32, decoder_sparse_step=1,
        bos_token_id=None, eos_token_id=None, max_position_embeddings=64,
    )  # fmt: skip
    config.architectures = ["Qwen2MoeForCausalLM"]
    return json.loads(config.to_json_string(use_diff=False))


@cache
def _model() -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(Qwen2MoeConfig(**_config()))


@cache
def _weights() -> bytes:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in _model().state_dict().items():
        value = torch.randn(tensor.shape, generator=generator)
        if name.endswith("gate_up_proj"):
            for expert, pair in enumerate(value):
                path = f"{name.removesuffix('gate_up_proj')}{expert}"
                for part, half in zip(("gate", "up"), pair.chunk(2), strict=True):
                    tensors[f"{path}.{part}_proj.weight"] = half.clone()
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(value):
                path = f"{name.removesuffix('down_proj')}{expert}"
                tensors[f"{path}.down_proj.weight"] = down.clone()
        else:
            tensors[name] = value
    return save(tensors, {"format": "pt"})


@cache
def _plan():
    return _plan_with({"model.safetensors": hashlib.sha256(_packed()).hexdigest()})


@cache
def _packed() -> bytes:
    """The one file of a checkpoint of that plan."""
    model = deepcopy(_model())
    swap_modules(model, CheckpointPlan.from_json(_plan_with({})), torch.float32)
    tensors = {n: torch.zeros(t.shape, dtype=t.dtype) for n, t in model.state_dict().items()}
    return save(tensors, {"format": "pt"})


def _plan_with(files):
    schemes = ["w2a16_g32_asym", "w4a16_grow_sym", "fp8", "bf16"]
    experts = {f"{name}_proj": [0, 1] for name in ("gate", "up", "down")}
    shared = "model.layers.0.mlp.shared_expert"
    return {
        "quant_method": "mxq",
        "format_version": 1,
        "schemes": schemes,
        "linears": {f"{shared}.up_proj": 0, f"{shared}.gate_proj": 2, f"{shared}.down_proj": 3},
        "experts": {"model.layers.0.mlp.experts": experts},
        "rotated": [f"{shared}.up_proj", "model.layers.0.mlp.experts"],
        "files": files,
    }


@cache
def _compressed():
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    group = {
        "targets": ["re:.*experts.*", "model.a.b", "Linear"],
        "weights": {**weights, "group_size": 128, "actorder": None},
        "input_activations": {"strategy": "token", "num_bits": 8, "dynamic": True},
    }
    return {"format": "pack-quantized", "ignore": ["lm_head"], "config_groups": {"a": group}}


@cache
def _gptq():
    dynamic = {"-:.*gate$": {}, "+:.*up": {"bits": 8}}
    return {"bits": 4, "group_size": 128, "sym": True, "desc_act": False, "dynamic": dynamic}


@cache
def _device():
    path = Path(__file__).parents[2] / "mxq" / "search" / "devices" / "h200.json"
    return json.loads(path.read_text())


@cache
def _example(kind):
    return example(kind)


def _document(kind: str, content: object) -> dict[str, object]:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    checksum = hashlib.sha256(text.encode()).hexdigest()
    return {"kind": kind, "version": 1, "sha256": checksum, "content": content}


def _with_header(data: bytes) -> bytes:
    return _edited_file(_weights(), data)


def _edited_file(whole: bytes, data: bytes) -> bytes:
    """A safetensors file with edits in its header; the length is that of the new header."""
    (length,) = struct.unpack("<Q", whole[:8])
    header = as_text(edited(json.loads(whole[8 : 8 + length]), data)).encode()
    return struct.pack("<Q", len(header)) + header + whole[8 + length :]


def _elements(shape) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
