"""The work folder of a run: its settings, calibration tokens and the artifacts of its stages.

A stage whose artifact is there and was made from the same model, calibration and settings is not
run again; an artifact of other inputs is made anew, or refused by the stage that needs it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mxq.artifacts import Allocation, Provenance, SensitivityTable
from mxq.config import CalibrationOptions, MeasureOptions, ModelOptions, ResourceOptions
from mxq.models.activations import ActivationStore
from mxq.models.sweep import Batches, make_batches
from mxq.profiling.activation import ActivationStats
from mxq.storage import load_artifact, save_artifact

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

    def batches(self, store: ActivationStore | None = None) -> Batches:
        """Fit batches first, held-out batches after; ``store`` keeps their activations."""
        return make_batches(self.fit_ids, self.heldout_ids, store=store)


@dataclass(frozen=True, slots=True)
class Workspace:
    """Paths in a work folder, and reading and writing what is there.

    ``store`` keeps the activations of a run.
    """

    folder: Path
    store: ActivationStore = field(default_factory=ActivationStore, compare=False)

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
        try:
            artifact = load_artifact(self.path(name), kind)
        except ValueError:
            return None  # damaged or of an older version: the stage that asks makes it anew
        made_from: Provenance = artifact.provenance  # type: ignore[attr-defined]
        same = _fingerprint(made_from) == _fingerprint(provenance)
        return artifact if same else None

    def save_tokens(self, tokens: CalibrationTokens) -> None:
        """Write the calibration tokens."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {"fit": tokens.fit_ids.contiguous(), "heldout": tokens.heldout_ids.contiguous()},
            self.folder / "calibration.safetensors",
            metadata={"digest": tokens.digest},
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
        ids = load_file(path)
        return make_tokens(ids["fit"], ids["heldout"])


def open_workspace(folder: Path, resources: ResourceOptions) -> Workspace:
    """A work folder that takes the activations for which the memory limit leaves no room."""
    return Workspace(folder, ActivationStore(resources.memory_bytes, folder))


def make_tokens(fit_ids: Tensor, heldout_ids: Tensor) -> CalibrationTokens:
    """Calibration tokens with the digest of both parts."""
    total = hashlib.sha256()
    for ids in (fit_ids, heldout_ids):
        total.update(repr(tuple(ids.shape)).encode())
        total.update(ids.to(torch.int64).contiguous().numpy().astype("<i8").tobytes())
    return CalibrationTokens(fit_ids, heldout_ids, total.hexdigest())


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


def _fingerprint(provenance: Provenance) -> str:
    return json.dumps(asdict(provenance), sort_keys=True)
