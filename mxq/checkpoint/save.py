"""``save_pretrained`` of a loaded checkpoint: the files it was read from, copied.

Packed weights cannot have changed since; what could have is compared with the files. transformers'
own way would write the tensors anew, without the digests, the plan and the guard of the folder.
"""

import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from mxq.checkpoint.engine import packed_modules
from mxq.models.files import read_json
from mxq.storage import write_whole

FOUND_BESIDE = (
    *("config.json", "generation_config.json", "model.safetensors.index.json"),
    "mxq_*.json",
)
"""Patterns of the files that belong to a checkpoint beside its weights."""


class Saver:
    """Stands in for the ``save_pretrained`` of one loaded model.

    ``files`` are the SHA-256 digests of the shards in ``folder``, as its plan has them. It does
    not keep the model alive, and a deep copy of the model gets one of its own.
    """

    def __init__(
        self, model: PreTrainedModel | None, folder: Path, files: Mapping[str, str]
    ) -> None:
        self.folder, self.files = folder, dict(files)
        self._model = None if model is None else weakref.ref(model)

    def __call__(
        self,
        save_directory: str | PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **options: object,
    ) -> None:
        """Copy the checkpoint into a folder, and upload it if told to.

        Adapters of PEFT on the model are saved by transformers, alone. Shards are those of the
        checkpoint, whatever ``max_shard_size`` says.

        Raises:
            ValueError: If weights were changed since loading, or the folder that they were loaded
                from is gone or was changed.
        """
        if self._model is None:
            raise ValueError(
                f"this model was not made by from_pretrained; copy {self.folder} to save it again"
            )
        # A model without a name dies before this call, as it was loaded.
        model = self._model()
        if model is not None and getattr(model, "_hf_peft_config_loaded", False):
            type(model).save_pretrained(
                model,
                save_directory,
                is_main_process,
                state_dict,
                push_to_hub,
                **options,  # type: ignore[arg-type]  # whatever transformers takes
            )
            return
        if state_dict is not None:
            raise ValueError(
                "a checkpoint of mxq is saved as it was loaded; leave state_dict out, or save that "
                "dictionary with safetensors"
            )
        target = Path(save_directory)
        if is_main_process:
            written = self._copy(model, target)
            if push_to_hub:
                _upload(target, written, options)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Saver":
        model = None if self._model is None else self._model()
        return Saver(memo.get(id(model)), self.folder, self.files)

    def __reduce__(self) -> tuple[Callable[..., "Saver"], tuple[object, ...]]:
        return Saver, (None, self.folder, self.files)

    def _copy(self, model: PreTrainedModel | None, target: Path) -> set[str]:
        """Copy the checkpoint; the names of its files in the target."""
        if target.is_file():
            raise ValueError(f"{target} is a file; give a folder to save to")
        self._check_folder()
        if model is not None:
            self._check_weights(model)
        target.mkdir(parents=True, exist_ok=True)
        beside = {path.name for pattern in FOUND_BESIDE for path in self.folder.glob(pattern)}
        names = {*self.files, *beside}
        if target.resolve() != self.folder.resolve():
            for name in (*sorted(names - {"config.json"}), "config.json"):
                write_whole(target / name, partial(shutil.copyfile, self.folder / name))
        if model is not None and model.can_generate():
            model.generation_config.save_pretrained(target)
            names.add("generation_config.json")
        return names

    def _check_folder(self) -> None:
        """Raise ValueError unless the folder still holds what was loaded."""
        path = self.folder / "config.json"
        config = read_json(path) if path.is_file() else {}
        present = config.get("quantization_config", {}).get("files")
        if present != self.files or not all((self.folder / name).is_file() for name in self.files):
            raise ValueError(
                f"{self.folder}, which the model was loaded from, is gone or holds another "
                "checkpoint now; one of mxq is saved by copying its files, so put them back"
            )

    def _check_weights(self, model: PreTrainedModel) -> None:
        """Raise ValueError if a weight outside the packed modules is not that of the files."""
        for name, held, stored in self._kept(model):
            same = held.shape == stored.shape and torch.equal(held.cpu(), stored.to(held.dtype))
            if not same:
                raise ValueError(
                    f"{name} was changed since the model was loaded, and a checkpoint of mxq is "
                    "saved by copying its files; quantize the changed model"
                )

    def _kept(self, model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Name, present and stored value of the weights outside the packed modules."""
        inside = {
            id(tensor)
            for module in packed_modules(model)
            if isinstance(module, nn.Module)
            for tensor in module.parameters()
        }
        held = {
            name: tensor
            for name, tensor in model.state_dict(keep_vars=True).items()
            if id(tensor) not in inside and not tensor.is_meta
        }
        for shard in self.files:
            with safe_open(self.folder / shard, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (a reader, not a mapping)
                    if name in held:
                        yield name, held[name].detach(), file.get_tensor(name)


def _upload(folder: Path, names: Iterable[str], options: Mapping[str, object]) -> None:
    """Make a repository of the hub and put those files of a folder there, and no others."""
    given = {name: options[name] for name in options if options[name] is not None}
    api = HfApi(token=given.get("token"))  # type: ignore[arg-type]
    name = str(given.get("repo_id", folder.name))
    private = {"private": given["private"]} if "private" in given else {}
    repository = api.create_repo(name, exist_ok=True, **private).repo_id  # type: ignore[arg-type]
    taken = given.keys() & {"commit_message", "create_pr", "revision"}
    passed = {name: given[name] for name in taken}
    api.upload_folder(  # type: ignore[call-overload]
        folder_path=folder, repo_id=repository, allow_patterns=sorted(names), **passed
    )
