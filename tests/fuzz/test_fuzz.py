"""Readers of foreign files refuse with ValueError or accept: generated inputs, and the corpus.

The same targets run by hand under atheris (``run_fuzz.py``); what it finds joins the corpus.
"""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from targets import ARTIFACTS, TARGETS
from transformers.utils import logging
from trial import accepts, empty_root

CORPUS = Path(__file__).parent / "corpus"
INPUTS = sorted(CORPUS.glob("*/*"))

SLOW = {"model_config", "model_header"}
"""These build a model for each input."""


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def root():
    folder = empty_root()
    yield folder
    folder.rmdir()


@pytest.mark.filterwarnings("ignore")  # of transformers, about configurations that are wrong
@pytest.mark.parametrize("name", TARGETS)
def test_generated_inputs_are_accepted_or_refused_in_words(name, root):
    # Derandomized: the same examples on every machine, and no database of old ones.
    bounded = settings(
        max_examples=30 if name in SLOW else 300,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )

    @bounded
    @given(st.binary(max_size=60))
    def run(data):
        accepts(name, data, root)

    run()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", INPUTS, ids=[f"{p.parent.name}/{p.name}" for p in INPUTS])
def test_an_input_of_the_corpus_is_accepted_or_refused_in_words(path, root):
    accepts(path.parent.name, path.read_bytes(), root)


@pytest.mark.parametrize("name", sorted(set(TARGETS) - {"text_rows", "spellings"}))
def test_the_file_that_inputs_edit_is_accepted(name, root):
    assert accepts(name, b"", root)


@pytest.mark.parametrize("kind", range(len(ARTIFACTS)), ids=[k.__name__ for k in ARTIFACTS])
def test_the_artifact_that_inputs_edit_is_accepted(kind, root):
    assert accepts("artifact", bytes([kind]), root)


def test_a_finding_is_not_taken_for_a_refusal(root, monkeypatch):
    def wrong(data, folder):
        raise KeyError("x")

    def outside(data, folder):
        (folder.parent / "stray").write_text("")

    for target, finding in ((wrong, KeyError), (outside, AssertionError)):
        monkeypatch.setitem(TARGETS, "spellings", target)
        with pytest.raises(finding):
            accepts("spellings", b"", root)
        (root / "stray").unlink(missing_ok=True)
