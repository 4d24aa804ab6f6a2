"""Calibration sets: what one is, how windows are cut, and that the same request repeats."""

import hashlib
import itertools

import datasets
import pytest
import torch
from counting import BOS, EOS, FIRST_WORD, TOKENIZER, is_run, load, make_tokenizer, numbers

from mxq.profiling.calibration import CalibrationSet

# --- what a set is ---------------------------------------------------------------------------


def test_digest_is_sha256_of_shape_domains_and_little_endian_ids():
    ids = torch.tensor([[1, 2], [3, 258]])
    content = b"((2, 2), ('a', 'b'))" + b"".join(
        number.to_bytes(8, "little") for number in (1, 2, 3, 258)
    )
    calibration = CalibrationSet(ids, ("a", "b"), "x")
    assert calibration.digest == hashlib.sha256(content).hexdigest()
    assert calibration.tokens == 4


def test_digest_depends_on_ids_shape_and_domains_but_not_on_the_name():
    ids = torch.arange(4).reshape(2, 2)
    same = CalibrationSet(ids, ("a", "b"), "x")
    assert same.digest == CalibrationSet(ids.clone(), ("a", "b"), "y").digest
    others = [
        CalibrationSet(ids + 1, ("a", "b"), "x"),
        CalibrationSet(ids, ("b", "a"), "x"),
        CalibrationSet(ids.reshape(1, 4), ("a",), "x"),
    ]
    assert len({same.digest, *(other.digest for other in others)}) == 4


@pytest.mark.parametrize(
    ("ids", "domains", "message"),
    [
        (torch.zeros(2, 2), ("a", "a"), "torch.float32 of shape"),
        (torch.arange(4), ("a",) * 4, "give int64 of shape"),
        (torch.zeros(0, 4, dtype=torch.int64), (), "at least one sample"),
        (torch.zeros(2, 2, dtype=torch.int64), ("a",), "1 domain for 2 samples"),
    ],
)
def test_a_set_that_makes_no_sense_is_refused(ids, domains, message):
    with pytest.raises(ValueError, match=message):
        CalibrationSet(ids, domains, "x")


def test_split_holds_out_the_last_of_every_fourth_of_each_domain():
    # 8 samples each, in turn: a quarter is the samples number 3 and 7 of each domain.
    domains = ("b", "a") * 8
    calibration = CalibrationSet(torch.arange(16)[:, None], domains, "x")
    fit, heldout = calibration.split(0.25)
    assert heldout.input_ids.ravel().tolist() == [6, 7, 14, 15]
    assert heldout.domains == ("b", "a", "b", "a")
    assert sorted([*fit.input_ids.ravel().tolist(), 6, 7, 14, 15]) == list(range(16))
    assert (fit.name, heldout.name) == ("x (fit)", "x (heldout)")


@pytest.mark.parametrize(("samples", "held"), [*itertools.product((2, 3, 7, 16), (1, 2, 5))])
def test_split_by_count_holds_out_exactly_that_many(samples, held):
    calibration = CalibrationSet(torch.arange(samples)[:, None], ("a",) * samples, "x")
    if held >= samples:
        with pytest.raises(ValueError, match=f"holding out {held} of {samples} samples leaves"):
            calibration.split(held)
        return
    fit, heldout = calibration.split(held)
    assert (len(fit.domains), len(heldout.domains)) == (samples - held, held)


def test_split_that_leaves_a_part_empty_says_so():
    one = CalibrationSet(torch.ones(1, 4, dtype=torch.int64), ("a",), "x")
    with pytest.raises(ValueError, match=r"0\.5 of 1 sample leaves 1 to fit and 0 held out"):
        one.split(0.5)


# --- how windows are cut ----------------------------------------------------------------------


def test_windows_of_a_long_text_are_disjoint_runs_in_order():
    calibration = load([numbers(0, 1000)], samples=8, seqlen=32)
    assert calibration.input_ids.shape == (8, 32)
    assert calibration.input_ids.dtype == torch.int64
    assert all(is_run(window) for window in calibration.input_ids)
    firsts = calibration.input_ids[:, 0]
    assert (firsts.diff() >= 32).all()
    assert calibration.domains == ("own data",) * 8


def test_exactly_enough_tokens_are_all_used():
    calibration = load([numbers(0, 64)])
    assert calibration.input_ids.ravel().tolist() == list(range(2, 66))


def test_a_short_text_gives_windows_that_overlap_by_at_most_half():
    # 4 windows of 16 at strides of at least 8 need 16 + 3 * 8 = 40 tokens.
    starts = load([numbers(0, 40)]).input_ids[:, 0] - FIRST_WORD
    assert starts.tolist() == [0, 8, 16, 24]
    with pytest.raises(ValueError, match="has 39 tokens, but 4 windows of 16 need at least 40"):
        load([numbers(0, 39)])


def test_same_seed_gives_same_bytes_and_another_seed_other_windows():
    texts = [numbers(0, 1000)]
    one, two, other = (load(texts, seed=seed) for seed in (7, 7, 8))
    assert one == two
    assert one.input_ids.numpy().tobytes() == two.input_ids.numpy().tobytes()
    assert one.digest != other.digest


def test_short_texts_are_joined_with_end_of_text_between():
    calibration = load(["5 6 7", "8 9", "10"], samples=1, seqlen=8)
    assert calibration.input_ids.tolist() == [[7, 8, 9, EOS, 10, 11, EOS, 12]]


def test_texts_are_joined_directly_if_there_is_no_end_of_text():
    calibration = load(["5 6", "8 9"], samples=1, seqlen=4, tokenizer=make_tokenizer(eos=False))
    assert calibration.input_ids.tolist() == [[7, 8, 10, 11]]


def test_windows_of_text_start_as_the_tokenizer_starts_a_text():
    calibration = load([numbers(0, 64)], tokenizer=make_tokenizer(bos=True))
    assert calibration.input_ids[:, 0].tolist() == [BOS] * 4
    assert calibration.input_ids[1, 1:3].tolist() == [16 + 1 + 2, 16 + 2 + 2]


def test_domains_share_the_samples_equally_and_in_turn():
    calibration = load({"low": numbers(0, 500), "high": [numbers(1000, 2000)]}, samples=5)
    assert calibration.domains == ("low", "high", "low", "high", "low")
    is_high = calibration.input_ids[:, 0] >= 1000
    assert is_high.tolist() == [False, True, False, True, False]


# --- token ids, rows and iterables -------------------------------------------------------------


@pytest.mark.parametrize("as_type", [torch.tensor, list, lambda ids: torch.tensor(ids).numpy()])
def test_one_run_of_ids_is_cut_into_windows_without_a_tokenizer(as_type):
    calibration = load(as_type(list(range(200))), tokenizer=None)
    assert calibration.input_ids.shape == (4, 16)
    assert all(is_run(window) for window in calibration.input_ids)


@pytest.mark.parametrize("as_type", [lambda rows: rows, torch.Tensor.tolist, torch.Tensor.int])
def test_rows_of_ids_are_the_samples_whatever_else_is_asked(as_type):
    rows = torch.arange(40).reshape(5, 8)
    assert torch.equal(load(as_type(rows), tokenizer=None).input_ids, rows)


def test_rows_per_domain_keep_their_number():
    calibration = load({"a": torch.ones(3, 8, dtype=torch.int64), "b": [[2] * 8]}, tokenizer=None)
    assert calibration.domains == ("a", "b", "a", "a")


def test_ids_of_several_documents_are_joined_as_they_are():
    documents = [torch.arange(5), list(range(10, 21)), torch.arange(0)]
    calibration = load(documents, samples=1)
    assert calibration.input_ids.tolist() == [[*range(5), *range(10, 21)]]


def test_an_iterable_is_read_only_as_far_as_needed():
    taken = []

    def many():
        for start in range(100):
            taken.append(start)
            yield "1 2 3 4 5 6 7 8 9 10"

    load(many())  # 64 tokens: six texts of 10 give 60, the seventh is the last
    assert len(taken) == 7


def test_an_iterable_of_batches_is_read_only_as_far_as_needed():
    taken = []

    def batches():
        for start in range(100):
            taken.append(start)
            yield {"input_ids": torch.full((3, 6), start)}

    calibration = load(batches(), tokenizer=None)
    assert calibration.input_ids[:, 0].tolist() == [0, 0, 0, 1]
    assert len(taken) == 2


def test_rows_of_a_dataset_give_their_text():
    rows = datasets.Dataset.from_dict({"text": ["1 2 3 4", "5 6 7 8"], "other": [0, 1]})
    assert load(rows, samples=1, seqlen=4).input_ids.tolist() == [[3, 4, 5, 6]]


def test_the_output_of_a_tokenizer_is_taken_as_ids():
    calibration = load(TOKENIZER([numbers(0, 20)]), tokenizer=None)
    assert calibration.input_ids.tolist() == [list(range(2, 22))]
