"""Calibration sets by name, from files and from the model; what each mistake is answered with."""

import itertools
import json

import datasets
import pytest
import torch
from counting import EOS, is_run, load, numbers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mxq import demo
from mxq.profiling import calibration as calibration_module


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
