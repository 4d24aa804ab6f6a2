"""The work folder of a run: its settings, calibration tokens and the artifacts of its stages.

A stage whose artifact is there and was made from the same model, calibration and settings is not
run again; an artifact of other inputs is made anew, which the log says with what has changed, or
refused by the stage that needs it. One run at a time writes here.
"""

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mxq.artifacts import Allocation, Provenance, SensitivityTable
from mxq.compute import CPU, compute_device, describe
from mxq.config import CalibrationOptions, MeasureOptions, ModelOptions, ResourceOptions
from mxq.distributed import Team
from mxq.locks import hold
from mxq.models.activations import ActivationStore
from mxq.models.sweep import Batches, make_batches
from mxq.profiling.activation import ActivationStats
from mxq.records import Records, load_if_same
from mxq.storage import (
    from_text,
    load_artifact,
    remove_temporaries,
    save_artifact,
    to_text,
    write_whole,
)

log = logging.getLogger("mxq")

VERSIONED = ("mxq", "torch", "transformers", "safetensors")

Artifact = TypeVar("Artifact")


@dataclass(frozen=True, slots=True)
class RunSettings:
    """What a work folder belongs to; read back by ``allocate`` and ``pack``."""

    model: ModelOptions
    calibration: CalibrationOptions
    measure: MeasureOptions
    model_digest: str


@dataclass(frozen=True, slots=True)
class CalibrationTokens:
    """The final token ids: those fitted to, and those held out to choose by and to measure on."""

    fit_ids: Tensor
    heldout_ids: Tensor
    digest: str

    def batches(self, device: torch.device, store: ActivationStore | None = None) -> Batches:
        """Fit batches first, held-out batches after; ``store`` keeps their activations."""
        return make_batches(self.fit_ids, self.heldout_ids, store=store, device=device)


@dataclass(frozen=True, slots=True)
class Workspace:
    """Paths in a work folder, and reading and writing what is there.

    ``store`` keeps the activations of a run, ``team`` are its processes: the one that leads is
    the only one to read and write here. ``device`` is where this process computes.
    """

    folder: Path
    store: ActivationStore = field(default_factory=ActivationStore, compare=False)
    team: Team = field(default_factory=Team.alone, compare=False)
    device: torch.device = CPU

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the folder, and remove what killed ones left unfinished.

        Raises:
            ValueError: If another run is at work here.
        """
        if not self.team.leads:
            yield
            return
        with hold(self.folder, at=str(self.folder), instead="another work folder"):
            for folder in (self.folder, *filter(Path.is_dir, self.folder.iterdir())):
                remove_temporaries(folder)
            yield

    def path(self, name: str) -> Path:
        """The file of an artifact."""
        return self.folder / f"{name}.json"

    def save(self, name: str, artifact: object) -> None:
        """Write one artifact."""
        save_artifact(self.path(name), artifact)

    def settings(self) -> RunSettings:
        """The run that this folder belongs to.

        Raises:
            ValueError: If this is not a work folder.
        """
        return load_artifact(self.path("settings"), RunSettings)

    def profile(self) -> ActivationStats:
        """The profile."""
        return load_artifact(self.path("profile"), ActivationStats)

    def sensitivity(self) -> SensitivityTable:
        """The sensitivity table."""
        return load_artifact(self.path("sensitivity"), SensitivityTable)

    def allocation(self) -> Allocation:
        """The plan."""
        return load_artifact(self.path("allocation"), Allocation)

    def cached(self, name: str, kind: type[Artifact], provenance: Provenance) -> Artifact | None:
        """An earlier run's artifact if it was made from the same inputs, else None."""
        if not self.path(name).is_file():
            return None
        refused: set[str] = set()
        artifact = load_if_same(self.path(name), kind, provenance, refused)
        for why in refused:
            log.warning("%s: %s; it is made anew", self.path(name), why)
        return artifact

    def records(self, name: str, kind: type[Artifact], provenance: Provenance) -> Records[Artifact]:
        """The finished parts of a stage, in a folder of their own."""
        return Records(self.folder / name, kind, provenance)

    def packed(self, plan: str) -> Path:
        """The folder where the checkpoint of a plan is until it is published."""
        return self.folder / f"packed-{plan}"

    def remove_packed(self) -> None:
        """Remove the checkpoints of all plans, and what was measured of them."""
        self.path("losses").unlink(missing_ok=True)
        for folder in self.folder.glob("packed-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def save_tokens(self, tokens: CalibrationTokens) -> None:
        """Write the calibration tokens."""
        ids = {"fit": tokens.fit_ids.contiguous(), "heldout": tokens.heldout_ids.contiguous()}
        write_whole(
            self.folder / "calibration.safetensors",
            lambda temporary: save_file(ids, temporary, metadata={"digest": tokens.digest}),
        )

    def has_tokens(self, digest: str) -> bool:
        """Whether the calibration tokens are there and are those of that digest."""
        try:
            return self.tokens().digest == digest
        except (ValueError, SafetensorError):
            return False

    def tokens(self) -> CalibrationTokens:
        """The calibration tokens.

        Raises:
            ValueError: If they are absent.
        """
        path = self.folder / "calibration.safetensors"
        if not path.is_file():
            raise ValueError(f"{path} does not exist; run mxq measure with this work folder first")
        try:
            ids = load_file(path)
            return make_tokens(*(_matrix_of_ids(ids[part]) for part in ("fit", "heldout")))
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise ValueError(
                f"{path} does not hold calibration tokens ({error}); remove it and run mxq measure "
                "again"
            ) from error


def open_workspace(folder: Path, resources: ResourceOptions, team: Team | None = None) -> Workspace:
    """A work folder that takes the activations for which the memory limit leaves no room.

    Raises:
        ValueError: If the device to compute on is not there, or not the same in every process.
    """
    team = team or Team.alone()
    device = compute_device(resources.compute, local_rank=team.local_rank, processes=team.size)
    kinds = team.exchange(describe(device))
    if len(set(kinds)) > 1:
        raise ValueError(
            f"the processes compute on different devices ({', '.join(kinds)}), so results would "
            "depend on who made which; give them the same, e.g. by --compute cpu"
        )
    return Workspace(folder, ActivationStore(resources.memory_bytes, folder), team, device)


def share_calibration(
    team: Team, make: Callable[[], tuple[CalibrationTokens, ActivationStats]]
) -> tuple[CalibrationTokens, ActivationStats]:
    """Tokens and profile that the leading process makes, in every process."""
    if team.size == 1:
        return make()
    text, ids = "", {}
    if team.leads:
        tokens, profile = make()
        text, ids = to_text(profile), {"fit": tokens.fit_ids, "heldout": tokens.heldout_ids}
    text, ids = team.exchange_tensors(text, ids)[0]
    profile = from_text(text, ActivationStats, "the profile of process 0")
    return make_tokens(ids["fit"], ids["heldout"]), profile


def make_tokens(fit_ids: Tensor, heldout_ids: Tensor) -> CalibrationTokens:
    """Calibration tokens with the digest of both parts."""
    total = hashlib.sha256()
    for ids in (fit_ids, heldout_ids):
        total.update(repr(tuple(ids.shape)).encode())
        total.update(ids.to(torch.int64).contiguous().numpy().astype("<i8").tobytes())
    return CalibrationTokens(fit_ids, heldout_ids, total.hexdigest())


def _matrix_of_ids(ids: Tensor) -> Tensor:
    if ids.dtype != torch.int64 or ids.dim() != 2 or ids.numel() == 0 or ids.min() < 0:
        raise ValueError(f"found {ids.dtype} of shape {tuple(ids.shape)}, expected token ids")
    return ids


def make_provenance(
    model_digest: str, calibration_digest: str, settings: Mapping[str, object]
) -> Provenance:
    """Provenance with the versions of the libraries that compute the result."""
    return Provenance(model_digest, calibration_digest, dict(settings), library_versions())


def library_versions() -> dict[str, str]:
    """Installed versions of what the result depends on."""
    found = {}
    for name in VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
