"""The demo corpus tells the truth, and the demo model has learnt it."""

import contextlib
import io
import json
import math
import re
from datetime import date, datetime, timedelta
from pathlib import Path

import pytest
import torch

from mxq.demo import DOMAINS, documents, model_path, questions
from mxq.demo.corpus import SPLITS
from mxq.demo.measure import (
    answers,
    domain_of_expert,
    expert_shares,
    heldout_losses,
    specialisation_nats,
)
from mxq.demo.source import Source

FOLDER = model_path().parent
LIMIT_BYTES = 3_800_000

# An independent spelling of what prose and records state; the corpus has its own tables.
WOMEN = {"Anna", "Clara", "Eva", "Ida", "Julia", "Nora"}
WARES = {
    "baker": "bread",
    "smith": "nails",
    "farmer": "corn",
    "weaver": "cloth",
    "brewer": "beer",
    "miller": "flour",
    "potter": "bowls",
    "fisher": "eels",
}
CITIES = {
    "norway": {"oslo", "bergen"},
    "italy": {"rome", "milan"},
    "france": {"paris", "lyon"},
    "egypt": {"cairo", "luxor"},
    "peru": {"lima", "cusco"},
}
WEATHER = {"north": "cold", "south": "hot", "east": "dry", "west": "wet"}


def arithmetic_is_true(text):
    for line in text.splitlines():
        if "=" in line:
            left, right = line.split("=")
            if eval(left, {"max": max}) != int(right):
                return False
    return True


def calendar_is_true(text):
    lines = [line for line in text.splitlines() if " is " in line]
    return all(calendar_line_is_true(line) for line in lines)


def calendar_line_is_true(line):
    left, right = line.split(" is ")
    if "days" in left and "plus" in left:
        start, step = re.fullmatch(r"(.*) plus (\d) days", left).groups()
        weekday, day = start.split(" ", 1)
        first = datetime.strptime(f"{day} 2023", "%d %b %Y")  # 2023 is no leap year
        last = first + timedelta(days=int(step))
        names = [date(2024, 1, 1 + shift).strftime("%a") for shift in range(7)]
        name = names[(names.index(weekday) + int(step)) % 7]
        return right == f"{name} {last.day} {last.strftime('%b')}"
    if "plus" in left:
        start, step = re.fullmatch(r"(.*) plus (\d+) min", left).groups()
        later = datetime.strptime(start, "%H:%M") + timedelta(minutes=int(step))
        return right == later.strftime("%H:%M")
    (count, large), (value, small) = left.split(), right.split()
    factor = {"h min": 60, "kg g": 1000, "m cm": 100, "weeks days": 7}[f"{large} {small}"]
    return int(value) == int(count) * factor


def records_is_true(text):
    head = re.match(r"\[staff of (\w+)\]", text)[1]
    fields = {}
    return all(
        field_is_true(fields, head, *line.split(": ")) for line in text.splitlines() if ": " in line
    )


def field_is_true(fields, head, key, value):
    fields[key] = value
    if key == "land":
        return fields["city"] in CITIES[value]
    if key == "mail":
        return value == f"{fields['name'].split()[0]}@{fields['team']}"
    if key == "tag":
        return value == f"{fields['name'].split()[1]}-{fields['id']}"
    return key != "head" or value == head


def programs_is_true(text):
    scope = {}
    for line in text.splitlines():
        code, _, comment = line.partition(" # ")
        if code == "exit()":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, scope)
        target = code[0]
        said = printed.getvalue().strip() if code.startswith("print") else str(scope[target])
        if comment and said != comment:
            return False
    return True


def prose_is_true(text):
    true = True
    for name, trade, rest in re.findall(r"(\w+) is a (\w+)\.(.*)", text):
        pronoun = "She" if name in WOMEN else "He"
        sold = re.match(r" (\w+) sells (\w+)\.", rest)
        true = true and (sold is None or sold.groups() == (pronoun, WARES[trade]))
        for region, weather in re.findall(r"In the (\w+), where \w+ lives, it is (\w+)\.", rest):
            true = true and WEATHER[region] == weather
        for liked, bought in re.findall(r"likes (\w+) but not \w+, so \w+ buys (\w+)\.", rest):
            true = true and liked == bought
        pattern = r"has (\w+) (\w+) (\w+), and the (\w+) (\w+) (\w+)\."
        for count, colour, noun, again, verb, seen in re.findall(pattern, rest):
            true = true and noun.endswith("s") == (count != "one") and again == noun
            true = true and verb == ("is" if count == "one" else "are") and seen == colour
    return true


IS_TRUE = {
    "arithmetic": arithmetic_is_true,
    "calendar": calendar_is_true,
    "records": records_is_true,
    "programs": programs_is_true,
    "prose": prose_is_true,
}


@pytest.fixture(scope="module")
def demo():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="module")
def report():
    return json.loads((FOLDER / "report.json").read_text())


def test_documents_are_the_same_each_time_and_do_not_depend_on_the_count():
    assert documents("train", 20)[:7] == documents("train", 7)
    assert [d.domain for d in documents("heldout", 7)] == [*DOMAINS, *DOMAINS[:2]]


def test_one_domain_alone_is_the_same_as_its_turns_among_all():
    alone = documents("calibration", 4, domain="prose")
    assert alone == tuple(d for d in documents("calibration", 20) if d.domain == "prose")


def test_splits_and_questions_share_no_document():
    texts = [{d.text for d in documents(split, 1000)} for split in SPLITS]
    assert [len(split) for split in texts] == [1000] * 3  # and no split repeats itself
    assert len(set.union(*texts)) == 3000
    prompts = {q.prompt for q in questions(200) if len(q.prompt) > 100}
    every = set.union(*texts)
    assert not any(text.startswith(prompt) for prompt in prompts for text in every)


@pytest.mark.parametrize("domain", DOMAINS)
def test_documents_are_of_the_stated_length_and_carry_a_plausible_entropy(domain):
    for document in documents("heldout", 100, domain=domain):
        assert 200 <= len(document.text) <= 600
        # A third of the information of free characters at most, far more than the domain alone.
        assert 10 * math.log(5) < document.entropy_nats < len(document.text)


def test_a_source_adds_the_log_of_the_options_by_hand():
    source = Source("seed")
    source.pick("abcd")
    source.pick(range(8))
    assert source.entropy_nats == pytest.approx(math.log(32))  # 4 x 8 equally likely texts


def test_entropy_of_a_sheet_of_sums_follows_from_its_text():
    document = documents("train", 1, domain="arithmetic")[0]
    lines = document.text.splitlines()[1:-1]
    nats = math.log(5) + math.log(3) + len(lines) * math.log(4)  # domain, line count, operators
    for line in lines:
        left = re.findall(r"\d+", line)[0]
        if line.startswith("max"):
            nats += 2 * math.log(19)
        elif "+" in line:
            nats += 2 * math.log(12)
        elif "-" in line:
            nats += math.log(20) + math.log(int(left))
        else:
            nats += 2 * math.log(9)
    assert document.entropy_nats == pytest.approx(nats)


@pytest.mark.parametrize("domain", DOMAINS)
def test_each_document_is_true(domain):
    for document in documents("train", 60, domain=domain):
        assert IS_TRUE[domain](document.text), document.text


def test_exactly_one_choice_of_a_question_is_true():
    for question in questions(400):
        assert len(set(question.choices)) == 4
        true = [IS_TRUE[question.domain](question.prompt + c) for c in question.choices]
        assert true == [index == question.answer for index in range(4)], question


def test_no_choice_is_the_beginning_of_another():
    for question in questions(400):
        for one in question.choices:
            assert [c for c in question.choices if c.startswith(one)] == [one]


def test_right_answers_are_spread_over_the_four_places():
    counts = [sum(q.answer == place for q in questions(400)) for place in range(4)]
    # Four standard deviations of a binomial with 400 draws of 1/4: 4 * sqrt(75) = 35.
    assert all(abs(count - 100) <= 35 for count in counts)


def test_an_unknown_split_or_domain_is_answered_with_the_menu():
    with pytest.raises(ValueError, match="choose one of train, calibration, heldout"):
        documents("test", 1)
    with pytest.raises(ValueError, match="choose one of arithmetic, calendar"):
        documents("train", 1, domain="poems")
    with pytest.raises(ValueError, match="ask for 0 or more"):
        questions(-1)


def test_the_corpus_needs_no_torch():
    files = [FOLDER / name for name in ("__init__.py", "corpus.py", "source.py")]
    for file in [*files, *(FOLDER / "domains").glob("*.py")]:
        assert "torch" not in re.findall(r"^(?:from|import) (\w+)", file.read_text(), re.M)


def test_the_demo_folder_stays_small():
    files = [path for path in FOLDER.rglob("*") if "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files if path.is_file()) <= LIMIT_BYTES


def test_specialisation_by_hand():
    apart = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    assert specialisation_nats(apart) == pytest.approx((math.log(2),))
    assert specialisation_nats(torch.full((1, 2, 2), 0.5)) == pytest.approx((0.0,))
    # An expert that takes 3/4 of one domain and 1/4 of the other has 3/4 of its slots from one.
    mixed = torch.tensor([[[0.75, 0.25], [0.25, 0.75]]])
    assert domain_of_expert(mixed)[0, 0, 0] == pytest.approx(0.75)


def test_a_uniform_model_loses_the_log_of_the_vocabulary_on_each_token(demo):
    _, tokenizer = demo
    loss = heldout_losses(_Uniform(), tokenizer, documents("heldout", 2))["all"]
    assert loss.loss_per_token == pytest.approx(math.log(512))
    expected = [len(tokenizer.encode(d.text)) + 1 for d in documents("heldout", 2)]
    assert loss.tokens == sum(expected)


class _Uniform(torch.nn.Module):
    def forward(self, input_ids, use_cache):
        return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 512)})


def test_the_prompt_is_tokenized_alike_alone_and_before_a_choice(demo):
    _, tokenizer = demo
    for question in questions(100):
        prompt = tokenizer.encode(question.prompt)
        for choice in question.choices:
            assert tokenizer.encode(question.prompt + choice)[: len(prompt)] == prompt


def test_the_tokenizer_returns_the_text_it_was_given(demo):
    _, tokenizer = demo
    for text in (*(d.text for d in documents("heldout", 10)), "Grüße, 東京 <b>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_loss_of_the_shipped_model_is_that_of_the_report(demo, report):
    # 15 of the 500 documents: their loss per token is known to within a few hundredths of a nat.
    measured = heldout_losses(*demo, documents("heldout", 15))["all"]
    assert measured.loss_per_token == pytest.approx(
        report["heldout"]["all"]["loss_per_token"], abs=0.1
    )


def test_the_shipped_model_answers_far_above_chance(demo):
    asked = [q for q in questions(100) if len(q.prompt) < 200][:25]  # short is fast
    right = sum(a == q.answer for a, q in zip(answers(*demo, asked), asked, strict=True))
    # By chance 6.25 of 25 are right with a standard deviation of 2.2; 17 is five of them above.
    assert right >= 17


def test_experts_of_the_shipped_model_specialise_and_none_is_dead(demo):
    shares = expert_shares(*demo, documents("heldout", 30))
    main_LE = domain_of_expert(shares).amax(1)
    assert ((main_LE > 0.5).sum(-1) >= 1).sum() >= 2
    assert (shares.mean(1) > 0.005).all()


def test_each_number_of_the_report_is_consistent(report):
    for row in report["heldout"].values():
        assert row["loss_per_token"] == pytest.approx(row["loss_nats"] / row["tokens"], abs=1e-6)
        assert row["ratio"] == pytest.approx(row["loss_nats"] / row["entropy_nats"], abs=1e-6)
    assert Path(FOLDER / "REPORT.md").read_text().count("### Layer") == 3
