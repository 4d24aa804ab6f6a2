"""What blocks cost: storage against the scheme's own count, latency by hand."""

import json
from dataclasses import fields

import pytest

from mxq.artifacts import BlockInfo
from mxq.scheme import Scheme, parse_schemes
from mxq.search import CostModel, Device, load_device, storage_cost
from mxq.search.device import device_names, device_of_gpu
from mxq.search.kernel_cost import multiprocessor_of

DEVICES = ("a100", "h100", "h200", "rtx4090")

# 1 GB/s is 1000 bytes, 1 TFLOP/s is 10^6 operations in a microsecond.
TOY = Device(
    name="toy",
    bandwidth_gb_s=1.0,
    tflop_s={"bf16": 1.0, "int8": 2.0, "fp8": None, "int4": None},
    sm_count=1,
    launch_us=3.0,
    sources={},
)


def block(name="a", *, out=100, inner=128, tokens=5, expert=0, site="s", projection="up"):
    return BlockInfo(name, 0, expert, projection, out, inner, tokens, site)


def latency(blocks, scheme, *, tokens, calibration_tokens=10, device=TOY):
    return (
        CostModel(device)
        .latency_us(
            blocks, [Scheme.parse(scheme)], tokens=tokens, calibration_tokens=calibration_tokens
        )[:, 0]
        .tolist()
    )


def test_storage_is_the_count_of_the_scheme():
    schemes = parse_schemes("w2a16_g64_asym,w4a16_g128_asym,fp8,bf16")
    blocks = [block(), block(out=7, inner=256), block()]
    expected = [[s.storage_bits(b.out_features, b.in_features) for s in schemes] for b in blocks]
    assert storage_cost(blocks, schemes).tolist() == expected


def test_a_weight_that_is_always_read_costs_its_bytes():
    # 100 x 128 weights of 16 bit are 25,600 bytes: 25.6 us. 1 token: 25,600 operations are
    # 0.0256 us, hidden behind the bytes. Traffic: 128 x 2 + 100 x 2 = 456 bytes. One launch: 3 us.
    assert latency([block(expert=None)], "bf16", tokens=1) == pytest.approx([25.6 + 0.456 + 3])


def test_many_tokens_cost_arithmetic():
    # 2 x 5000 x 100 x 128 operations at 1e6 a microsecond: 128 us, above the 25.6 us of bytes.
    expected = 128 + 5000 * 0.456 + 3
    assert latency([block(expert=None)], "bf16", tokens=5000) == pytest.approx([expected])


def test_an_expert_gets_its_share_of_the_tokens():
    # Half of the calibration tokens came here. 4 tokens in a step: the weight is read unless all
    # 4 go elsewhere, 1 - 1/16; 2 tokens arrive on average.
    expected = 25.6 * 15 / 16 + 2 * 0.456 + 3
    assert latency([block()], "bf16", tokens=4) == pytest.approx([expected])


def test_an_expert_without_tokens_costs_its_part_of_the_launch():
    blocks = [block("a", tokens=0), block("b", tokens=10)]
    assert latency(blocks, "bf16", tokens=1) == pytest.approx([1.5, 25.6 + 0.456 + 1.5])


def test_int8_activations_halve_input_traffic_and_double_the_rate():
    # w8a8: 2 x 5000 x 12800 / 2e6 = 64 us; traffic of a token 128 + 200 bytes.
    expected = 64 + 5000 * 0.328 + 3
    assert latency([block(expert=None)], "w8a8_grow_sym", tokens=5000) == pytest.approx([expected])


@pytest.mark.parametrize(
    ("scheme", "rate"), [("w4a4_grow_sym", 2.0), ("w4a8_grow_sym", 2.0), ("fp8", 1.0)]
)
def test_arithmetic_that_a_device_lacks_runs_in_the_next_wider_one(scheme, rate):
    assert TOY.rate(Scheme.parse(scheme)) == rate


def test_int4_is_used_where_there_is_some():
    assert load_device("a100").rate(Scheme.parse("w4a4_grow_sym")) == 886
    assert load_device("h200").rate(Scheme.parse("w4a4_grow_sym")) == 1400


@pytest.mark.parametrize("name", DEVICES)
def test_each_number_of_a_device_has_a_source(name):
    device = load_device(name)
    assert device.tflop_s["bf16"] > 0
    assert device.sm_count > 100
    numbers = {field.name for field in fields(device.multiprocessor)}
    numbers |= {"bandwidth_gb_s", "sm_count", "launch_us", *device.tflop_s}
    assert numbers == set(device.sources)
    assert all(device.sources.values())


def test_a_gpu_is_known_by_the_name_that_its_driver_has_for_it():
    assert device_of_gpu("NVIDIA H200").name == "NVIDIA H200 SXM"
    with pytest.raises(ValueError, match="no device file names the GPU 'NVIDIA B200'; write one"):
        device_of_gpu("NVIDIA B200")


def test_figures_of_kernels_are_not_devices():
    assert device_names() == DEVICES
    with pytest.raises(ValueError, match="no device 'kernels-sm90'"):
        load_device("kernels-sm90")


def test_a_file_without_a_multiprocessor_has_no_tile_times():
    with pytest.raises(ValueError, match="file of device 'toy' has no multiprocessor"):
        multiprocessor_of(TOY)


def test_a_description_says_that_it_is_a_roofline():
    assert CostModel(load_device("h200")).describe() == "roofline of NVIDIA H200 SXM"


def test_unknown_device_lists_the_menu():
    with pytest.raises(ValueError, match="no device 'b200'; choose one of a100, h100, h200, rtx40"):
        load_device("b200")


def test_a_device_of_ones_own_is_a_file(tmp_path):
    numbers = {
        "name": "mine",
        "bandwidth_gb_s": {"value": 10, "source": "guess"},
        "tflop_s": {
            key: {"value": 1, "source": "guess"} for key in ("bf16", "int8", "fp8", "int4")
        },
        "sm_count": {"value": 1, "source": "guess"},
        "launch_us": {"value": 0, "source": "guess"},
    }
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(numbers))
    assert load_device(path).bandwidth_gb_s == 10
    del numbers["sm_count"]
    path.write_text(json.dumps(numbers))
    with pytest.raises(ValueError, match=r"is not a device file .*sm_count"):
        load_device(path)


def test_wrong_token_counts_are_refused():
    with pytest.raises(ValueError, match="0 tokens in a step"):
        latency([block()], "bf16", tokens=0)
    with pytest.raises(ValueError, match="no calibration tokens"):
        latency([block()], "bf16", tokens=1, calibration_tokens=0)
    with pytest.raises(ValueError, match="a got 5 of 4 calibration tokens"):
        latency([block()], "bf16", tokens=1, calibration_tokens=4)
