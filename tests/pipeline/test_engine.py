"""Packed modules on kernels: the same outputs as by decoding, in Triton's interpreter."""

import copy
import warnings

import pytest
import torch
from checkpoints import make_allocation, random_schemes
from tiny import MOE_FAMILIES, save_tiny, token_ids
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import mxq
from mxq.checkpoint import kernel_forms
from mxq.checkpoint.engine import call_experts
from mxq.checkpoint.kernel_forms import recognise_gate
from mxq.checkpoint.modules import MxqExperts, MxqLinear
from mxq.checkpoint.pack import pack
from mxq.kernels import activation, dispatch
from mxq.models.adapter import ModelAdapter
from mxq.models.source import open_source
from mxq.models.sweep import make_batches
from mxq.quantizers import Method, quantize_rtn
from mxq.scheme import parse_schemes

MENU = parse_schemes(
    "w2a16_g32_asym,w3a16_grow_asym,w4a16_grow_sym,w5a16_g32_asym,w8a8_grow_sym,w4a8_grow_asym,"
    "fp8,bf16"
)

# A layer rounds to bfloat16 some eight times on either way (input, rotation, scale and weight,
# two results, gate, second rotation, sum), each by 2^-9 at the median and 2^-8 at most; rounding
# an 8-bit input anew can move a value by a step, 1/127 of the largest. Swapped experts, a lost
# scale or a wrong order of the rotation are off by more than 0.3.
TOLERANCE = 0.03


def load(folder, dtype=torch.bfloat16):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def write(folder, family, menu=MENU, rotated_layers=(0,)):
    """A random tiny model of the family, packed with a mix of schemes, every linear of it."""
    source = save_tiny(folder / "source", family)
    adapter = ModelAdapter(open_source(source), scope="all")
    schemes = random_schemes(adapter, menu, seed=4)
    plan = make_allocation(adapter, schemes, rotated_layers=rotated_layers)
    batches = make_batches(token_ids(4, 16, seed=2), token_ids(1, 16, seed=3))
    pack(adapter, batches, plan, folder / "packed", method=Method("own", quantize_rtn))
    return folder / "packed"


def modules_of(model, kind):
    return {name: module for name, module in model.named_modules() if type(module) is kind}


def routed_input(experts, width, tokens=10, top_k=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).to(torch.bfloat16)
    rows = [torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)]
    return hidden, torch.stack(rows), torch.rand(tokens, top_k, generator=generator)


def distance(found, expected):
    found, expected = found.float(), expected.float()
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("engine"), "qwen2_moe")


@pytest.fixture
def model(folder):
    return load(folder)


@pytest.fixture
def experts(model):
    """The experts of the first layer, whose inputs are rotated; they use kernels."""
    module = next(iter(modules_of(model, MxqExperts).values()))
    mxq.set_engine(module, "kernels")
    return module


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_experts_of_every_family_agree_with_the_decoded_ones(family, tmp_path):
    model = load(write(tmp_path, family))
    for name, module in modules_of(model, MxqExperts).items():
        inputs = routed_input(module.experts, 64)
        with torch.no_grad():
            mxq.set_engine(module, "decoded")
            expected = module(*inputs)
            mxq.set_engine(module, "kernels")
            assert distance(module(*inputs), expected) < TOLERANCE, name
        assert module.layer is not None, name


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])  # without and with biases
def test_linears_agree_with_the_decoded_ones(family, tmp_path):
    model = load(write(tmp_path, family))
    linears = [m for m in modules_of(model, MxqLinear).items() if ".experts." not in m[0]]
    assert linears
    for name, module in linears:
        x = torch.randn(2, 3, module.in_features, dtype=torch.bfloat16)
        with torch.no_grad():
            expected = module.decoded(x)
            mxq.set_engine(module, "kernels")
            found = module(x)
        assert found.shape == expected.shape
        assert distance(found, expected) < TOLERANCE, name


def test_two_experts_in_each_others_place_are_far_beyond_the_tolerance(experts):
    inputs = routed_input(experts.experts, 64)
    with torch.no_grad():
        expected = experts.decoded(*inputs)
        swapped = torch.tensor([1, 0, 2, 3])[inputs[1]]
        assert distance(experts(inputs[0], swapped, inputs[2]), expected) > 10 * TOLERANCE


def test_a_token_without_experts_gets_nothing(experts):
    hidden, index, weights = routed_input(experts.experts, 64)
    index[3] = experts.experts  # what transformers writes for experts of other processes
    with torch.no_grad():
        out = experts(hidden, index, weights)
    assert out[3].abs().max() == 0
    assert out[2].abs().max() > 0


def test_no_token_at_all_is_an_empty_output(experts):
    hidden, index, weights = routed_input(experts.experts, 64)
    with torch.no_grad():
        assert experts(hidden[:0], index[:0], weights[:0]).shape == (0, 64)


def test_weights_are_held_once_and_come_back_bit_for_bit(model, experts):
    before = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    inputs = routed_input(experts.experts, 64)
    with torch.no_grad():
        out = experts(*inputs)
        linear = experts.get_submodule("0").up_proj
        assert all(linear.get_parameter(suffix).numel() == 0 for suffix in linear.stored)
        after = experts.state_dict()
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert tensor.dtype == after[name].dtype, name
            found, expected = (t.flatten().view(torch.uint8) for t in (after[name], tensor))
            assert torch.equal(found, expected), name
        assert torch.equal(experts(*inputs), out)


def test_a_weight_can_be_read_while_kernels_hold_it(experts):
    linear = next(m for m in modules_of(experts, MxqLinear).values() if m.scheme.kind == "int")
    before = linear.weight
    with torch.no_grad():
        experts(*routed_input(experts.experts, 64))
    assert linear.arena is not None
    assert torch.equal(linear.weight, before)


@pytest.mark.parametrize(
    "change",
    [copy.deepcopy, lambda module: module.to(torch.bfloat16), lambda module: module.cpu()],
    ids=["copied", "cast", "moved"],
)
def test_a_copied_or_moved_module_computes_the_same(change, experts):
    inputs = routed_input(experts.experts, 64)
    with torch.no_grad():
        expected = experts(*inputs)
        changed = change(experts)
        assert torch.equal(changed(*inputs), expected)
        assert torch.equal(experts(*inputs), expected)


def test_loaded_tensors_replace_what_kernels_hold(experts):
    inputs = routed_input(experts.experts, 64)
    with torch.no_grad():
        expected = experts(*inputs)
        state = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
        scales = [name for name in state if name.endswith("weight_scale")]
        experts.load_state_dict(state | {name: 2 * state[name] for name in scales})
        assert not torch.equal(experts(*inputs), expected)
        experts.load_state_dict(state)
        assert torch.equal(experts(*inputs), expected)


def test_torch_compile_takes_a_layer_in_one_graph(experts):
    inputs = routed_input(experts.experts, 64)
    torch.compiler.reset()
    compiled = torch.compile(lambda *x: experts(*x) * 2, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(*inputs), experts(*inputs) * 2)


def test_a_model_generates_the_same_tokens_with_kernels(model):
    prompt = token_ids(1, 6, seed=5)
    with torch.no_grad():
        for module in modules_of(model, MxqExperts).values():
            mxq.set_engine(module, "kernels")
        first = model.generate(prompt, max_new_tokens=2, do_sample=False)
        assert torch.equal(model.generate(prompt, max_new_tokens=2, do_sample=False), first)
    assert first.shape == (1, 8)


def test_gradients_go_through_decoded_weights(experts):
    hidden, index, weights = routed_input(experts.experts, 64)
    hidden.requires_grad_()
    experts(hidden, index, weights).sum().backward()
    assert hidden.grad.abs().max() > 0
    assert experts.layer is None


def test_packed_experts_are_an_experts_implementation_of_transformers(experts):
    function = ALL_EXPERTS_FUNCTIONS["mxq_packed"]
    inputs = routed_input(experts.experts, 64)
    with torch.no_grad():
        assert torch.equal(function(experts, *inputs), experts(*inputs))


def test_a_cpu_decodes_unless_told_otherwise(model):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(token_ids(1, 4, seed=5))
    assert all(module.layer is None for module in modules_of(model, MxqExperts).values())


def test_a_scheme_without_kernel_decodes_its_layer_with_one_warning(tmp_path):
    menu = parse_schemes("w8a8_g32_asym")
    model = load(write(tmp_path, "mixtral", menu, rotated_layers=()))
    mxq.set_engine(model, "kernels")
    with torch.no_grad(), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        model(token_ids(1, 4, seed=5))
        model(token_ids(1, 4, seed=5))
    assert [str(warning.message) for warning in seen] == [
        "mxq decodes weights in every call, which is slow, instead of using kernels: no kernel "
        "computes w8a8_g32_asym: integer products are rescaled once for 128 inputs; use g128 or "
        "grow with 4- and 8-bit inputs. mxq.set_engine(model, 'decoded') accepts that without "
        "this warning."
    ]


def test_a_float32_model_decodes_with_the_reason(folder):
    module = next(iter(modules_of(load(folder, torch.float32), MxqExperts).values()))
    mxq.set_engine(module, "kernels")
    hidden, index, weights = routed_input(module.experts, 64)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="in bfloat16, this model in float32"):
        found = module(hidden.float(), index, weights)
    assert torch.equal(found, module.decoded(hidden.float(), index, weights))


def test_a_model_cast_to_bfloat16_after_loading_uses_kernels(folder):
    model = load(folder, torch.float32).to(torch.bfloat16)
    module = next(iter(modules_of(model, MxqExperts).values()))
    mxq.set_engine(module, "kernels")
    inputs = routed_input(module.experts, 64)
    with torch.no_grad():
        assert distance(module(*inputs), module.decoded(*inputs)) < TOLERANCE
    assert module.layer is not None


def test_a_layer_wider_than_kernels_take_decodes_with_the_reason(experts, monkeypatch):
    monkeypatch.setattr(activation, "WIDTH_LIMIT", 32)
    inputs = routed_input(experts.experts, 64)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="has 64 features, they take 32"):
        found = experts(*inputs)
    assert torch.equal(found, experts.decoded(*inputs))


def test_fp8_weights_decode_on_a_gpu_without_fp8_products(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(dispatch, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    reason = dispatch.refusal(device, torch.bfloat16, has_fp8=True)
    assert reason == "for fp8 weights they need compute capability 8.9, this GPU has 8.6"
    assert dispatch.refusal(device, torch.bfloat16) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert dispatch.refusal(device, torch.bfloat16, has_fp8=True) is None


@pytest.mark.parametrize("engine", ["kernels", "decoded"])
def test_the_shape_announced_to_the_compiler_is_that_of_the_output(engine, experts):
    hidden, index, weights = routed_input(experts.experts, 64)
    hidden = hidden.T.contiguous().T  # not contiguous
    mxq.set_engine(experts, "kernels")
    if engine == "decoded":
        experts.declined = True
    with torch.no_grad():
        found = call_experts(hidden, index, weights, experts.handle)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(tensor) for tensor in (hidden, index, weights)]
            announced = call_experts(*fakes, experts.handle)
    assert announced.stride() == found.stride() == (64, 1)
    assert (announced.shape, announced.dtype) == (found.shape, found.dtype)


def test_a_layer_that_does_not_fit_twice_decodes_with_the_reason(experts, monkeypatch):
    def too_large(*unused):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(kernel_forms, "_arena", too_large)
    inputs = routed_input(experts.experts, 64)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="no memory left"):
        found = experts(*inputs)
    assert torch.equal(found, experts.decoded(*inputs))


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda z: nn.functional.silu(z[:, :1]) * z[:, 1:], "silu"),
        (lambda z: nn.functional.gelu(z[:, :1]) * z[:, 1:], "gelu"),
        (lambda z: nn.functional.gelu(z[:, :1], approximate="tanh") * z[:, 1:], "gelu_tanh"),
        (lambda z: nn.functional.silu(z[:, :1].clamp(max=7)) * z[:, 1:].clamp(-7, 7), None),
        (lambda z: nn.functional.silu(z[:, 1:]) * z[:, :1], None),
    ],
    ids=["silu", "gelu", "gelu_tanh", "a clamp at 7", "gate and up exchanged"],
)
def test_a_gate_is_recognised_by_what_it_computes(function, name):
    gate = recognise_gate(function, True, None)
    assert gate.activation == name
    assert (gate.function is None) == (name is not None)


def test_an_unknown_engine_and_a_model_without_packed_modules_are_refused(model):
    with pytest.raises(ValueError, match="no engine 'fast'; choose one of auto, kernels, decoded"):
        mxq.set_engine(model, "fast")
    with pytest.raises(ValueError, match="no packed module; load a checkpoint written by mxq"):
        mxq.set_engine(nn.Linear(2, 2), "auto")
