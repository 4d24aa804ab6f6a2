"""Which device computes: spellings, numbers of GPUs and processes; and the stand-in for a GPU."""

from dataclasses import replace

import pytest
import torch
from pretend_gpu import DEVICE, MixedDevicesError, pretend_gpu

from mxq import distributed, workspace
from mxq.compute import compute_device, describe
from mxq.config import ResourceOptions
from mxq.distributed import Team, team_of
from mxq.models.activations import ActivationStore
from mxq.workspace import open_workspace


@pytest.fixture
def gpus(monkeypatch):
    """Let torch find that many GPUs."""

    def find(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return find


@pytest.mark.parametrize(
    ("wanted", "count", "rank", "processes", "expected"),
    [
        ("auto", 0, 0, 1, "cpu"),
        ("auto", 0, 1, 2, "cpu"),
        ("auto", 2, 0, 1, "cuda:0"),
        ("auto", 2, 1, 2, "cuda:1"),
        ("cpu", 2, 1, 2, "cpu"),
        ("cuda", 2, 0, 1, "cuda:0"),
        ("cuda", 4, 3, 8, "cuda:3"),
        ("cuda:1", 2, 0, 1, "cuda:1"),
    ],
)
def test_a_process_computes_where_it_is_told(gpus, wanted, count, rank, processes, expected):
    gpus(count)
    found = compute_device(wanted, local_rank=rank, processes=processes)
    assert found == torch.device(expected)


@pytest.mark.parametrize(
    ("wanted", "count", "rank", "processes", "message"),
    [
        ("cuda", 0, 0, 1, "finds no CUDA GPU; give --compute cpu"),
        ("cuda:1", 0, 0, 1, "finds no CUDA GPU"),
        ("cuda:2", 2, 0, 1, "--compute cuda:2 asks for GPU 2, and torch finds 2"),
        ("auto", 2, 2, 3, "process 2 of this machine asks for GPU 2, and torch finds 2"),
        ("cuda:0", 2, 0, 2, "names one GPU for 2 processes; give --compute cuda"),
        ("tpu", 1, 0, 1, "compute 'tpu' is unknown; choose auto, cpu, cuda or cuda:N"),
        ("cuda:", 1, 0, 1, "compute 'cuda:' is unknown"),
        ("cuda:01", 2, 0, 1, "compute 'cuda:01' is unknown"),
    ],
)
def test_a_gpu_that_is_not_there_is_refused(gpus, wanted, count, rank, processes, message):
    gpus(count)
    with pytest.raises(ValueError, match=message):
        compute_device(wanted, local_rank=rank, processes=processes)


def test_options_refuse_a_device_before_anything_runs():
    with pytest.raises(ValueError, match="compute 'gpu' is unknown"):
        ResourceOptions(compute="gpu")


def test_a_gpu_is_recorded_with_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"H100 {device.index}")
    assert describe(torch.device("cpu")) == "cpu"
    assert describe(torch.device("cuda", 1)) == "cuda H100 1"


def test_the_launcher_says_which_gpu_is_a_process_s(gpus, tmp_path, monkeypatch):
    gpus(2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    second = replace(Team.alone(), local_rank=1)
    assert open_workspace(tmp_path, ResourceOptions(), second).device == torch.device("cuda:1")
    with team_of({"WORLD_SIZE": "1"}, {}) as alone:
        assert alone.local_rank == 0


def test_a_process_of_several_knows_its_number_on_its_machine(monkeypatch):
    monkeypatch.setattr(distributed, "rendezvous", lambda *args, **kw: iter([(None, 3, 4)]))
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(distributed.dist, name, lambda *args, **kwargs: None)
    monkeypatch.setattr(Team, "exchange", lambda self, text: [text] * 4)
    with team_of({"WORLD_SIZE": "4", "LOCAL_RANK": "1"}, {}) as team:
        assert (team.rank, team.local_rank, team.size) == (3, 1, 4)


def test_processes_on_unequal_devices_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Team, "exchange", lambda self, text: [text, "cuda H100"])
    with pytest.raises(ValueError, match=r"different devices \(cpu, cuda H100\)"):
        workspace.open_workspace(tmp_path, ResourceOptions(compute="cpu"))


def test_activations_of_a_gpu_are_kept_on_the_host():
    store = ActivationStore()
    with pretend_gpu():
        there = torch.arange(6.0).reshape(2, 3).to(DEVICE)
        kept = store.keep(there)
        assert (there.device, kept.device) == (DEVICE, torch.device("cpu"))
    assert torch.equal(kept, torch.arange(6.0).reshape(2, 3))
    assert store.memory_bytes == kept.nbytes


def test_the_stand_in_computes_on_its_device_and_passes_gradients():
    with pretend_gpu():
        x, w = torch.randn(3, 4, requires_grad=True), torch.eye(4, device=DEVICE)
        y = torch.nn.functional.silu(x.to(DEVICE) @ w)
        assert y.device == torch.ones(2, device=DEVICE).device == DEVICE
        (grad,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(torch.nn.functional.silu(x).sum(), x)
    assert grad.device.type == "cpu"
    assert torch.equal(grad, expected)


@pytest.mark.parametrize(
    "mix",
    [
        lambda there: there + torch.ones(3),
        lambda there: torch.ones(3) * there,
        lambda there: torch.cat([torch.ones(3), there]),
        lambda there: torch.ones(3).add_(there),
        lambda there: torch.ones(3)[there > 0],
        lambda there: there.index_put((torch.tensor([0]),), torch.ones(1)),
        lambda there: torch.where(there > 0, there, torch.zeros(3)),
    ],
)
def test_the_stand_in_refuses_to_mix(mix):
    with pretend_gpu():
        there = torch.ones(3, device=DEVICE)
        with pytest.raises(MixedDevicesError):
            mix(there)


def test_the_stand_in_allows_what_a_gpu_allows():
    with pretend_gpu():
        there = torch.ones(3, device=DEVICE)
        assert (there * torch.tensor(2.0)).tolist() == [2.0, 2.0, 2.0]
        assert there[torch.tensor([0, 2])].tolist() == [1.0, 1.0]
        host = torch.zeros(3)
        host.copy_(there)
        assert host.tolist() == [1.0, 1.0, 1.0]
        assert float(there.sum()) == 3.0
        with pytest.raises(TypeError, match="no numpy array"):
            there.numpy()
