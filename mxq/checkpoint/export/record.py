"""``mxq_export.json``: how an exported folder was written, and from what.

Of its files only this one tells; the format of other tools has no place for it.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from mxq.checkpoint.export.plan import ExportOptions, Group
from mxq.scheme import Scheme
from mxq.storage import load_artifact

RECORD = "mxq_export.json"


@dataclass(frozen=True, slots=True)
class ExportRecord:
    """What was exported.

    ``name`` is that of the original model, ``source_digest`` the SHA-256 of the config.json of the
    checkpoint of mxq, which holds those of its files. ``renamed`` are the paths of experts whose
    weights the original stores in one tensor and the export one by one.
    """

    name: str
    to: str
    options: ExportOptions
    groups: tuple[Group, ...]
    notes: tuple[str, ...]
    renamed: tuple[str, ...]
    tensor_bytes: int
    source_digest: str
    mxq: str

    @property
    def rounds_inputs(self) -> bool:
        """Whether mxq rounds the inputs of some weights, which no other tool does in its way."""
        return any(Scheme.parse(group.scheme).a_bits < 16 for group in self.groups)

    @property
    def command(self) -> str:
        """The command; its folders are the words OUT and DEST."""
        words = ["mxq", "export", "OUT", "DEST", "--to", self.to]
        for option, value in (
            ("--dtype", self.options.dtype),
            ("--checkpoint-format", self.options.checkpoint_format),
        ):
            words += [option, value] if value is not None else []
        return shlex.join(words)


def find_export(folder: Path) -> ExportRecord | None:
    """The record of an exported folder, None if it has none.

    Raises:
        ValueError: If it was edited or damaged.
    """
    return load_artifact(folder / RECORD, ExportRecord) if (folder / RECORD).is_file() else None
