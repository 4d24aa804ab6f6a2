"""Finished parts of a stage on disk, so that a run that was stopped goes on where it was.

A part (the losses of a layer, a packed layer) is one artifact. It is used again only if it was
made from the same model, calibration text, settings and library versions; what differs is named.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from mxq.artifacts import Provenance
from mxq.storage import load_artifact, save_artifact

Artifact = TypeVar("Artifact")

log = logging.getLogger("mxq")


@dataclass(frozen=True, slots=True)
class Records(Generic[Artifact]):
    """The parts of one stage: artifacts of one ``kind``, each a file in ``folder``.

    Every artifact has a field ``provenance``, equal to this one's.
    """

    folder: Path
    kind: type[Artifact]
    provenance: Provenance

    def load(self) -> dict[str, Artifact]:
        """The parts that can be used again, by name; others are named in the log and removed."""
        found: dict[str, Artifact] = {}
        refused: set[str] = set()
        for path in sorted(self.folder.glob("*.json")):
            artifact = load_if_same(path, self.kind, self.provenance, refused)
            if artifact is None:
                path.unlink()
            else:
                found[path.stem] = artifact
        for why in sorted(refused):
            log.warning("%s: %s; they are made anew", self.folder, why)
        return found

    def save(self, name: str, artifact: Artifact) -> None:
        """Write one part."""
        save_artifact(self.folder / f"{name}.json", artifact)

    def clear(self) -> None:
        """Remove all parts."""
        shutil.rmtree(self.folder, ignore_errors=True)


def load_if_same(
    path: Path, kind: type[Artifact], provenance: Provenance, refused: set[str]
) -> Artifact | None:
    """The artifact if it is whole and of these inputs; else the reason is added to ``refused``."""
    try:
        artifact = load_artifact(path, kind)
    except ValueError as error:
        refused.add(str(error))
        return None
    made_from: Provenance = artifact.provenance  # type: ignore[attr-defined]
    changed = differences(made_from, provenance)
    if changed:
        refused.add(f"what is there was made from {changed}")
        return None
    return artifact


def differences(old: Provenance, new: Provenance) -> str:
    """What an artifact was made from that is not so now, in words; empty if nothing."""
    found = []
    if old.model_digest != new.model_digest:
        found.append("another model")
    if old.calibration_digest != new.calibration_digest:
        found.append("other calibration text")
    for what, before, now in (
        ("settings", old.settings, new.settings),
        ("library versions", old.versions, new.versions),
    ):
        changed = _changes(before, now)
        if changed:
            found.append(f"other {what} ({', '.join(changed)})")
    return " and ".join(found)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    old, new = (json.loads(json.dumps(dict(values))) for values in (before, now))  # as in a file
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    return [f"{n}: {_short(old.get(n))} -> {_short(new.get(n))}" for n in names]


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
