"""A model as a skeleton whose layers are filled from safetensors files one at a time.

Names, merging of per-expert tensors and types are transformers' own: a layer is loaded by the
conversion code of ``from_pretrained`` run on that layer's keys alone, so a streamed layer equals a
loaded one bit for bit. Only the embeddings, the final norm and the head stay in memory.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig, _load_parameter_into_model
from transformers.utils import logging

from mxq.compute import CPU
from mxq.counted import counted
from mxq.heap import KEPT_BYTES, give_back, keep_temporaries, loading_weights
from mxq.models.claims import (
    check_depth,
    check_floating,
    check_folder,
    check_parts,
    check_skeleton,
    non_persistent_buffers,
)
from mxq.models.decoding import DecodingSlice, Encoded, find_encoded
from mxq.models.files import (
    checkpoint_files,
    open_safetensors,
    resolve_folder,
    tensor_lengths,
)
from mxq.models.skeleton import build_skeleton, find_decoder_layers
from mxq.numerics import check_finite

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class ModelSource:
    """A language model of which one decoder layer at a time is in memory.

    ``model`` is the transformers module tree with the decoder layers on the meta device;
    ``layers`` are those layers and ``layers_name`` their path. A model that also sees or hears has
    its towers outside these layers; they are loaded whole and stay as they are.

    ``encoded`` are weights that the files hold as codes and scales, decoded as they are read.
    What is loaded is made on the host and then put on ``device``.
    ``converts`` is False where the files use the names of the module tree, tensor by tensor.
    """

    def __init__(
        self,
        folder: Path,
        model: PreTrainedModel,
        dtype: torch.dtype,
        *,
        encoded: Mapping[str, Encoded] | None = None,
        converts: bool = True,
        device: torch.device = CPU,
    ) -> None:
        self.folder = folder
        self.device = device
        self.model = model
        self.dtype = dtype
        self.files = checkpoint_files(folder)
        self.layers_name, self.layers = find_decoder_layers(model)
        self._encoded, self._converts = encoded or {}, converts
        self._mapping = get_model_conversion_mapping(model) if converts else []
        self._digest: str | None = None
        self._keys = self._index_keys()
        self._check_claims()
        self._fill_what_no_file_holds()
        self._load(lambda target: not target.startswith(self.layers_name + "."))
        self._place(model)
        model.tie_weights()
        for name, parameter in model.named_parameters():
            if not parameter.is_meta:
                check_finite(parameter, name)

    @property
    def is_encoded(self) -> bool:
        """Whether the files hold codes and scales instead of some weights."""
        return len(self._encoded) > 0

    def stored_bytes(self) -> int:
        """Bytes of the tensors in the files that the model is read from, as they are stored."""
        lengths = {name: tensor_lengths(self.folder / name) for name in set(self.files.values())}
        return sum(lengths[name][key] for key, name in self.files.items())

    def layer_path(self, layer: int) -> str:
        """Path of a decoder layer in the module tree."""
        return f"{self.layers_name}.{layer}"

    def load_layer(self, layer: int) -> nn.Module:
        """Fill one decoder layer from the files."""
        prefix = self.layer_path(layer) + "."
        self._load(lambda target: target.startswith(prefix))
        return self.layers[layer]

    def free_layer(self, layer: int) -> None:
        """Drop the weights of one decoder layer."""
        freed = sum(p.nbytes for p in self.layers[layer].parameters() if not p.is_meta)
        for module in self.layers[layer].modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(
                        parameter.detach().to("meta"), requires_grad=False
                    )
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    module._buffers[name] = buffer.to("meta")
        if freed > KEPT_BYTES:
            give_back()  # beside so large a layer, taking memory anew costs nothing

    def stored_dtype(self, target: str) -> torch.dtype:
        """Type in which the files hold a parameter (that of its first part).

        It is bfloat16 where they hold codes: the values are those of no wider type.
        """
        key = self._first_key[target]
        if key in self._encoded:
            return torch.bfloat16
        with open_safetensors(self.folder / self.files[key]) as file:
            return _DTYPES[file.get_slice(key).get_dtype()]

    def is_stored(self, target: str) -> bool:
        """Whether a parameter comes from the files, rather than from a tie or a default."""
        return target in self._first_key

    def digest(self) -> str:
        """SHA-256 of the configuration and of every weight file; computed once."""
        if self._digest is None:
            names = ("config.json", *sorted(set(self.files.values())))
            with ThreadPoolExecutor() as pool:
                digests = list(pool.map(file_digest, [self.folder / name for name in names]))
            text = "".join(f"{n} {d}\n" for n, d in zip(names, digests, strict=True))
            self._digest = hashlib.sha256(text.encode()).hexdigest()
        return self._digest

    def _index_keys(self) -> Mapping[str, Sequence[str]]:
        """Keys of the files that make up each parameter of the module tree."""
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        meta = self.model.state_dict()
        keys: dict[str, list[str]] = defaultdict(list)
        self._first_key: dict[str, str] = {}
        parts = {part for encoded in self._encoded.values() for part in encoded.parts}
        names = {*self.files} - parts | {*self._encoded}
        for key in sorted(names, key=dot_natural_key):
            target, pattern = rename_source_key(
                key, renamings, converters, self.model.base_model_prefix, meta
            )
            if target not in meta and key in meta:
                target, pattern = key, None
            if target in meta:
                keys[target].append(key)
                for filled in (target, *_siblings(target, pattern, converters)):
                    self._first_key.setdefault(filled, key)
        return dict(keys)

    def _check_claims(self) -> None:
        """Raise ValueError if the configuration describes another model than the files hold."""
        meta = self.model.state_dict()
        made = [tensor for name, tensor in meta.items() if name not in self._first_key]
        held = [meta[name] for name in self._first_key]
        check_skeleton(self.folder, held, [*made, *non_persistent_buffers(self.model)])
        depth = len(self.layers)
        check_depth(self.folder, self.files, self.layers_name, self.model, depth)
        rows: Counter[str] = Counter()  # one list of keys may fill several parameters
        for target, key in self._first_key.items():
            rows[key] += meta[target].shape[0] if meta[target].dim() > 0 else 1
        for target, keys in self._keys.items():
            check_parts(self.folder, target, rows[keys[0]], keys)

    def _fill_what_no_file_holds(self) -> None:
        """Buffers and tied or absent parameters get their values as in ``from_pretrained``."""
        meta = self.model.state_dict()
        missing = set(meta) - set(self._first_key) - set(self.model.all_tied_weights_keys or ())
        weights = [name for name in missing if meta[name].dim() >= 2]
        if weights:
            raise ValueError(
                f"{self.folder} lacks {counted(len(weights), 'weight')} of its own architecture, "
                f"first {sorted(weights)[0]!r}: the checkpoint is incomplete"
            )
        buffers = dict(self.model.named_non_persistent_buffers())
        for name in missing:
            _load_parameter_into_model(self.model, name, torch.empty_like(meta[name], device="cpu"))
        for name, buffer in buffers.items():
            _load_parameter_into_model(self.model, name, torch.empty_like(buffer, device="cpu"))
        with torch.no_grad():
            self.model.initialize_weights()  # type: ignore[no-untyped-call]  # of transformers
        for module in self.model.modules():
            if hasattr(module, "_is_hf_initialized"):
                module._is_hf_initialized = True  # type: ignore[assignment]

    def _load(self, wanted: Any) -> None:
        targets = [target for target in self._keys if wanted(target)]
        # What is merged of many tensors exists twice meanwhile, so one such parameter at a time.
        merged = [target for target in targets if len(self._keys[target]) > 1]
        plain = [target for target in targets if len(self._keys[target]) == 1]
        for group in ([plain] if plain else []) + [[target] for target in merged]:
            with loading_weights():
                self._load_group(group)
            self._place(self.model)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)

    def _place(self, module: nn.Module) -> None:
        """Put what has been loaded on the device, where that is not the host."""
        if self.device.type == "cpu":
            return
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None and self._is_elsewhere(parameter):
                    part._parameters[name] = nn.Parameter(
                        parameter.detach().to(self.device), requires_grad=False
                    )
            for name, buffer in part._buffers.items():
                if buffer is not None and self._is_elsewhere(buffer):
                    part._buffers[name] = buffer.to(self.device)

    def _is_elsewhere(self, tensor: Tensor) -> bool:
        return not tensor.is_meta and tensor.device != self.device

    def _load_group(self, targets: Sequence[str]) -> None:
        with ExitStack() as stack:
            slices = self._slices([key for t in targets for key in self._keys[t]], stack)
            meta = self.model.state_dict()
            for target in (t for t in targets if meta[t].is_floating_point()):
                for key in self._keys[target]:
                    check_floating(self.folder, key, slices[key].get_dtype())
            config = LoadStateDictConfig(
                dtype=self.dtype,
                dtype_plan=self.model._get_dtype_plan(self.dtype),
                weight_mapping=deepcopy(self._mapping),  # type: ignore[arg-type]  # theirs, as they use it
            )
            stack.enter_context(_without_bars())
            loaded, _ = convert_and_load_state_dict_in_model(self.model, slices, config)
        for name, found, expected in sorted(loaded.mismatched_keys):
            raise ValueError(
                f"{self.folder}: {name} has shape {list(found)} in the files, but "
                f"{list(expected)} by config.json; one of them is of another model"
            )
        problems = [*loaded.conversion_errors, *loaded.unexpected_keys]
        if problems:
            raise ValueError(f"{self.folder}: transformers could not load {problems[:3]}")

    def _slices(self, keys: Sequence[str], stack: ExitStack) -> dict[str, Any]:
        parts = {key: self._encoded[key].parts for key in keys if key in self._encoded}
        stored = [part for key in keys for part in parts.get(key, (key,))]
        opened: dict[str, Any] = {}
        for name in sorted({self.files[key] for key in stored}):
            opened[name] = stack.enter_context(open_safetensors(self.folder / name))
        slices = {key: opened[self.files[key]].get_slice(key) for key in stored}
        for key in keys:
            if key in parts:
                halves = tuple(slices[part] for part in parts[key])
                slices[key] = DecodingSlice(key, self._encoded[key], halves)
            elif self._converts and slices[key].get_dtype() not in _DTYPES:
                raise ValueError(
                    f"{self.folder} holds {key} as {slices[key].get_dtype()} without scales that "
                    "mxq can read; give the original model"
                )
        return {key: slices[key] for key in keys}


def open_source(
    model: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    device: torch.device = CPU,
) -> ModelSource:
    """Open a local folder or a hub id, to compute on a device; no decoder layer is read yet.

    Raises:
        ValueError: If there is no such model, it is not a causal language model in safetensors,
            or it is quantized in a form that mxq does not read.
    """
    keep_temporaries()
    folder = resolve_folder(model, revision=revision)
    files = check_folder(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        # transformers and the configurations' own checks share no base class for "wrong".
        said = " ".join(str(error).split())
        raise ValueError(f"{folder}/config.json cannot be read by transformers: {said}") from error
    # A folder may name kernels that transformers would fetch and run; mxq needs its own choice.
    config._attn_implementation = config._experts_implementation = None
    encoded = find_encoded(_quantization_of(config), files, folder)
    model_tree = build_skeleton(config, dtype)
    return ModelSource(folder, model_tree, dtype, encoded=encoded, device=device)


def _quantization_of(config: PreTrainedConfig) -> Mapping[str, Any] | None:
    """The ``quantization_config`` of a checkpoint, which may be that of its language part."""
    for part in (config, config.get_text_config()):
        found = getattr(part, "quantization_config", None)
        if found is not None:
            return found if isinstance(found, dict) else cast(dict[str, Any], found.to_dict())
    return None


def _siblings(target: str, pattern: str | None, converters: Sequence[Any]) -> set[str]:
    """Other parameters that a one-to-many conversion of ``target`` also fills."""
    if pattern is None:
        return set()
    converter = next(c for c in converters if pattern in c.source_patterns)
    first, *others = converter.target_patterns
    return {target.replace(first, other) for other in others}


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers from showing a bar for every layer that is loaded."""
    was_shown = logging.is_progress_bar_enabled()  # of transformers
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
