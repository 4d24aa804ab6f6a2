"""Draw the samples of a run: to fit to, in reserve for cold experts, and held out."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mxq.config import CalibrationOptions
from mxq.counted import counted
from mxq.models.adapter import ModelAdapter
from mxq.models.skeleton import load_whole
from mxq.models.source import ModelSource, open_source
from mxq.profiling.calibration import CalibrationSet, load_calibration

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "tekken.json", "sentencepiece.bpe.model", "merges.txt", "tiktoken.model"),
)
"""A folder with none of these has no tokenizer."""


def draw_calibration(
    adapter: ModelAdapter, options: CalibrationOptions, data: object | None = None
) -> tuple[CalibrationSet, CalibrationSet | None, CalibrationSet]:
    """Samples to fit to, spare samples for cold experts, and samples held out.

    One held-out sample and two spare ones come with every eight, the spare ones only where the
    text is long enough. Rows given as they are (a matrix of ids) are split, a ninth held out.
    """
    held = max(1, options.samples // 8)
    # An iterator can be read once only, so it is not asked for more than it must have.
    spare = options.samples // 4 if adapter.is_moe and not isinstance(data, Iterator) else 0
    try:
        found = _load(adapter, options, data, options.samples + held + spare)
    except ValueError:
        if spare == 0:
            raise
        spare = 0
        found = _load(adapter, options, data, options.samples + held)
    longest, width = _positions(adapter), found.input_ids.shape[1]
    if longest is not None and width > longest:
        raise ValueError(
            f"samples of {counted(width, 'token')} are longer than the model's "
            f"{counted(longest, 'position')}; lower --seqlen"
        )
    if len(found.domains) != options.samples + held + spare:
        held, spare = max(1, len(found.domains) // 9), 0
    rest, heldout = found.split(held)
    if spare == 0:
        return rest, None, heldout
    base, extra = rest.split(spare)
    return base, extra, heldout


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder has the files of a tokenizer."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def _load(
    adapter: ModelAdapter, options: CalibrationOptions, data: object | None, samples: int
) -> CalibrationSet:
    spec = options.spec if data is None else data
    return load_calibration(
        spec,  # type: ignore[arg-type]  # anything that load_calibration takes
        _tokenizer(adapter.source.folder),
        samples=samples,
        seqlen=options.seqlen,
        seed=options.seed,
        vocab_size=_vocabulary(adapter),
        model=_sampler(adapter),
        disjoint=True,
    )


def _text_config(adapter: ModelAdapter) -> PreTrainedConfig:
    return adapter.source.model.config.get_text_config()


def _positions(adapter: ModelAdapter) -> int | None:
    longest = getattr(_text_config(adapter), "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None


def _vocabulary(adapter: ModelAdapter) -> int:
    embedding = adapter.source.model.get_input_embeddings()
    assert isinstance(embedding.weight, torch.Tensor)
    return int(embedding.weight.shape[0])


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model folder, None if it holds none; code of the folder is not run.

    Raises:
        ValueError: If there is one that cannot be loaded.
    """
    if not has_tokenizer(folder):
        return None  # transformers would make up a tokenizer without any token
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False
        )
    except Exception as error:
        # The tokenizers library raises plain exceptions for a damaged file.
        raise ValueError(
            f"the tokenizer in {folder} cannot be loaded ({type(error).__name__}: "
            f"{' '.join(str(error).split())}); download its files again"
        ) from error
    return tokenizer


def _sampler(adapter: ModelAdapter) -> Callable[[int, int, torch.Generator], torch.Tensor]:
    """Text written by the model itself; this loads the whole model, unlike every other stage."""
    folder = adapter.source.folder
    bos = getattr(_text_config(adapter), "bos_token_id", None)
    loaded: list[PreTrainedModel] = []

    def sample(batch: int, seqlen: int, generator: torch.Generator) -> torch.Tensor:
        if not loaded:
            loaded.append(_whole_model(adapter.source))
        model = loaded[0]
        ids = torch.full((batch, 1), bos if isinstance(bos, int) else 0)
        cache = None
        for _ in range(seqlen - 1):
            with torch.no_grad():
                out = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            chances = out.logits[:, -1].float().softmax(-1)
            if not chances.isfinite().all():
                raise ValueError(
                    f"the logits of {folder} are not finite while it writes calibration text: a "
                    "weight is damaged or overflows; download it again, or give text of your own"
                )
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
        return ids

    return sample


def _whole_model(source: ModelSource) -> PreTrainedModel:
    """The original in float32, as ``from_pretrained`` gives it."""
    if not source.is_encoded:
        return load_whole(source.folder, dtype=torch.float32)
    # transformers computes with the codes of such a source, or decodes them to another type.
    own = open_source(source.folder)
    for layer in range(len(own.layers)):
        own.load_layer(layer)
    return own.model
