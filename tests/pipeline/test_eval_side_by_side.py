"""Several models in one run of the evaluation scripts: paired differences, domains, comparisons."""

import json
import math
import re
import sys
from statistics import mean, stdev

import pytest
import torch
from checkpoints import write_checkpoint
from evaluating import TEXT, error_line, log_likelihood, run, save_model, script
from tiny import save_tiny
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

import mxq
from mxq.evaluation import harness, loading, plot, reference, tasks, texts
from mxq.evaluation.plot import Point
from mxq.evaluation.statistics import Estimate

perplexity = script("perplexity")
zero_shot = script("zero_shot")
compare = script("compare")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three models of one vocabulary."""
    return [save_model(tmp_path_factory.mktemp("model"), seed=seed) for seed in range(3)]


@pytest.fixture
def text_file(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


@pytest.fixture
def no_model(monkeypatch):
    """A test that loads a model fails."""

    def refuse(name, **options):
        raise AssertionError(f"{name} was loaded before the mistake was found")

    for module in (texts, harness):
        monkeypatch.setattr(module, "load_model", refuse)


def window_nll(folder, window):
    """Slow, in double precision: tokens and nll of each window of TEXT."""
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    ids = [ord(character) for character in TEXT]
    found = []
    for start in range(0, len(ids), window):
        piece = torch.tensor([ids[start : start + window]])
        with torch.no_grad():
            log_p = model(piece).logits[0, :-1].log_softmax(-1)
        nll = -log_p.gather(-1, piece[0, 1:, None]).sum()
        found.append((piece.shape[1] - 1, float(nll)))
    return found


# --- perplexity --------------------------------------------------------------------------------


def test_the_difference_of_two_models_is_judged_window_by_window(
    folders, text_file, tmp_path, capsys
):
    report = run(perplexity, tmp_path, *folders[:2], "--text", text_file, "--window", 37)
    first, second = report["models"]
    assert "difference" not in first
    slow = [window_nll(folder, 37) for folder in folders[:2]]
    assert [len(found) for found in slow] == [6, 6]  # 222 tokens: all windows are equally long
    per_token = [b / n - a / n for (n, a), (_, b) in zip(*slow, strict=True)]
    found = second["difference"]["nll"]
    # float32 logits of size 10: errors of about 1e-5 per token at most.
    assert found["value"] == pytest.approx(mean(per_token), abs=1e-5)
    assert found["stderr"] == pytest.approx(stdev(per_token) / math.sqrt(6), abs=1e-5)
    assert found["low"] < found["value"] < found["high"]
    ratio = second["difference"]["perplexity_ratio"]["value"]
    assert ratio == pytest.approx(second["perplexity"]["value"] / first["perplexity"]["value"])
    printed = capsys.readouterr().out
    assert f"{found['value']:+.4f} +- {found['stderr']:.4f}" in printed
    assert f"{ratio - 1:+.2%} +-" in printed


def test_a_model_beside_itself_differs_by_exactly_nothing(folders, text_file, tmp_path):
    arguments = (folders[0], f"{folders[0]}/", "--text", text_file, "--window", 20)
    _, again = run(perplexity, tmp_path, *arguments, "--reference", folders[1])["models"][1:]
    nothing = {"value": 0, "stderr": 0, "low": 0, "high": 0}
    # Its distance to itself is nothing, but that of the other model, the baseline, is not.
    report = run(perplexity, tmp_path, *arguments, "--baseline", folders[0])
    assert report["models"][1]["difference"]["nll"] == nothing
    assert again["difference"]["kl"]["value"] == again["kl"]["value"] > 0


def test_differences_are_to_the_baseline(folders, text_file, tmp_path):
    arguments = (*folders[:2], "--text", text_file, "--reference", folders[2], "--window", 40)
    report = run(perplexity, tmp_path, *arguments, "--baseline", folders[1])
    assert [row["model"] for row in report["models"]] == [folders[2], folders[0], folders[1]]
    kept, first, base = report["models"]
    assert "difference" not in base
    for row in (kept, first):
        for name in ("nll", "kl", "flips"):
            apart = row[name]["value"] - base[name]["value"]
            assert row["difference"][name]["value"] == pytest.approx(apart)


def test_the_numbers_do_not_depend_on_where_the_reference_waits(folders, text_file, tmp_path):
    arguments = (*folders[:2], "--text", text_file, "--reference", folders[2], "--window", 50)
    kept, again = (
        run(perplexity, tmp_path, *arguments, "--keep-logits", choice) for choice in ("yes", "no")
    )
    assert kept == again
    assert kept["models"][1]["kl"]["value"] > 0


@pytest.mark.parametrize(("free", "kept"), [(10**9, [0, 1]), (10, [])])
def test_logits_are_kept_where_they_fit(monkeypatch, free, kept):
    monkeypatch.setattr(reference, "_free_bytes", lambda: free)
    logits = reference.ReferenceLogits([torch.zeros(1, 5), torch.zeros(1, 3)], "auto")
    for number, positions in enumerate((4, 2)):
        logits.record(number, torch.ones(1, positions, 7))
    assert sorted(logits._kept) == kept
    # 6 positions of 7 numbers of 4 bytes: what it asks for, from the first batch.
    assert logits._needed_bytes(torch.ones(1, 4, 7)) == 6 * 7 * 4


def test_kept_logits_are_in_files(tmp_path, monkeypatch):
    logits = reference.ReferenceLogits([torch.zeros(1, 5)], "yes")
    given = torch.rand(1, 4, 7)
    logits.record(0, given.clone())
    assert logits._store.disk_bytes == given.nbytes
    assert torch.equal(logits.replay(0, torch.zeros(1)), given)


def test_domains_are_scored_apart_and_together(folders, text_file, tmp_path, capsys):
    (tmp_path / "b.txt").write_text("abcdefgh" * 20)
    spec = f"long={text_file},alphabet={tmp_path / 'b.txt'}"
    report = run(perplexity, tmp_path, folders[0], "--text", spec, "--window", 32, "--per-domain")
    (model,) = report["models"]
    assert list(model["domains"]) == ["long", "alphabet"]
    alone = [
        run(perplexity, tmp_path, folders[0], "--text", path, "--window", 32)["models"][0]
        for path in (text_file, tmp_path / "b.txt")
    ]
    for found, expected in zip(model["domains"].values(), alone, strict=True):
        del expected["domains"], expected["model"]
        assert found == expected
    tokens = [loss["tokens"] for loss in alone]
    total = sum(loss["nll"]["value"] * loss["tokens"] for loss in alone)
    assert (model["tokens"], model["windows"]) == (sum(tokens), 7 + 5)
    assert model["nll"]["value"] == pytest.approx(total / sum(tokens))
    # Windows are drawn within their domain, so what sets the domains apart is no uncertainty.
    errors = [loss["nll"]["stderr"] * loss["tokens"] for loss in alone]
    assert model["nll"]["stderr"] <= 1.5 * math.hypot(*errors) / sum(tokens)
    printed = capsys.readouterr().out
    assert re.search(rf"alphabet +│ +5 │ +{alone[1]['perplexity']['value']:.4f}", printed)


def test_the_limit_holds_for_each_domain(folders, text_file, tmp_path):
    spec = f"a={text_file},b={text_file}"
    report = run(perplexity, tmp_path, folders[0], "--text", spec, "--limit", 30)
    assert [loss["tokens"] for loss in report["models"][0]["domains"].values()] == [29, 29]


def test_a_wider_interval_comes_from_a_higher_confidence(folders, text_file, tmp_path):
    arguments = (folders[0], "--text", text_file, "--window", 10, "--confidence")
    narrow, wide = (
        run(perplexity, tmp_path, *arguments, share)["models"][0]["nll"] for share in (0.5, 0.99)
    )
    assert wide["low"] < narrow["low"] < narrow["high"] < wide["high"]


def test_few_windows_are_pointed_at(folders, text_file, tmp_path, capsys):
    run(perplexity, tmp_path, folders[0], "--text", text_file, "--window", 100)
    assert "With as few as 3 windows they are too narrow" in " ".join(
        capsys.readouterr().out.split()
    )
    run(perplexity, tmp_path, folders[0], "--text", text_file)
    assert "No intervals: they need at least 2 windows" in " ".join(capsys.readouterr().out.split())


def test_a_name_with_brackets_is_printed_as_it_is(folders, text_file, tmp_path, capsys):
    folder = save_model(tmp_path / "a[b]c", seed=0)
    arguments = (folders[1], folder, "--text", text_file, "--window", 50, "--reference", folder)
    run(perplexity, tmp_path, *arguments, "--baseline", folders[1])
    # In a row and under the first table; in a row of the second one, which is to the other model.
    assert "".join(capsys.readouterr().out.split()).count("a[b]c") == 3
    run(perplexity, tmp_path, *arguments)
    # In a row of the first table and under it; over the second one.
    assert "".join(capsys.readouterr().out.split()).count("a[b]c") == 3


def test_models_that_cut_a_text_differently_are_refused(
    folders, text_file, tmp_path, capsys, no_model
):
    lower = save_model(tmp_path / "lower", seed=0)
    path = tmp_path / "lower" / "tokenizer.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "normalizer": {"type": "Lowercase"}}))
    assert Tokenizer.from_file(str(path)).encode("A").ids != [65]
    line = error_line(perplexity, capsys, folders[0], lower, "--text", text_file)
    assert f"{lower} turn the text 'text' into other token ids; only models with one" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--text": "a={text},b"}, ",b is no NAME=PATH; write PATH for one text, or NAME=PATH,"),
        ({"--text": "a={text},a={text}"}, "names the domain 'a' twice; give each a name"),
        ({"--text": "a={text},b={short}"}, "the text 'b' has 1 token; scoring needs at least 2"),
        ({"--confidence": "95"}, "confidence is 95; it is a share from 0.5 to below 1"),
        ({"--baseline": "x"}, "baseline x is none of the models; choose "),
        ({"--reference": "/no/folder"}, "model folder /no/folder does not exist"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(
    folders, text_file, tmp_path, capsys, no_model, change, message
):
    (tmp_path / "short.txt").write_text("a")
    options = {"--text": text_file, **change}
    options["--text"] = options["--text"].format(text=text_file, short=tmp_path / "short.txt")
    line = error_line(perplexity, capsys, *folders[:2], *sum(options.items(), ()))
    assert line.startswith("perplexity: ")
    assert message in line


@pytest.mark.parametrize("mixed", [True, False])
def test_exports_that_transformers_would_decode_wrongly_are_refused(mixed, text_file, tmp_path):
    save_tiny(tmp_path / "original")
    menu = "w3a16_g32_sym,w4a16_g32_sym" if mixed else "w4a16_g32_sym"
    packed = write_checkpoint(tmp_path / "original", tmp_path / "packed", menu=menu)
    mxq.export(packed, tmp_path / "out", to="compressed-tensors")
    for name in (str(packed), "demo"):
        loading.require_decodable(name)
    if not mixed:
        loading.require_decodable(str(tmp_path / "out"))
        return
    names = (str(packed), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="which transformers decodes as one without a word"):
        texts.prepare(names, texts.TextOptions(text_file))
    with (
        pytest.raises(ValueError, match="score the mxq checkpoint that it was exported from"),
        tasks.prepared_tasks(names, tasks.TaskOptions(("demo",))),
    ):
        pass


# --- zero-shot ---------------------------------------------------------------------------------

LETTERS = "abcdefghijklmnopqrst"


def write_task(folder, name, questions, *, examples=(), **changes):
    """A task of the harness whose prompts, choices and answers are given."""
    files = {}
    for split, rows in (("test", questions), ("train", examples)):
        if rows:
            path = folder / f"{name}-{split}.jsonl"
            fields = [
                dict(zip(("question", "choices", "answer"), row, strict=True)) for row in rows
            ]
            path.write_text("".join(json.dumps(row) + "\n" for row in fields))
            files[split] = str(path)
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
        **({"training_split": "train", "fewshot_split": "train"} if examples else {}),
        **({"fewshot_config": {"sampler": "first_n"}} if examples else {}),
        **changes,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task))


def questions(count, offset=0):
    """Which of three words follows a letter: random for a random model."""
    return [
        (f"{LETTERS[(index + offset) % 20]}{index} ", ["yes", "no", "so"], index % 3)
        for index in range(count)
    ]


def right_answers(folder, asked, prefix=""):
    """Slow: 1 for each question where the model likes the answer best, else 0."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = []
    for prompt, choices, answer in asked:
        scores = [log_likelihood(model, prefix + prompt, choice) for choice in choices]
        found.append(int(scores.index(max(scores)) == answer))
    return found


def test_the_difference_of_accuracies_is_judged_question_by_question(folders, tmp_path, capsys):
    asked = questions(20)
    write_task(tmp_path, "mine", asked)
    arguments = ("--tasks", "mine", "--task-path", tmp_path, "--batch", 4)
    report = run(zero_shot, tmp_path, *folders[:2], folders[0], *arguments)
    first, second, again = (row["tasks"]["mine"] for row in report["models"])
    slow = [right_answers(folder, asked) for folder in folders[:2]]
    apart = [ours - theirs for theirs, ours in zip(*slow, strict=True)]
    assert 0 < sum(map(abs, apart)) < 20  # some questions tell them apart
    assert "differences" not in first
    found = second["differences"]["acc"]
    assert found["difference"]["value"] == pytest.approx(mean(apart))
    assert found["difference"]["stderr"] == pytest.approx(stdev(apart) / math.sqrt(20))
    assert (found["gained"], found["lost"]) == (apart.count(1), apart.count(-1))
    assert again["differences"]["acc"] == {
        "difference": {"value": 0, "stderr": 0, "low": 0, "high": 0},
        "gained": 0,
        "lost": 0,
    }
    assert f"({apart.count(1)} gained, {apart.count(-1)} lost)" in capsys.readouterr().out


def test_examples_come_before_each_question(folders, tmp_path):
    asked, examples = questions(12), questions(4, offset=7)
    write_task(tmp_path, "mine", asked, examples=examples)
    arguments = (folders[0], "--tasks", "mine", "--task-path", tmp_path, "--shots", 2)
    found = run(zero_shot, tmp_path, *arguments)["models"][0]["tasks"]["mine"]
    prefix = "".join(f"{prompt}{choices[answer]}\n\n" for prompt, choices, answer in examples[:2])
    right, without = (right_answers(folders[0], asked, text) for text in (prefix, ""))
    assert right != without  # the examples matter to this model
    assert found["metrics"]["acc"]["value"] == pytest.approx(mean(right))
    assert found["shots"] == 2


def test_a_group_is_judged_over_the_questions_of_its_tasks(folders, tmp_path):
    parts = {"one": questions(8), "two": questions(4, offset=3)}
    for name, asked in parts.items():
        write_task(tmp_path, name, asked)
    group = {"group": "both", "task": list(parts), "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "both.yaml").write_text(json.dumps(group))
    arguments = (*folders[:2], "--tasks", "both", "--task-path", tmp_path)
    results = [row["tasks"] for row in run(zero_shot, tmp_path, *arguments)["models"]]
    assert set(results[0]) == {"both", "one", "two"}
    apart = []
    for asked in parts.values():
        theirs, ours = (right_answers(folder, asked) for folder in folders[:2])
        apart.append([b - a for a, b in zip(theirs, ours, strict=True)])
    found = results[1]["both"]
    assert found["n"] == 12
    assert found["differences"]["acc"]["difference"]["value"] == pytest.approx(
        sum(map(sum, apart)) / 12
    )
    counts = tuple(sum(part.count(change) for part in apart) for change in (1, -1))
    assert (found["differences"]["acc"]["gained"], found["differences"]["acc"]["lost"]) == counts


def test_a_metric_that_is_no_mean_has_no_interval():
    # The harness says 0.7 for answers whose mean is 0.5, as for an F1 over all questions.
    samples = [{"doc_id": place, "filter": "none", "f1": place % 2} for place in range(4)]
    output = {
        "results": {"t": {"alias": "t", "f1,none": 0.7, "f1_stderr,none": "N/A"}},
        "group_subtasks": {},
        "samples": {"t": samples},
        "n-samples": {"t": {"effective": 4}},
        "n-shot": {"t": 0},
    }
    ((name, answers),) = harness._all_answers(output)
    result = tasks._result(answers, answers, 0.95)
    assert (name, dict(answers.questions)) == ("t", {})
    assert result.metrics == {"f1": Estimate(0.7)}
    assert result.differences["f1"].difference == Estimate(0)


def test_questions_are_paired_by_their_number_and_filter():
    samples = [
        {"doc_id": 1, "filter": "none", "acc": 0},
        {"doc_id": 0, "filter": "none", "acc": 1},
        {"doc_id": 0, "filter": "strict", "acc": 0},
    ]
    (stratum,) = harness._strata("acc,none", ["t"], {"t": samples})
    assert stratum.sums_QU.tolist() == [[1, 0]]
    assert harness._strata("acc,none", ["t"], {"t": [{"doc_id": 0, "filter": "none"}]}) is None


def test_the_harness_is_told_batch_shots_and_limit(folders, tmp_path, monkeypatch):
    import lm_eval

    told = {}

    def evaluate(*, lm, **options):
        told.update(options, batch=lm.batch_size)
        return {"results": {}}

    monkeypatch.setattr(lm_eval, "evaluate", evaluate)
    write_task(tmp_path, "mine", questions(5), examples=questions(4, offset=7), num_fewshot=1)
    manager = harness.task_manager(["mine"], [str(tmp_path)])
    for shots, expected in ((3, 3), (0, 0), (None, 1)):
        harness.ask(folders[0], manager, harness.Request(("mine",), shots, 7, None, "cpu"))
        assert (told["batch"], told["limit"]) == ("auto", 7)
        ((name, task),) = told["task_dict"]["tasks"].items()
        assert (name, task.get_config("num_fewshot")) == ("mine", expected)


def test_answers_are_those_of_the_harness_own_command(folders, tmp_path, monkeypatch, capfd):
    """The same random examples and numbers, without asking git where there is no repository."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    sampled = {"fewshot_config": {"sampler": "default"}}
    write_task(tmp_path, "mine", questions(12), examples=questions(9, offset=7), **sampled)
    manager = harness.task_manager(["mine"], [str(tmp_path)])
    request = harness.Request(("mine",), 2, 10, 1, "cpu")
    found = harness.ask(folders[0], manager, request)["mine"]
    assert "fatal" not in capfd.readouterr().err
    model, tokenizer = loading.load_model(folders[0], device="cpu"), FastTokenizer
    expected = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer.from_pretrained(folders[0])),
        tasks=["mine"],
        num_fewshot=2,
        task_manager=manager,
        limit=10,
    )
    assert "fatal: not a git repository" in capfd.readouterr().err  # it would have been seen
    asked = sorted(expected["samples"]["mine"], key=lambda sample: sample["doc_id"])
    assert found.n == len(asked) == 10
    assert found.questions["acc"][0].sums_QU.tolist() == [[row["acc"] for row in asked]]
    assert 0 < found.means["acc"][0] == expected["results"]["mine"]["acc,none"] < 1


def test_titles_say_what_shots_and_limits_count(folders, tmp_path, capsys):
    write_task(tmp_path, "mine", questions(12), examples=questions(4, offset=7))
    arguments = ("--tasks", "mine", "--task-path", tmp_path, "--shots", 2, "--device", "cpu")
    run(zero_shot, tmp_path, folders[0], *arguments, "--limit", 10)
    title = "Tasks, the first 10 questions of each task, 2 examples before each question"
    assert title in spoken(capsys)
    (tmp_path / "text.txt").write_text(TEXT)
    text = ("--text", tmp_path / "text.txt", "--window", 16, "--limit", 40)
    run(compare, tmp_path, folders[0], *text, *arguments, "--task-limit", 10)
    shown = spoken(capsys)
    assert "text.txt: 37 tokens, at most 40 of each domain, in windows of 16" in shown
    assert f"{title}: second lines" in shown
    run(zero_shot, tmp_path, folders[0], *arguments[:4], "--device", "cpu")
    assert " Tasks " in spoken(capsys)  # nothing to say of limits


def spoken(capsys):
    """What was printed, in one line."""
    return f" {' '.join(capsys.readouterr().out.split())} "


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--shots": "-1"}, "shots is -1; it must be at least 0"),
        (
            {"--shots": "3"},
            "shots is 3, but task mine has 2 examples for a question; ask for fewer",
        ),
        ({"--tasks": "bare", "--shots": "5"}, "shots is 5, but task bare has 4 examples"),
        ({"--tasks": "fixed", "--shots": "1"}, "task fixed allows no examples (num_fewshot: 0)"),
        ({"--batch": "auto"}, "auto, which looks for the largest batch that a GPU holds; on a CPU"),
        ({"--batch": "many"}, "batch is 'many'; give a number of sequences, or auto"),
        ({"--baseline": "x"}, "baseline x is none of the models"),
        ({"--confidence": "2"}, "confidence is 2"),
        ({"second": "/no/folder"}, "model folder /no/folder does not exist; give a folder"),
    ],
)
def test_mistakes_in_tasks_are_found_before_a_model_is_loaded(
    folders, tmp_path, capsys, no_model, change, message
):
    write_task(tmp_path, "mine", questions(5), examples=questions(2))
    write_task(tmp_path, "bare", questions(5))
    write_task(tmp_path, "fixed", questions(5), examples=questions(2), num_fewshot=0)
    options = {"--tasks": "mine", "--task-path": tmp_path, "--device": "cpu", **change}
    second = options.pop("second", folders[1])
    line = error_line(zero_shot, capsys, folders[0], second, *sum(options.items(), ()))
    assert line.startswith("zero_shot: ")
    assert message in line


# --- compare -----------------------------------------------------------------------------------


def test_a_comparison_has_sizes_losses_and_tasks(tmp_path, capsys):
    original = save_tiny(tmp_path / "original")
    packed = write_checkpoint(original, tmp_path / "packed", menu="w4a16_g32_asym")
    (tmp_path / "text.txt").write_text(TEXT)
    write_task(tmp_path, "mine", questions(6))
    page = tmp_path / "page.html"
    report = run(
        compare,
        tmp_path,
        *(original, packed, "--text", tmp_path / "text.txt", "--window", 30, "--plot", page),
        *("--tasks", "mine", "--task-path", tmp_path, "--task-limit", 5),
        *("--baseline", packed),
    )
    first, second = report["models"]
    assert (report["reference"], report["baseline"]) == (str(original), str(packed))
    assert (first["kl"]["value"], first["flips"]["value"]) == (0, 0)
    files = sum(path.stat().st_size for path in packed.glob("*.safetensors"))
    assert second["weight"]["file_bytes"] == files
    assert first["weight"]["bits_per_weight"] == 32
    # 4 bits, and for each 32 weights a scale of 16 bits and a zero point of 4.
    assert second["weight"]["bits_per_weight"] == 4 + 20 / 32
    alone = run(
        *(perplexity, tmp_path, packed, "--text", tmp_path / "text.txt", "--window", 30),
        *("--reference", original, "--baseline", packed),
    )["models"][1]
    assert {name: second[name] for name in alone} == alone
    assert second["tasks"]["mine"]["n"] == 5
    assert "differences" in first["tasks"]["mine"]
    assert "differences" not in second["tasks"]["mine"]
    assert first["difference"]["kl"]["value"] == -second["kl"]["value"] < 0
    printed = capsys.readouterr().out
    for number in (f"{files / 1e6:.2f}", "4.6250", f"{second['kl']['value']:.6f}"):
        assert number in printed
    content = page.read_text()
    assert len(re.findall(r'"error_y":\{"array":\[', content)) == 5  # the reference has no KL
    # plotly is inside: the page asks no other place for a script, a style or a picture.
    assert re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="?([^ ">]+)', content[-20000:]) == []
    assert re.findall(r"<script[^>]+src=", content) == []


def test_points_of_a_plot_carry_their_intervals():
    points = [
        Point("a", 2_000_000, 16.0, {"ppl": Estimate(1), plot.DISTANCE: Estimate(0, 0, 0, 0)}),
        Point("<b>", 1_000_000, None, {"ppl": Estimate(3, 1, 2, 5), plot.DISTANCE: Estimate(0.5)}),
    ]
    figure = plot.draw(points, "of <text>")
    first, second, lone = figure.data  # the reference itself has no place on the logarithmic axis
    assert (figure.layout.yaxis.type, figure.layout.yaxis2.type) == (None, "log")
    assert (first.x, first.y, second.x, second.y) == ((2,), (1,), (1,), (3,))
    assert (second.name, figure.layout.title.text) == ("&lt;b&gt;", "of &lt;text&gt;")
    assert (second.error_y.array, second.error_y.arrayminus) == ((2,), (1,))
    assert lone.error_y.array is None
    assert "16 bits a weight" in first.hovertemplate
    assert "bits" not in second.hovertemplate
    assert first.marker.color != second.marker.color == lone.marker.color


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--plot": "/no/page.html"}, "/no/page.html needs the folder /no; make it first"),
        ({"--tasks": "mine", "--task-path": "/no/folder"}, "task folder /no/folder does not exist"),
        ({"--text": "none.txt"}, "text file none.txt does not exist"),
    ],
)
def test_mistakes_in_a_comparison_are_one_line(
    folders, text_file, capsys, no_model, change, message
):
    options = {"--text": text_file, **change}
    line = error_line(compare, capsys, *folders[:2], *sum(options.items(), ()))
    assert line.startswith("compare: ")
    assert message in line


def test_a_plot_without_plotly_is_one_line(
    folders, text_file, tmp_path, capsys, monkeypatch, no_model
):
    monkeypatch.setitem(sys.modules, "plotly", None)
    options = ("--text", text_file, "--plot", tmp_path / "page.html")
    line = error_line(compare, capsys, *folders[:2], *options)
    assert "install it with: pip install 'mxq[report]'" in line
