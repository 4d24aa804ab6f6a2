"""The pipeline on a stand-in for a GPU: no tensor is on the wrong device, no byte is another.

The stand-in has the CPU's arithmetic, so a run on it has to give what a run on the CPU gives. It
shows that tensors are where they belong; what a real GPU computes it cannot show.
"""

import json

import pytest
from pretend_gpu import DEVICE, pretend_gpu
from tiny import save_tiny, token_ids
from torch.nn.attention import SDPBackend, sdpa_kernel
from typer.testing import CliRunner

import mxq
from mxq import numerics, workspace
from mxq.checkpoint.writer import CheckpointWriter
from mxq.cli import app
from mxq.compute import compute_device
from mxq.models.source import open_source

RUN = {
    "calibration": token_ids(9, 16, seed=7),
    "schemes": "w2a16_g32_asym,w4a16_g32_asym",
    "bits": 3.6,
}


@pytest.fixture
def on_gpu(monkeypatch):
    """Runs in this context compute on the stand-in; what they write has to be on the host."""

    class OnGpu:
        def __enter__(self):
            self.context = pretend_gpu()
            self.context.__enter__()
            monkeypatch.setattr(workspace, "compute_device", lambda *args, **kwargs: DEVICE)

        def __exit__(self, *error):
            monkeypatch.setattr(workspace, "compute_device", compute_device)
            self.context.__exit__(*error)

    add = CheckpointWriter.add

    def add_from_host(self, name, tensors):
        assert {tensor.device.type for tensor in tensors.values()} == {"cpu"}
        return add(self, name, tensors)

    monkeypatch.setattr(CheckpointWriter, "add", add_from_host)
    return OnGpu()


@pytest.fixture(autouse=True)
def _comparable_and_quick(monkeypatch):
    # A CPU has a fused attention of its own; the plain one is the same for all devices.
    # Every operation of the stand-in passes through Python, so a few clip ratios have to do.
    monkeypatch.setattr(numerics, "CLIP_RATIOS", (1.0, 0.7))
    with sdpa_kernel(SDPBackend.MATH):
        yield


def content(path):
    """An artifact without the one setting that differs."""
    found = json.loads(path.read_text())["content"]
    assert found["provenance"]["settings"].pop("compute") in ("cpu", DEVICE.type)
    return found


def assert_same(result, expected):
    """Two results with the same checkpoint, byte for byte, and the same figures."""
    assert result.losses == expected.losses
    assert result.packs == expected.packs
    names = {path.name for path in expected.folder.glob("*.safetensors")} | {"config.json"}
    assert names > {"model-outside.safetensors", "config.json"}
    for name in names:
        assert (result.folder / name).read_bytes() == (expected.folder / name).read_bytes(), name


@pytest.mark.parametrize(
    ("family", "options"),
    [
        pytest.param("qwen2_moe", {"memory": 0}, id="fisher-gptq-auto-from-files"),
        pytest.param(
            "gpt_oss",
            {"sensitivity": "output_mse", "rotation": "on", "scope": "all"},
            id="output_mse-gptq-rotated-biases",
        ),
        pytest.param(
            "qwen3",
            {
                "sensitivity": "layer_out",
                "quantizer": "rtn",
                "schemes": "w4a4_grow_sym,w8a8_grow_sym,fp8,bf16",
                "bits": 9,
            },
            id="layer_out-rtn-inputs-rounded-tied",
        ),
    ],
)
def test_a_run_on_the_stand_in_gives_the_bytes_of_the_cpu(tmp_path, on_gpu, family, options):
    source = save_tiny(tmp_path / "source", family)
    options = {**RUN, **options}
    expected = mxq.quantize(source, output=tmp_path / "cpu", **options)
    with on_gpu:
        result = mxq.quantize(source, output=tmp_path / "gpu", **options)
    assert_same(result, expected)
    for artifact in ("profile", "sensitivity"):
        found, wanted = (content(tmp_path / d / f"work/{artifact}.json") for d in ("gpu", "cpu"))
        assert found == wanted


def test_all_that_is_loaded_is_on_the_device(tmp_path):
    with pretend_gpu():
        source = open_source(save_tiny(tmp_path, "deepseek_v3"), device=DEVICE)
        source.load_layer(1)
        held = {**dict(source.model.named_parameters()), **dict(source.model.named_buffers())}
    places = {name: tensor.device.type for name, tensor in held.items()}
    assert any(name.endswith("e_score_correction_bias") for name in places)
    assert {kind for name, kind in places.items() if ".layers.0." not in name} == {DEVICE.type}


def test_a_finished_layer_goes_back_onto_the_device(tmp_path, on_gpu, monkeypatch):
    source = save_tiny(tmp_path / "source")
    expected = mxq.quantize(source, output=tmp_path / "cpu", rotation="on", **RUN)

    class StoppedError(Exception):
        pass

    def stop(stage, step, done, total):
        if stage == "pack plan" and done == 1:
            raise StoppedError

    with on_gpu:
        out = {"output": tmp_path / "gpu", "rotation": "on", **RUN}
        with pytest.raises(StoppedError):
            mxq.quantize(source, progress=stop, **out)
        assert (tmp_path / "gpu/work/packed-plan-layers/layer-00000.json").is_file()
        result = mxq.quantize(source, **out)
    assert_same(result, expected)


def test_what_another_device_has_made_is_named_and_not_mixed(tmp_path, on_gpu, caplog):
    source, work = save_tiny(tmp_path / "source"), tmp_path / "work"
    mxq.quantize(source, output=tmp_path / "cpu", work=work, **RUN)
    with on_gpu:
        with pytest.raises(ValueError, match=r"other settings \(compute: cpu -> lazy\)"):
            mxq.quantize(source, output=tmp_path / "cpu", work=work, **RUN)
        mxq.quantize(source, output=tmp_path / "gpu", work=work, **RUN)
    made_anew = [r.getMessage() for r in caplog.records if "compute: cpu -> lazy" in r.getMessage()]
    assert {m.split(":")[0].rpartition("/")[2] for m in made_anew} == {
        "profile.json",
        "sensitivity.json",
    }
    record = json.loads((tmp_path / "gpu/mxq_run.json").read_text())["content"]
    assert record["provenance"]["settings"]["compute"] == DEVICE.type


def test_a_plan_of_one_device_may_be_packed_on_another(tmp_path, on_gpu):
    source, work = save_tiny(tmp_path / "source"), tmp_path / "work"
    mxq.quantize(source, output=tmp_path / "cpu", work=work, guard=False, **RUN)
    with on_gpu:
        packed = CliRunner().invoke(app, ["pack", str(work), "-o", str(tmp_path / "gpu")])
    assert packed.exit_code == 0, packed.output
    record = json.loads((tmp_path / "gpu/mxq_run.json").read_text())["content"]
    assert record["provenance"]["settings"]["compute"] == DEVICE.type


@pytest.mark.parametrize("command", ["quantize", "profile", "measure", "pack"])
def test_every_computing_command_refuses_a_gpu_that_is_not_there(tmp_path, command):
    out = str(tmp_path / "out")
    arguments = {
        "quantize": ["demo", "--bits", "3", "-o", out],
        "profile": ["demo", "--work", out],
        "measure": ["demo", "--work", out],
        "pack": [str(tmp_path), "-o", out],
    }[command]
    result = CliRunner().invoke(app, [command, *arguments, "--compute", "cuda"])
    assert result.exit_code == 1
    assert "finds no CUDA GPU" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()
