"""Registers the checkpoint format with transformers; imported by ``import mxq``.

``AutoModelForCausalLM.from_pretrained(folder)`` then builds the model on the meta device, swaps in
packed modules, and loads the packed tensors as they are: nothing is decoded at load.
"""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mxq.checkpoint.engine import prepare_kernels
from mxq.checkpoint.format import QUANT_METHOD, CheckpointPlan
from mxq.checkpoint.modules import MxqExperts, packed_linear
from mxq.checkpoint.save import give_savers
from mxq.counted import counted
from mxq.models.experts import expert_count, is_fused_experts, projection_shapes
from mxq.models.files import is_inside
from mxq.models.source import file_digest
from mxq.scheme import Scheme

_CODES = {torch.int32: "I32", torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3"}
"""How safetensors names the types of codes; other tensors may be cast when they are loaded."""


@register_quantization_config(QUANT_METHOD)
class MxqConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of an mxq checkpoint."""

    def __init__(self, /, **fields: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # not in their enumeration
        # The fields come from a file: none of them may stand in for a method of this class.
        self.fields = {**fields, "quant_method": QUANT_METHOD}

    def plan(self) -> CheckpointPlan:
        """The validated fields."""
        return CheckpointPlan.from_json(self.fields)

    def to_dict(self) -> dict[str, Any]:
        """The fields as they are in config.json."""
        return deepcopy(self.fields)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """The same for ``dict``."""
        yield from self.to_dict().items()


@register_quantizer(QUANT_METHOD)
class MxqQuantizer(HfQuantizer):
    """Swaps in the packed modules and checks the files; transformers does the loading."""

    requires_calibration = True
    _folder: Path | None = None

    def update_attn_implementation(self, config: Any) -> Any:
        """Take the guard out of the configuration (see ``mxq.checkpoint.format.GUARD``)."""
        if getattr(config, "transformers_weights", None) is not None:
            config.transformers_weights = None
        assert isinstance(self.quantization_config, MxqConfig)
        check_depth(self.quantization_config.plan(), config)
        return config

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        dtype: torch.dtype | None = None,
        **unused: Any,
    ) -> PreTrainedModel:
        assert isinstance(self.quantization_config, MxqConfig)
        plan = self.quantization_config.plan()
        paths = [Path(name) for name in checkpoint_files or ()]
        check_files(plan, paths)
        check_class(model, plan, paths)
        swap_modules(model, plan, dtype or torch.get_default_dtype())
        check_tensors(model, paths)
        self._folder = paths[0].parent if paths else None
        return model

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **unused: Any
    ) -> PreTrainedModel:
        prepare_kernels(model)
        if self._folder is not None:
            assert isinstance(self.quantization_config, MxqConfig)
            give_savers(model, self._folder, self.quantization_config.plan().files)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """None: the files use the names of the module tree."""
        return []

    def is_serializable(self) -> bool:
        """False: ``Saver`` copies the files instead."""
        return False

    @property
    def is_trainable(self) -> bool:
        """False: codes have no gradient."""
        return False


def check_depth(plan: CheckpointPlan, config: Any) -> None:
    """Raise ValueError if a configuration has more layers than files, before they are built."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if not isinstance(layers, int) or layers > len(plan.files):
        raise ValueError(
            f"config.json says num_hidden_layers is {layers!r}, but this checkpoint has "
            f"{counted(len(plan.files), 'file')}, one for each layer and more; copy or download "
            "it again"
        )


def swap_modules(model: nn.Module, plan: CheckpointPlan, compute_dtype: torch.dtype) -> None:
    """Replace the modules of the plan by packed ones, on the meta device.

    Raises:
        ValueError: If the plan names a module that the architecture does not have.
    """
    modules = dict(model.named_modules())
    for path, schemes in plan.experts.items():
        original = modules.get(path)
        if original is None or not is_fused_experts(original):
            raise ValueError(f"the checkpoint's plan names experts {path!r}, absent in this model")
        rotated = path in plan.rotated
        _check_rows(path, original, schemes)
        with torch.device("meta"):
            packed = MxqExperts(original, schemes, rotated=rotated, compute_dtype=compute_dtype)
        model.set_submodule(path, packed)
        _mark_initialized(modules[path.rpartition(".")[0]])
    for path, scheme in plan.linears.items():
        original = modules.get(path)
        if type(original) is not nn.Linear:
            raise ValueError(f"the checkpoint's plan names a linear {path!r}, absent in this model")
        _check_groups(path, scheme, original.in_features)
        with torch.device("meta"):
            linear = packed_linear(
                original, scheme, rotated=path in plan.rotated, compute_dtype=compute_dtype
            )
        model.set_submodule(path, linear)


def check_class(model: nn.Module, plan: CheckpointPlan, paths: list[Path]) -> None:
    """Raise ValueError if the model lacks what is packed, being of another class than the files.

    transformers has several classes for some configurations, such as a language model alone.
    """
    inside = {name for name, _ in model.named_modules()}
    absent = next((path for path in (*plan.experts, *plan.linears) if path not in inside), None)
    if absent is None or not paths:
        return
    config = json.loads((paths[0].parent / "config.json").read_text())
    written_by = config.get("architectures") or [type(model).__name__]
    if type(model).__name__ not in written_by:
        raise ValueError(
            f"the checkpoint is of a {written_by[0]}; {type(model).__name__} has no {absent!r}: "
            f"load it with {written_by[0]}, or with an auto class that gives one, such as "
            "AutoModelForImageTextToText"
        )


def _mark_initialized(block: nn.Module) -> None:
    """Some families fill the fused experts from the block around them; all comes from the files."""
    if not block._non_persistent_buffers_set:
        block._is_hf_initialized = True  # type: ignore[assignment]  # a flag of transformers


def _check_rows(path: str, module: nn.Module, schemes: Mapping[str, tuple[Scheme, ...]]) -> None:
    """Raise ValueError unless there is one scheme for each projection of each expert."""
    rows = {name: len(row) for name, row in schemes.items()}
    needed = {f"{name}_proj": expert_count(module) for name in projection_shapes(module)}
    if rows != needed:
        raise ValueError(
            f"the checkpoint's plan has schemes for {rows} of {path}, but the model has {needed}: "
            "the plan or the model in config.json was edited"
        )
    for name, (_, in_features) in projection_shapes(module).items():
        for scheme in set(schemes[f"{name}_proj"]):
            _check_groups(f"{path} {name}_proj", scheme, in_features)


def _check_groups(path: str, scheme: Scheme, in_features: int) -> None:
    if not scheme.fits(in_features):
        raise ValueError(
            f"the checkpoint's plan gives {path} the scheme {scheme}, whose groups do not divide "
            f"its {in_features} inputs: the plan in config.json was edited"
        )


def check_files(plan: CheckpointPlan, paths: list[Path]) -> None:
    """Raise ValueError unless the files are those that the plan was written with.

    All of them lie beside config.json, whatever their index says.
    """
    found = {path.name: path for path in paths}
    for path in paths:
        beside = path.parent == paths[0].parent and (path.parent / "config.json").is_file()
        if not beside or not is_inside(path.parent, path):
            raise ValueError(
                f"{path} is outside of the checkpoint's folder; its index was edited: copy or "
                "download it again"
            )
    absent = sorted(set(plan.files) - set(found))
    foreign = sorted(set(found) - set(plan.files))
    if absent or foreign:
        raise ValueError(
            f"the checkpoint's files do not match its plan: absent {absent}, not in the plan "
            f"{foreign}; copy the folder again"
        )
    names = sorted(found)
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(lambda name: file_digest(found[name]), names))
    for name, digest in zip(names, digests, strict=True):
        if digest != plan.files[name]:
            raise ValueError(
                f"{found[name]} is damaged or was edited: its SHA-256 is {digest[:12]}..., "
                f"expected {plan.files[name][:12]}...; copy or download it again"
            )


def check_tensors(model: nn.Module, paths: list[Path]) -> None:
    """Raise ValueError unless the files hold exactly the tensors that the modules declare."""
    declared = {
        name: (tuple(tensor.shape), _CODES.get(tensor.dtype))
        for name, tensor in model.state_dict().items()
    }
    found = {name: held for path in paths for name, held in _held_by(path).items()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for name in sorted(set(declared) - set(found) - tied):
        raise ValueError(f"the checkpoint lacks {name}; it was edited, or is of another model")
    for name in sorted(set(found) - set(declared)):
        raise ValueError(f"the checkpoint holds {name}, which its plan does not mention")
    for name, (shape, stored) in sorted(found.items()):
        needed, code = declared[name]
        if needed != shape:
            raise ValueError(
                f"{name} has shape {list(shape)}, its scheme needs {list(needed)}: "
                "the plan in config.json was edited"
            )
        if code is not None and code != stored:
            raise ValueError(
                f"{name} is stored as {stored}, its scheme needs {code}: the file was edited"
            )


def _held_by(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of each tensor of a file."""
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in list(file.keys())}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    return {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
