"""The embedded demo: a small mixture-of-experts model and the corpus on which it was trained.

Both need no network, so that every command has a default that runs on a bare machine. The model
is made by ``scripts/train_demo.py``; ``REPORT.md`` beside this file says how good it is.
"""

from pathlib import Path

from mxq.demo.corpus import DOMAINS, Document, Question, documents, questions

__all__ = ["DOMAINS", "Document", "Question", "documents", "model_path", "questions"]


def model_path() -> Path:
    """The folder of the demo model, in the form that ``from_pretrained`` loads."""
    return Path(__file__).parent / "model"
