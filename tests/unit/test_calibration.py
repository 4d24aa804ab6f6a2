"""Calibration sets: how they are cut, that they repeat, and what each mistake is answered with."""

import hashlib
import itertools
import json

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mxq import demo
from mxq.profiling import calibration as calibration_module
from mxq.profiling.calibration import CalibrationSet, load_calibration

EOS, BOS = 0, 1
FIRST_WORD = 2  # the word "n" has the id n + FIRST_WORD


def make_tokenizer(words=3000, *, bos=False, eos=True):
    """A word-level tokenizer over the numbers, so that a test can read off what was cut."""
    vocabulary = {"<eos>": EOS, "<bos>": BOS}
    vocabulary |= {str(number): number + FIRST_WORD for number in range(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<bos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", BOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>" if eos else None, bos_token="<bos>"
    )


TOKENIZER = make_tokenizer()


def numbers(start, stop):
    return " ".join(map(str, range(start, stop)))


def is_run(window):
    """Whether a window is consecutive numbers: cut from one place of the counting text."""
    return torch.equal(window, torch.arange(int(window[0]), int(window[0]) + len(window)))


def load(spec, *, tokenizer=TOKENIZER, samples=4, seqlen=16, **options):
    return load_calibration(spec, tokenizer, samples=samples, seqlen=seqlen, **options)


class FakeHub:
    """Stands in for ``datasets.load_dataset``: remembers what it is asked for and what is read."""

    def __init__(self, rows):
        self.rows, self.asked, self.rows_read = rows, [], 0

    def __call__(self, path, config, **options):
        self.asked.append((path, config, options))
        for row in self.rows:
            self.rows_read += 1
            yield row


@pytest.fixture
def hub(monkeypatch):
    rows = [{"text": numbers(start, start + 24)} for start in range(0, 2900, 24)]
    fake = FakeHub(rows)
    monkeypatch.setattr(datasets, "load_dataset", fake)
    return fake


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
        (torch.zeros(2, 2, dtype=torch.int64), ("a",), "1 domains for 2 samples"),
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
    with pytest.raises(ValueError, match=r"0\.5 of 1 samples leaves 1 to fit and 0 held out"):
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


# --- named sets --------------------------------------------------------------------------------


def test_wikitext2_is_one_running_text(hub):
    calibration = load("wikitext2")
    (path, config, options) = hub.asked[0]
    assert (path, config) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert (options["split"], options["streaming"]) == ("train", False)
    assert (calibration.name, set(calibration.domains)) == ("wikitext2", {"wikitext2"})
    assert not (calibration.input_ids == EOS).any()


def test_c4_is_streamed_and_no_document_gives_more_than_one_window(hub):
    calibration = load("c4")
    (path, _, options) = hub.asked[0]
    assert (path, options["streaming"]) == ("allenai/c4", True)
    assert options["data_files"] == {"train": "en/c4-train.00000-of-01024.json.gz"}
    # 4 windows of 16, four times as many read, 16 tokens of each document: 16 documents.
    assert hub.rows_read == 16
    runs = [window for window in calibration.input_ids if is_run(window)]
    assert len(runs) < 4  # a document has 24 tokens, so an unclipped one would fill windows
    assert load("c4") == calibration


def test_several_sets_of_the_hub_are_domains(hub):
    assert load("c4,pile,wikitext2", samples=3).domains == ("c4", "pile", "wikitext2")
    assert [path for path, _, _ in hub.asked] == [
        "allenai/c4",
        "NeelNanda/pile-10k",
        "Salesforce/wikitext",
    ]


def test_a_hub_that_cannot_be_reached_names_the_way_out(monkeypatch):
    def unreachable(*args, **options):
        raise OSError("Couldn't reach 'allenai/c4'\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        ConnectionError,
        match=r"'c4' \(allenai/c4 on the Hugging Face hub\) could not be read \(OSError: Couldn't "
        r"reach 'allenai/c4' on the Hub\).*file:PATH, or use demo or self",
    ):
        load("c4")


def test_demo_has_all_its_domains_and_repeats():
    calibration = load("demo", tokenizer=make_character_tokenizer(), samples=10, seqlen=64)
    assert calibration.domains == demo.DOMAINS * 2
    again = load("demo", tokenizer=make_character_tokenizer(), samples=10, seqlen=64)
    assert calibration == again
    assert len(set(map(tuple, calibration.input_ids.tolist()))) == 10


def test_demo_documents_go_on_without_repeating():
    texts = itertools.islice(
        calibration_module._demo()[0].items, 2 * calibration_module.DEMO_DOCUMENTS + 1
    )
    expected = demo.documents(
        "calibration", 2 * calibration_module.DEMO_DOCUMENTS + 1, domain=demo.DOMAINS[0]
    )
    assert list(texts) == [document.text for document in expected]


def make_character_tokenizer():
    vocabulary = {"<eos>": 0} | {chr(code): code for code in range(1, 128)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def test_self_is_written_by_the_model_from_the_seed():
    asked = []

    def model(batch, seqlen, generator):
        asked.append(batch)
        return torch.randint(100, (batch, seqlen), generator=generator)

    one, two, other = (
        load("self", tokenizer=None, samples=10, model=model, seed=seed) for seed in (1, 1, 2)
    )
    assert asked[:2] == [8, 2]
    assert one.domains == ("self",) * 10
    assert one == two != other


# --- files -------------------------------------------------------------------------------------


def test_a_text_file_is_one_text_named_after_the_file(tmp_path):
    (tmp_path / "count.txt").write_text(numbers(0, 500))
    calibration = load(f"file:{tmp_path / 'count.txt'}")
    assert calibration.domains == ("count",) * 4
    assert all(is_run(window) for window in calibration.input_ids)


def test_files_with_names_are_domains(tmp_path):
    (tmp_path / "one.md").write_text(numbers(0, 500))
    rows = [json.dumps({"text": numbers(1000, 1020)}), "", json.dumps({"text": "5 6 7 8 9 10"})]
    (tmp_path / "two.jsonl").write_text("\n".join(rows))
    spec = f"file:books={tmp_path / 'one.md'},code={tmp_path / 'two.jsonl'}"
    calibration = load(spec, samples=2)
    assert calibration.domains == ("books", "code")
    assert calibration.name == spec
    assert load({"x": f"file:{tmp_path / 'one.md'}"}, samples=1).domains == ("x",)


def test_a_path_may_hold_an_equals_sign(tmp_path):
    (tmp_path / "a=b.txt").write_text(numbers(0, 100))
    assert load(f"file:{tmp_path / 'a=b.txt'}").domains == ("a=b",) * 4


# --- mistakes ----------------------------------------------------------------------------------


def wrong_files(folder):
    (folder / "empty.txt").write_text(" \n")
    (folder / "blank.jsonl").write_text("\n")
    (folder / "latin.txt").write_bytes("caf\u00e9 ".encode("latin-1"))
    (folder / "list.jsonl").write_text('{"text": "1 2"}\n[1, 2]\n')
    (folder / "field.jsonl").write_text('{"text": "1 2"}\n\n{"body": "3", "id": 4}\n')
    (folder / "json.jsonl").write_text('{"text": "1 2"}\nhello\n')
    return folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.txt", r"none\.txt does not exist; give a \.txt file"),
        ("", "is a folder; give a .txt file"),
        ("empty.txt", r"empty\.txt is empty; give a file with text"),
        ("blank.jsonl", r"blank\.jsonl is empty"),
        ("latin.txt", r"latin\.txt is not UTF-8"),
        ("json.jsonl", r"json\.jsonl line 2 is not JSON .*each line is an object"),
        ("list.jsonl", r"list\.jsonl line 2 has no string field 'text' \(found: list\)"),
        ("field.jsonl", r"field\.jsonl line 3 has no string field 'text' \(found: body, id\)"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_reason(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        load(f"file:{wrong_files(tmp_path) / name}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("wikitext3", "'wikitext3' is unknown; choose wikitext2, c4, pile .*demo, self, file:PATH"),
        ("c4,demo", "'c4,demo' is unknown"),
        ("file:a=x,b", "'b' in file:a=x,b has no domain name; write file:PATH for one file"),
        ("self", "'self' is written by the model; pass it as model="),
        ([], "'own data' is empty; give text or token ids"),
        ({}, "mapping of calibration domains is empty"),
        ({"a": [numbers(0, 99)], "b": []}, "domain 'b' is empty"),
        ([""], "has 0 tokens, but 4 windows of 16 need at least 40"),
        (["1 2 3"], "has 3 tokens, .*give more text, or lower samples or seqlen"),
        ({str(name): "1" for name in range(5)}, "4 samples cannot be shared between 5 domains"),
        (5, "is a int; give texts, token ids or an iterable"),
        ([{"body": "1"}], "rows with the fields body; expected 'text' or 'input_ids'"),
        ([object()], "holds a object; give texts, or token ids"),
        (torch.rand(20), r"holds torch.float32 of shape \(20,\); token ids are integers"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), r"shape \(1, 2, 3\)"),
        (iter([torch.ones(2, 3).int()]), "has 2 rows of token ids, but 4 samples are needed"),
        (iter([torch.ones(2, 3).int(), torch.ones(2, 4).int()]), "rows of 3 and of 4 tokens"),
        (iter([torch.ones(2, 3).int(), "text"]), "mixes rows of samples with other items"),
        (iter(["text", torch.ones(2, 3).int()]), "mixes rows of samples with other items"),
        ({"a": torch.ones(2, 3).int(), "b": torch.ones(2, 4).int()}, r"length \(a 3, b 4\)"),
    ],
)
def test_a_mistake_in_the_request_is_answered(spec, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").write_text("1")
    with pytest.raises(ValueError, match=message):
        load(spec)


def test_a_name_that_is_a_file_is_answered_with_the_spelling(tmp_path):
    (tmp_path / "mine.txt").write_text("1")
    with pytest.raises(ValueError, match=r"for the file of that name write file:.*mine\.txt"):
        load(str(tmp_path / "mine.txt"))


def test_two_domains_of_one_name_are_refused(tmp_path):
    (tmp_path / "x.txt").write_text("1")
    with pytest.raises(ValueError, match="domains a, a are not all different"):
        load(f"file:a={tmp_path / 'x.txt'},a={tmp_path / 'x.txt'}")


def test_padded_rows_are_refused():
    rows = {"input_ids": torch.ones(4, 16).int(), "attention_mask": torch.ones(4, 16).int()}
    assert load(rows, tokenizer=None).tokens == 64
    rows["attention_mask"][2, 3] = 0
    with pytest.raises(ValueError, match="holds padded rows"):
        load(rows, tokenizer=None)


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"seqlen": 0}, {"samples": -1}])
def test_counts_below_one_are_refused(wrong):
    with pytest.raises(ValueError, match="both must be at least 1"):
        load("demo", **wrong)


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match="text needs a tokenizer; pass the model's tokenizer"):
        load([numbers(0, 100)], tokenizer=None)


def test_an_id_outside_the_vocabulary_is_named():
    ids = torch.zeros(4, 16, dtype=torch.int64)
    ids[2, 5] = 50
    message = r"token id 50 \(sample 2, position 5\) is outside the vocabulary of 50"
    with pytest.raises(ValueError, match=message):
        load(ids, vocab_size=50)
    assert load(ids, vocab_size=51).tokens == 64
    with pytest.raises(ValueError, match=r"token id -1 .*outside the vocabulary;"):
        load(ids - 1)


def test_ids_of_the_wrong_shape_from_the_model_are_refused():
    with pytest.raises(ValueError, match=r"the model wrote ids of shape \(4, 15\); expected"):
        load("self", model=lambda batch, seqlen, generator: torch.ones(batch, seqlen - 1))
