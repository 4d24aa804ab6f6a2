"""Models and tokenizers by name: a hub id, a folder, or ``demo`` for the embedded model."""

import gc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mxq.checking import check_folder
from mxq.counted import counted
from mxq.models.claims import check_config
from mxq.models.files import checkpoint_files, read_json
from mxq.models.skeleton import load_whole

Loaded = TypeVar("Loaded")

EXPERTS_ALIKE = "experts-alike-in-the-model"
"""The rule of transformers that it does not hold a checkpoint to by itself."""

_MODEL_MENU = "give a folder as save_pretrained writes it, a hub id, or demo"


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model: a hub id, a folder, or ``demo`` for the embedded model.

    Raises:
        ValueError: If it cannot be loaded; the message says why in one line.
    """
    load = partial(AutoTokenizer.from_pretrained, trust_remote_code=False)
    tokenizer: PreTrainedTokenizerBase = _loaded(load, name)
    return tokenizer


def load_model(name: str, *, device: str | None = None) -> PreTrainedModel:
    """A model in its own type, ready to run: a hub id, a folder, or ``demo``.

    ``device`` None means a GPU if there is one; ``auto`` spreads the model over all of them.

    Raises:
        ValueError: If it cannot be loaded; the message says why in one line.
    """
    load = partial(load_whole, device_map=default_device(device))
    model: PreTrainedModel = _loaded(load, name)
    return model


def free_memory() -> None:
    """Give back what a model took that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def default_device(device: str | None) -> str:
    """The device asked for, else a GPU if there is one."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def known_positions(name: str) -> int | None:
    """Positions that a model knows by its configuration; None where that sets no limit.

    Raises:
        ValueError: If the configuration cannot be loaded.
    """
    config = _loaded(partial(AutoConfig.from_pretrained, trust_remote_code=False), name)
    known = getattr(config.get_text_config(), "max_position_embeddings", None)
    return known if isinstance(known, int) else None


def require_decodable(name: str) -> None:
    """Refuse a checkpoint that transformers decodes wrongly without a word.

    It takes one format for the experts of all layers of a compressed-tensors checkpoint.

    Raises:
        ValueError: If the folder has experts of several formats.
    """
    folder = Path(resolve(name))
    if not folder.is_dir():
        return
    method = (read_json(folder / "config.json").get("quantization_config") or {}).get(
        "quant_method"
    )
    if method != "compressed-tensors":
        return
    try:
        findings = check_folder(folder, "transformers").findings
    except ValueError:
        return  # of a form that mxq check does not read: transformers judges it
    if any(finding.rule.id == EXPERTS_ALIKE for finding in findings):
        raise ValueError(
            f"{name} has experts of several formats, which transformers decodes as one without a "
            "word: every number would be wrong; score the mxq checkpoint that it was exported "
            "from, or one exported --to dequantized"
        )


def _loaded(load: Callable[[str], Loaded], name: str) -> Loaded:
    path = resolve(name)
    try:
        return load(path)
    except Exception as error:
        # transformers and the configurations' own checks share no base class for "wrong".
        where = "" if Path(path).is_dir() else " is no folder here, and from the hub it"
        reason = " ".join(str(error).split())
        raise ValueError(f"model {name!r}{where} could not be loaded: {reason}") from error


def resolve(name: str) -> str:
    """What ``from_pretrained`` is to be given for a name: a folder that was checked, or a hub id.

    Raises:
        ValueError: If the name can only be a folder and is none, or the folder claims too much.
    """
    if name == "demo":
        from mxq import demo

        return str(demo.model_path())
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"model folder {name} holds no config.json; {_MODEL_MENU}")
    # A hub id is "model" or "owner/model"; everything else can only be meant as a path.
    is_path = path.is_absolute() or len(path.parts) > 2 or name.startswith((".", "~"))
    if path.is_file() or (is_path and not path.exists()):
        found = "is a file" if path.is_file() else "does not exist"
        raise ValueError(f"model folder {name} {found}; {_MODEL_MENU}")
    if not path.is_dir():
        return name
    # transformers reads the configuration for a tokenizer too, and would build what it claims.
    stored = any(path.glob("*.safetensors"))
    check_config(
        path / "config.json",
        read_json(path / "config.json"),
        checkpoint_files(path) if stored else (),
    )
    return str(path)


def require_same_vocabulary(
    tokenizer: PreTrainedTokenizerBase, reference: PreTrainedTokenizerBase, names: Sequence[str]
) -> None:
    """Refuse to compare models whose token ids mean different things.

    Raises:
        ValueError: With the two models and the difference.
    """
    ours, theirs = tokenizer.get_vocab(), reference.get_vocab()
    if ours != theirs:
        different = len(set(ours.items()) ^ set(theirs.items()))
        differ = "differs" if different == 1 else "differ"
        raise ValueError(
            f"{names[0]} and {names[1]} have other vocabularies ({len(ours)} and {len(theirs)} "
            f"tokens, {counted(different, 'entry', 'entries')} {differ}); only models of the same "
            "tokens can be compared"
        )


def find_baseline(names: Sequence[str], asked: str | None) -> int:
    """The place of the model that differences are to: the first unless another is asked for.

    Raises:
        ValueError: If it is none of the models.
    """
    if asked is not None and asked not in names:
        raise ValueError(f"baseline {asked} is none of the models; choose {', '.join(names)}")
    return 0 if asked is None else names.index(asked)
