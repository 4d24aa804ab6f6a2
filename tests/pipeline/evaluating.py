"""Running the evaluation scripts on random models of characters, and asking such a model slowly."""

import importlib.util
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

VOCABULARY = 128
SCRIPTS = Path(__file__).parents[2] / "eval"
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen.\n" * 3


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_model(folder, *, seed, vocabulary=VOCABULARY):
    """A random model over characters; initialised widely, so that it is far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    characters = {"<eos>": 0} | {chr(code): code for code in range(1, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(characters, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    FastTokenizer(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return str(folder)


def run(module, tmp_path, *arguments):
    """The script's JSON."""
    output = tmp_path / "result.json"
    assert module.main([*map(str, arguments), "--json", str(output)]) == 0
    return json.loads(output.read_text())


def error_line(module, capsys, *arguments):
    """What the script says in its one line on stderr, for arguments that it refuses."""
    assert module.main([*map(str, arguments)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert "Traceback" not in "".join(lines)
    return lines[-1]


def log_likelihood(model, prompt, choice):
    """Slow: one choice at a time. A trailing blank of the prompt belongs to the choice anyway."""
    ids = torch.tensor([[ord(character) for character in prompt + choice]])
    ids = ids[:, -513:]  # the model knows 512 positions, and the last token is only predicted
    with torch.no_grad():
        log_p = model(ids[:, :-1]).logits[0].log_softmax(-1)
    scored = range(ids.shape[1] - len(choice), ids.shape[1])
    return sum(float(log_p[place - 1, ids[0, place]]) for place in scored)
