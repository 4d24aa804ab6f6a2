"""``save_pretrained`` of a loaded checkpoint: the files it was read from, copied.

The model's tensors are compared with the files, so that no change is lost without a word.
transformers' own way would write them anew, without the digests, the plan and the guard.
"""

import json
import shutil
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors import safe_open
from transformers import PreTrainedModel

from mxq.models.files import read_json
from mxq.models.source import file_digest
from mxq.storage import write_atomically, write_whole

FOUND_BESIDE = (
    *("config.json", "generation_config.json", "model.safetensors.index.json"),
    *("mxq_*.json", "README.md"),
)
"""Patterns of the files that belong to a checkpoint beside its weights."""


_OF_THE_FILES = {
    *("quantization_config", "transformers_weights", "architectures", "dtype"),
    "transformers_version",
}
"""Fields of a configuration that say how the files are, whatever the model's says."""


def config_fields(model: PreTrainedModel) -> dict[str, Any]:
    """The configuration of a model as JSON has it, without what is about its files."""
    fields: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    return {
        name: value
        for name, value in fields.items()
        if name not in _OF_THE_FILES and not name.startswith("_")
    }


def give_savers(model: PreTrainedModel, folder: Path, files: Mapping[str, str]) -> None:
    """Give a model that was loaded from a folder, and the models inside it, ``save_pretrained``."""
    saver = Saver(model, folder, files, config_fields(model))
    setattr(model, "save_pretrained", saver)  # noqa: B010  (of this model alone)
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module is not model:
            inner = InnerSaver(type(model).__name__)
            setattr(module, "save_pretrained", inner)  # noqa: B010


class Saver:
    """Stands in for the ``save_pretrained`` of one loaded model.

    ``files`` are the SHA-256 digests of the shards in ``folder``, as its plan has them. It does
    not keep the model alive, and a deep copy of the model gets one of its own.
    """

    def __init__(
        self,
        model: PreTrainedModel | None,
        folder: Path,
        files: Mapping[str, str],
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.files = folder, dict(files)
        self.config: Mapping[str, Any] = config or {}
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
        return Saver(memo.get(id(model)), self.folder, self.files, self.config)

    def __reduce__(self) -> tuple[Callable[..., "Saver"], tuple[object, ...]]:
        return Saver, (None, self.folder, self.files, self.config)

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
            for name in sorted(names - {"config.json"}):
                write_whole(target / name, partial(shutil.copyfile, self.folder / name))
        self._write_config(model, target / "config.json")
        if model is not None and model.can_generate():
            model.generation_config.save_pretrained(target)
            names.add("generation_config.json")
        return names

    def _write_config(self, model: PreTrainedModel | None, target: Path) -> None:
        """The configuration of the files, with what was changed in the model's since."""
        path = self.folder / "config.json"
        now = None if model is None else config_fields(model)
        changed = {
            name: value
            for name, value in (now or {}).items()
            if name not in self.config or self.config[name] != value
        }
        if changed:
            text = json.dumps({**read_json(path), **changed}, indent=2, sort_keys=True) + "\n"
            write_atomically(target, text)
        elif target.resolve() != path.resolve():
            write_whole(target, partial(shutil.copyfile, path))

    def _check_folder(self) -> None:
        """Raise ValueError unless the folder still holds what was loaded."""
        path = self.folder / "config.json"
        config = read_json(path) if path.is_file() else {}
        present = config.get("quantization_config", {}).get("files")
        paths = {self.folder / name: digest for name, digest in self.files.items()}
        if present != self.files or not all(path.is_file() for path in paths):
            raise ValueError(
                f"{self.folder}, which the model was loaded from, is gone or holds another "
                "checkpoint now; one of mxq is saved by copying its files, so put them back"
            )
        for path, digest in paths.items():
            if file_digest(path) != digest:
                raise ValueError(f"{path} was damaged or edited since the model was loaded")

    def _check_weights(self, model: PreTrainedModel) -> None:
        """Raise ValueError if a tensor is not that of the files, or is not in them."""
        held = model.state_dict()  # packed modules in the form of the files, whatever they hold
        stored: set[str] = set()
        for shard in self.files:
            with safe_open(self.folder / shard, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (a reader, not a mapping)
                    stored.add(name)
                    if not _is_same(held.get(name), file.get_tensor(name)):
                        raise _changed(name)
        places = {held[name].data_ptr() for name in stored & held.keys()}
        for name in held.keys() - stored:
            if held[name].data_ptr() not in places:  # not tied to one that is stored
                raise _changed(name)


def _is_same(held: torch.Tensor | None, stored: torch.Tensor) -> bool:
    """Whether a model holds what a file does, in a type that it may have been loaded in."""
    if held is None or held.shape != stored.shape:
        return False
    if held.is_meta:
        return True  # offloaded: its values are the loader's
    here, there = held.cpu().reshape(-1), stored.to(held.dtype).reshape(-1)
    return torch.equal(here.view(torch.uint8), there.view(torch.uint8))


def _changed(name: str) -> ValueError:
    return ValueError(
        f"{name} was changed since the model was loaded, and a checkpoint of mxq is saved by "
        "copying its files; quantize the changed model"
    )


class InnerSaver:
    """Stands in for the ``save_pretrained`` of a model inside of a loaded one."""

    def __init__(self, whole: str) -> None:
        self.whole = whole

    def __call__(self, *arguments: object, **options: object) -> None:
        """Refuse: a part of a checkpoint would load with random weights for the packed ones.

        Raises:
            ValueError: Always, with what to save instead.
        """
        raise ValueError(f"save the whole {self.whole}: a part of a checkpoint of mxq is none")


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
