"""The evaluation scripts on tiny models: numbers against slow loops, and their error lines."""

import json
import math
import sys
from pathlib import Path

import datasets
import pytest
import torch
from evaluating import SCRIPTS, TEXT, error_line, log_likelihood, run, save_model, script
from lm_eval import tasks
from transformers import AutoModelForCausalLM

from mxq import demo, scoring
from mxq.evaluation import demo_tasks, domains, harness, loading, reference, texts

perplexity = script("perplexity")
zero_shot = script("zero_shot")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture
def text_file(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


def slow_scores(folder, reference, window):
    """Sums over positions, one at a time, in double precision: nll, kl, equal top tokens, count."""
    ours, theirs = (AutoModelForCausalLM.from_pretrained(name) for name in (folder, reference))
    ids = [ord(character) for character in TEXT]
    sums = [0.0, 0.0, 0.0, 0]
    for start in range(0, len(ids), window):
        piece = torch.tensor([ids[start : start + window]])
        with torch.no_grad():
            log_p, log_q = (m(piece).logits[0].double().log_softmax(-1) for m in (ours, theirs))
        for position in range(piece.shape[1] - 1):
            target = int(piece[0, position + 1])
            sums[0] -= float(log_p[position, target])
            for p, q in zip(log_p[position].tolist(), log_q[position].tolist(), strict=True):
                sums[1] += math.exp(q) * (q - p)
            sums[2] += float(log_p[position].argmax() == log_q[position].argmax())
            sums[3] += 1
    return sums


# --- perplexity --------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "batch"), [(16, 3), (100, 1), (512, 1)])
def test_scores_match_a_slow_loop(
    model_folder, other_folder, text_file, tmp_path, *, window, batch, capsys
):
    # Windows of 16 leave a rest of 6 (tests the tail), one of 512 is longer than the text.
    options = ("--reference", other_folder, "--window", window, "--batch", batch)
    report = run(perplexity, tmp_path, model_folder, "--text", text_file, *options)
    reference, result = report["models"]
    nll, kl, same, count = slow_scores(model_folder, other_folder, window)
    assert result["tokens"] == count
    # float32 logits of size 10 and 128 of them in a sum: errors of about 1e-5 per token at most.
    assert result["nll"]["value"] == pytest.approx(nll / count, abs=1e-5)
    assert result["perplexity"]["value"] == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert result["kl"]["value"] == pytest.approx(kl / count, abs=1e-5)
    assert result["flips"]["value"] == pytest.approx(1 - same / count)
    assert reference["model"] == report["reference"] == other_folder
    assert reference["nll"]["value"] != pytest.approx(result["nll"]["value"], abs=1e-3)
    printed = capsys.readouterr().out
    assert f"{result['perplexity']['value']:.4f}" in printed
    assert f"{result['kl']['value']:.6f}" in printed


def test_a_model_has_distance_zero_to_itself(model_folder, text_file, tmp_path):
    (result,) = run(
        perplexity, tmp_path, model_folder, "--text", text_file, "--reference", model_folder
    )["models"]
    assert (result["kl"]["value"], result["flips"]["value"]) == (0.0, 0.0)


def test_json_holds_what_was_measured_and_on_what(model_folder, text_file, tmp_path):
    result = run(perplexity, tmp_path, model_folder, "--text", text_file, "--limit", "40")
    (model,) = result["models"]
    assert set(model) == {"model", "tokens", "windows", "nll", "perplexity", "domains"}
    assert (model["model"], result["text"]) == (model_folder, text_file)
    assert set(result["versions"]) == {"mxq", "torch", "transformers"}
    assert result["window"] == 512  # what the model knows, as that is less than 2048
    assert (model["tokens"], model["windows"], result["limit"]) == (39, 1, 40)
    assert (result["confidence"], result["draws"], result["seed"]) == (0.95, 10_000, 0)
    assert model["nll"]["stderr"] is None  # one window has no spread


def test_a_rest_of_one_token_is_not_scored(model_folder, text_file, tmp_path):
    arguments = (model_folder, "--text", text_file, "--limit", "33", "--window", "16")
    assert run(perplexity, tmp_path, *arguments)["models"][0]["tokens"] == 30


def test_documents_are_joined_by_end_of_text(model_folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "abc"}\n{"text": "de"}\n')
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "abc\0de"}))  # 0 is end-of-text
    rows, one = (
        run(perplexity, tmp_path, model_folder, "--text", tmp_path / name)["models"][0]
        for name in ("rows.jsonl", "one.jsonl")
    )
    assert (rows["tokens"], rows["nll"]) == (one["tokens"], one["nll"])
    assert rows["tokens"] == 5


def test_demo_text_is_held_out_from_calibration(model_folder, tmp_path):
    result = run(perplexity, tmp_path, model_folder, "--text", "demo", "--limit", "200")
    found = {name: loss["tokens"] for name, loss in result["models"][0]["domains"].items()}
    assert found == dict.fromkeys(demo.DOMAINS, 199)
    assert (result["text"], result["models"][0]["tokens"]) == ("demo", 5 * 199)
    documents = {document.text for document in demo.documents("heldout", 200)}
    assert {text for name in demo.DOMAINS for text in domains.read_texts("demo")[name]} == documents


def test_wikitext2_is_the_test_split_as_one_text(model_folder, tmp_path, monkeypatch):
    asked = []

    def load_dataset(path, config, **options):
        asked.append((path, config, options["split"]))
        return [{"text": "ab"}, {"text": "cd"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    result = run(perplexity, tmp_path, model_folder, "--text", "wikitext2")
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test")]
    assert result["models"][0]["tokens"] == len("ab\n\ncd") - 1


def test_windows_and_batches_by_hand():
    # 7 tokens in windows of 2: three windows, in batches of two and one; the seventh is left out.
    ids_T = torch.arange(7)
    assert [b.tolist() for b in scoring.windows(ids_T, 2, 2)] == [[[0, 1], [2, 3]], [[4, 5]]]
    assert [b.tolist() for b in scoring.windows(ids_T, 5)] == [[[0, 1, 2, 3, 4]], [[5, 6]]]
    with pytest.raises(ValueError, match="the text has 1 token; scoring needs at least 2"):
        scoring.windows(ids_T[:1], 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "./no/such/folder"}, "model folder ./no/such/folder does not exist; give a"),
        ({"model": __file__}, "is a file; give a folder as save_pretrained writes it"),
        ({"model": str(SCRIPTS)}, "holds no config.json; give a folder"),
        ({"--text": "none.txt"}, "text file none.txt does not exist; give a .txt file"),
        ({"--window": "1"}, "window is 1; it takes 2 tokens to score one, so at least 2"),
        ({"--window": "513"}, "window 513 is longer than the 512 positions of the model"),
        ({"--batch": "0"}, "batch is 0; it must be at least 1"),
        ({"--limit": "1"}, "limit is 1 token; scoring needs at least 2"),
        ({"--reference": "/no/folder"}, "model folder /no/folder does not exist"),
        ({"--json": "/no/result.json"}, "/no/result.json needs the folder /no; make it first"),
    ],
)
def test_a_mistake_is_one_line(model_folder, text_file, capsys, change, message):
    options = {"--text": text_file, **change}
    model = options.pop("model", model_folder)
    line = error_line(perplexity, capsys, model, *sum(options.items(), ()))
    assert line.startswith("perplexity: ")
    assert message in line


def test_a_reference_of_another_vocabulary_is_refused(model_folder, text_file, tmp_path, capsys):
    small = save_model(tmp_path / "small", seed=0, vocabulary=100)
    arguments = (model_folder, "--text", text_file, "--reference", small)
    line = error_line(perplexity, capsys, *arguments)
    assert "have other vocabularies (100 and 128 tokens, 28 entries differ)" in line


def test_a_reference_of_another_number_of_logits_is_refused(model_folder, tmp_path):
    small = save_model(tmp_path / "small", seed=0, vocabulary=100)
    ours, theirs = (loading.load_model(name, device="cpu") for name in (model_folder, small))
    ids = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="the reference gives 100 logits per token, the model 128"):
        texts.score(ours, [("a", ids)], [0], lambda *_: reference.model_logits(theirs, ids))


def test_logits_that_are_not_finite_are_refused(model_folder):
    model = loading.load_model(model_folder, device="cpu")
    model.lm_head.weight.data[5] = math.nan
    with pytest.raises(ValueError, match="not finite somewhere in the text"):
        texts.score(model, [("a", torch.ones(1, 4, dtype=torch.int64))], [0])


def test_a_model_that_the_hub_does_not_give_is_one_line(text_file, capsys, monkeypatch):
    def unreachable(name, **options):
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", unreachable)
    line = error_line(perplexity, capsys, "owner/model", "--text", text_file)
    assert line == (
        "perplexity: model 'owner/model' is no folder here, and from the hub it could not be "
        "loaded: We couldn't connect to the hub"
    )


def test_the_word_demo_is_the_embedded_model():
    assert loading.resolve("demo") == str(demo.model_path())


# --- zero-shot ---------------------------------------------------------------------------------

QUESTIONS = [
    {"question": "2+2=", "choices": ["4", "five"], "answer": 0},
    {"question": "a, b, ", "choices": ["x", "c", "yes"], "answer": 1},
    {"question": "up or ", "choices": ["down", "blue"], "answer": 0},
]


@pytest.fixture
def task_folder(tmp_path):
    """A local task in the form of the harness; its data are cached beside it."""
    rows = "".join(json.dumps(question) + "\n" for question in QUESTIONS)
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "mine.yaml").write_text(
        f"""
task: mine
dataset_path: json
dataset_kwargs:
  data_files: {{test: {tmp_path / "rows.jsonl"}}}
  cache_dir: {tmp_path / "cache"}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
    )
    return tmp_path


def slow_accuracy(folder, questions):
    """Share of (prompt, choices, answer) where the model likes the answer best."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    right = 0
    for prompt, choices, answer in questions:
        scores = [log_likelihood(model, prompt, choice) for choice in choices]
        right += scores.index(max(scores)) == answer
    return right / len(questions)


def test_accuracy_of_a_local_task_matches_a_slow_loop(model_folder, task_folder, capsys):
    arguments = (model_folder, "--tasks", "mine", "--task-path", task_folder, "--batch", "2")
    result = run(zero_shot, task_folder, *arguments)
    share = slow_accuracy(model_folder, [tuple(question.values()) for question in QUESTIONS])
    found = result["models"][0]["tasks"]["mine"]
    assert found["metrics"]["acc"]["value"] == pytest.approx(share)
    # Standard error of a mean with the sample variance: sqrt(share (1 - share) / (n - 1)).
    error = math.sqrt(share * (1 - share) / 2)
    assert found["metrics"]["acc"]["stderr"] == pytest.approx(error)
    assert set(found) == {"metrics", "n", "shots"}
    assert (found["n"], found["shots"]) == (3, 0)
    assert set(result["versions"]) == {"mxq", "torch", "transformers", "lm_eval"}
    assert "mine" in capsys.readouterr().out


def test_accuracy_of_demo_tasks_matches_a_slow_loop(model_folder, tmp_path):
    domain = demo.DOMAINS[0]
    options = ("--tasks", f"demo,demo_{domain}", "--limit", "20", "--batch", "8")
    result = run(zero_shot, tmp_path, model_folder, *options)
    (model,) = result["models"]
    assert set(model["tasks"]) == {"demo", f"demo_{domain}"}
    metrics = model["tasks"]["demo"]["metrics"]
    assert set(metrics) == {"acc", "acc_norm"}
    assert model["tasks"]["demo"]["n"] == 20
    questions = [(q.prompt, q.choices, q.answer) for q in demo.questions(20)]
    assert metrics["acc"]["value"] == pytest.approx(slow_accuracy(model_folder, questions))


def test_a_model_that_rules_tokens_out_has_an_accuracy(model_folder, tmp_path, monkeypatch):
    options = ("--tasks", "demo", "--limit", "4")
    expected = run(zero_shot, tmp_path, model_folder, *options)
    load = harness.load_model

    def rule_out(module, inputs, output):
        output.logits[..., -1] = -math.inf

    def ruled_out(name, **others):
        model = load(name, **others)
        model.register_forward_hook(rule_out)
        return model

    monkeypatch.setattr(harness, "load_model", ruled_out)
    found = run(zero_shot, tmp_path, model_folder, *options)
    assert found["models"][0]["tasks"].keys() == expected["models"][0]["tasks"].keys()


def test_a_broken_model_has_no_accuracy(model_folder, tmp_path, capsys):
    folder = tmp_path / "broken"
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.lm_head.weight.data[5] = math.nan
    model.save_pretrained(folder)
    for path in Path(model_folder).glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    assert zero_shot.main([str(folder), "--tasks", "demo", "--limit", "4"]) == 1
    assert "not finite somewhere; the model is broken" in capsys.readouterr().err


def test_demo_questions_of_a_domain_are_of_that_domain(tmp_path):
    domain = demo.DOMAINS[1]
    demo_tasks.write_demo_tasks(tmp_path, ["demo", f"demo_{domain}"])
    rows, mixed = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in (f"demo_{domain}", "demo")
    )
    everything = demo.questions(demo_tasks.DEMO_QUESTIONS * len(demo.DOMAINS))
    expected = [question for question in everything if question.domain == domain]
    assert [row["prompt"] for row in rows] == [question.prompt for question in expected]
    assert [row["answer"] for row in mixed] == [
        question.answer for question in everything[: demo_tasks.DEMO_QUESTIONS]
    ]


def test_examples_of_demo_tasks_are_no_questions_of_them(tmp_path):
    names = [f"demo_{domain}" for domain in demo.DOMAINS]
    demo_tasks.write_demo_tasks(tmp_path, names)
    everything = demo.questions(240 * len(demo.DOMAINS))
    for name in names:
        asked, examples = (
            [json.loads(line)["prompt"] for line in (tmp_path / file).read_text().splitlines()]
            for file in (f"{name}.jsonl", f"{name}-examples.jsonl")
        )
        assert len(examples) >= 38  # two of a domain have the short prompt of a question
        assert set(examples).isdisjoint(asked)
        assert set(examples) <= {q.prompt for q in everything if name == f"demo_{q.domain}"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--limit": "0"}, "limit is 0; it must be at least 1"),
        ({"--batch": "0"}, "batch is 0; it must be at least 1"),
        ({"--json": "/no/result.json"}, "/no/result.json needs the folder /no; make it first"),
        ({"--task-path": "/no/folder"}, "task folder /no/folder does not exist"),
        ({"model": "/no/folder"}, "model folder /no/folder does not exist; give a folder"),
    ],
)
def test_a_mistake_in_the_tasks_is_one_line(model_folder, task_folder, capsys, change, message):
    options = {"--tasks": "mine", "--task-path": task_folder, **change}
    model = options.pop("model", model_folder)
    line = error_line(zero_shot, capsys, model, *sum(options.items(), ()))
    assert line.startswith("zero_shot: ")
    assert message in line


def test_an_unknown_task_gets_the_menu(model_folder, task_folder, capsys, monkeypatch):
    with_standard_tasks = []

    class Manager(tasks.TaskManager):
        """Leaves out the standard tasks, whose index takes ten seconds to read."""

        def __init__(self, *, include_path, include_defaults):
            with_standard_tasks.append(include_defaults)
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(tasks, "TaskManager", Manager)
    arguments = ("--tasks", "mine,nonsense", "--task-path", task_folder)
    line = error_line(zero_shot, capsys, model_folder, *arguments)
    assert with_standard_tasks == [False, True]
    assert "nonsense is no task here; choose mine, demo, demo_" in line
    assert "or a standard task" in line


def test_a_missing_harness_is_one_line(model_folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    line = error_line(zero_shot, capsys, model_folder, "--tasks", "demo")
    assert "install it with: pip install 'mxq[eval]'" in line


def test_questions_that_the_hub_does_not_give_are_one_line(
    model_folder, task_folder, capsys, monkeypatch
):
    def unreachable(*args, **options):
        raise ConnectionError("Couldn't reach 'allenai/ai2_arc'\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    arguments = ("--tasks", "mine", "--task-path", task_folder)
    line = error_line(zero_shot, capsys, model_folder, *arguments)
    assert "the questions of mine could not be read (Couldn't reach 'allenai/ai2_arc'" in line
    assert "use --tasks demo, or local tasks with --task-path FOLDER" in line
