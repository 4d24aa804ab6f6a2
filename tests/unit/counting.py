"""A text and a tokenizer with which a test can read off what was cut: the words are the numbers."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mxq.profiling.calibration import load_calibration

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
