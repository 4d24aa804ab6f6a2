"""The activation store: equal values in memory and in files, an honest count, no file left."""

import gc
from pathlib import Path

import psutil
import pytest
import torch

from mxq.models import activations
from mxq.models.activations import ActivationStore
from mxq.models.adapter import Capture
from mxq.models.probes import Captures


def values(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def spilling(tmp_path):
    return ActivationStore(0, tmp_path / "work")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 4), (300, 70)])
def test_a_tensor_in_a_file_has_the_same_values_shape_and_type(spilling, dtype, shape):
    tensor, expected = (values(*shape, dtype=dtype) for _ in range(2))
    kept = spilling.keep(tensor)
    assert spilling.is_on_disk(kept)
    assert kept.dtype == dtype
    assert torch.equal(kept, expected)


def test_the_tensor_stays_the_same_object_so_that_whoever_holds_it_lets_go_of_memory(spilling):
    tensor = values(4, 4)
    holder = {"hidden": tensor}
    before = tensor.data_ptr()
    assert spilling.keep(tensor) is tensor
    assert holder["hidden"].data_ptr() != before


@pytest.mark.parametrize("limit", [0, None])
def test_a_transposed_tensor_is_laid_out_anew_wherever_it_is_kept(tmp_path, limit):
    tensor = values(4, 6).T
    kept = ActivationStore(limit, tmp_path).keep(tensor)
    assert torch.equal(kept, values(4, 6).T)
    assert kept.is_contiguous()


def test_memory_is_used_up_to_the_limit_and_counted_until_a_tensor_is_dropped(tmp_path):
    store = ActivationStore(2000, tmp_path)
    first, second, third = (store.keep(values(250, seed=n)) for n in range(3))
    assert [store.is_on_disk(t) for t in (first, second, third)] == [False, False, True]
    assert (store.memory_bytes, store.disk_bytes) == (2000, 1000)
    view = first[10:]
    del first
    gc.collect()
    assert store.memory_bytes == 2000  # the view still holds it
    del view
    assert store.memory_bytes == 1000
    assert not store.is_on_disk(store.keep(values(250)))
    del third
    assert store.disk_bytes == 0
    assert (store.peak_memory_bytes, store.peak_disk_bytes) == (2000, 1000)


def test_cold_tensors_leave_half_of_the_limit_to_the_others(tmp_path):
    store = ActivationStore(4000, tmp_path)
    cold = [store.keep(values(250, seed=n), cold=True) for n in range(3)]
    assert [store.is_on_disk(tensor) for tensor in cold] == [False, False, True]
    hot = [store.keep(values(250, seed=n)) for n in range(3)]
    assert [store.is_on_disk(tensor) for tensor in hot] == [False, False, True]


def test_a_tensor_that_is_kept_twice_is_counted_and_written_once(tmp_path):
    store = ActivationStore(1000, tmp_path)
    inside, outside = store.keep(values(250)), store.keep(values(250))
    for tensor in (inside, outside, inside[:5], outside.view(10, 25)):
        store.keep(tensor)
    assert (store.memory_bytes, store.disk_bytes) == (1000, 1000)


@pytest.mark.parametrize("limit", [0, 700, 10**6])
def test_joined_pieces_are_those_of_cat_wherever_they_lie(tmp_path, limit):
    store = ActivationStore(limit, tmp_path)
    pieces = [values(rows, 7, seed=rows) for rows in (3, 1, 20)]
    expected = torch.cat([piece.clone() for piece in pieces])
    joined = store.join([store.keep(piece) for piece in pieces])
    assert torch.equal(joined, expected)
    # 24 x 7 x 4 = 672 bytes for the pieces, and as many for the result.
    assert store.is_on_disk(joined) == (limit < 1344)


@pytest.mark.parametrize("span", [1, 100, 10**6])
def test_rows_of_a_file_are_those_of_the_tensor_for_any_span(spilling, monkeypatch, span):
    monkeypatch.setattr(activations, "SPAN_BYTES", span)
    tensor = values(50, 3)
    rows = torch.tensor([0, 1, 2, 9, 10, 31, 49])
    expected = tensor[rows]
    kept = spilling.keep(tensor)
    assert torch.equal(spilling.rows(kept, rows), expected)
    assert spilling.rows(kept, rows[:0]).shape == (0, 3)
    assert torch.equal(spilling.rows(kept, torch.tensor([49])), expected[-1:])


def test_resident_memory_falls_when_a_file_is_released(spilling):
    tensor = spilling.keep(torch.ones(16 * 2**20))
    process = psutil.Process()
    assert tensor.sum() == 16 * 2**20  # reads every page: 64 MiB
    read = process.memory_info().rss
    spilling.release(tensor)
    assert read - process.memory_info().rss > 60 * 2**20
    assert tensor.sum() == 16 * 2**20


def test_what_a_model_writes_into_its_hidden_states_survives_a_release(spilling):
    tensor = spilling.keep(torch.zeros(10_000))
    tensor += 1.0
    spilling.release(tensor)
    assert bool((tensor == 1.0).all())


def test_no_file_is_to_be_seen_and_no_descriptor_stays_open(spilling, tmp_path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    kept = [spilling.keep(values(100, seed=n)) for n in range(50)]
    assert list((tmp_path / "work").iterdir()) == []
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert spilling.disk_bytes == 50 * 400
    assert torch.equal(kept[49], values(100, seed=49))


def test_a_full_disk_says_what_to_do(monkeypatch, spilling):
    def full(descriptor, left):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(activations.os, "write", full)
    with pytest.raises(ValueError, match=r"400 bytes cannot be written.*--memory"):
        spilling.keep(values(100))


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    store = ActivationStore(0, tmp_path / "file" / "work")
    with pytest.raises(ValueError, match=r"no activations can be written to .*file/work"):
        store.keep(values(3))


# Captures


def batch_of(captures, inputs):
    """One batch: sites "a" and "b" read one tensor, "c" another."""
    shared, own = inputs
    places = [captures.add(Capture(site, x)) for site, x in (("a", shared), ("b", shared))]
    places.append(captures.add(Capture("c", own)))
    for site, place in zip("abc", places, strict=True):
        captures.add_grad(site, place, torch.full((1, *shared.shape), float(ord(site))))
    captures.end_batch()


@pytest.mark.parametrize("limit", [0, None])
def test_sites_that_read_one_tensor_share_it_when_joined(tmp_path, limit):
    captures = Captures(ActivationStore(limit, tmp_path))
    inputs = [(values(4, 3, seed=n), values(4, 3, seed=n + 10)) for n in range(3)]
    for pair in inputs:
        batch_of(captures, [x.clone() for x in pair])
    sites = captures.join(5)
    for site, place in (("a", 0), ("b", 0), ("c", 1)):
        assert torch.equal(sites[site].x_TK, torch.cat([pair[place] for pair in inputs]))
        assert bool((sites[site].grad_TN == float(ord(site))).all())
        assert sites[site].grad_TN.shape == (12, 3)
    assert sites["a"].x_TK is sites["b"].x_TK
    assert sites["a"].x_TK is not sites["c"].x_TK


def test_a_tensor_that_is_written_to_between_two_sites_is_not_shared(tmp_path):
    captures = Captures(ActivationStore(0, tmp_path))
    x = torch.zeros(2, 2)
    captures.add(Capture("before", x))
    x += 1.0
    captures.add(Capture("after", x))
    captures.end_batch()
    sites = captures.join(2)
    assert float(sites["before"].x_TK.sum()) == 0.0
    assert float(sites["after"].x_TK.sum()) == 4.0


def test_inputs_of_a_later_batch_at_the_same_address_are_not_taken_for_the_first(tmp_path):
    captures = Captures(ActivationStore(0, tmp_path))
    for number in range(20):
        captures.add(Capture("a", torch.full((64, 64), float(number))))
        captures.end_batch()
    joined = captures.join(0)["a"].x_TK
    assert joined[::64, 0].tolist() == [float(number) for number in range(20)]


def test_a_tensor_that_takes_the_place_of_one_of_the_same_batch_is_not_taken_for_it(tmp_path):
    captures = Captures(ActivationStore(0, tmp_path))
    for number in range(20):
        captures.add(Capture(f"site {number}", torch.full((64, 64), float(number))))
    captures.end_batch()
    sites = captures.join(0)
    assert [float(sites[f"site {n}"].x_TK[0, 0]) for n in range(20)] == list(range(20))
