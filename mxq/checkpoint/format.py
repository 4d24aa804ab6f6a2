"""The ``quantization_config`` of a checkpoint: which module has which scheme.

The schemes are listed once and modules refer to them by position, so 36 thousand expert linears
take some 100 kB of JSON that a person can still read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mxq.scheme import Scheme

QUANT_METHOD = "mxq"
FORMAT_VERSION = 1

GUARD = (
    "../ - this checkpoint was quantized with mxq: run `import mxq` before from_pretrained "
    "(pip install mxq)"
)
"""Value of ``transformers_weights`` in config.json.

Without mxq, transformers only warns of an unknown quant_method and then fills the experts with
random numbers. A file name outside the folder makes it stop, and it quotes this text; with mxq
imported the field is taken out before any file is looked for.
"""


@dataclass(frozen=True, slots=True)
class CheckpointPlan:
    """What a checkpoint holds.

    ``linears`` are module paths with their scheme, ``experts`` module paths of experts with the
    schemes of each projection by expert. ``rotated`` are the paths whose inputs are rotated.
    ``files`` are SHA-256 digests by file name.
    """

    linears: Mapping[str, Scheme]
    experts: Mapping[str, Mapping[str, tuple[Scheme, ...]]]
    rotated: frozenset[str]
    files: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """The fields of ``quantization_config``."""
        used = {*self.linears.values()}
        used |= {s for table in self.experts.values() for row in table.values() for s in row}
        schemes = sorted(used)
        place = {scheme: index for index, scheme in enumerate(schemes)}
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "schemes": [str(scheme) for scheme in schemes],
            "linears": {path: place[scheme] for path, scheme in self.linears.items()},
            "experts": {
                path: {name: [place[s] for s in row] for name, row in table.items()}
                for path, table in self.experts.items()
            },
            "rotated": sorted(self.rotated),
            "files": dict(self.files),
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "CheckpointPlan":
        """Inverse of ``to_json``.

        Raises:
            ValueError: If the format is newer than this mxq, or a field is absent or wrong.
        """
        version = fields.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"this checkpoint has mxq format version {version!r}, this mxq reads "
                f"{FORMAT_VERSION}; install the mxq that wrote it"
            )
        try:
            schemes = [Scheme.parse(text) for text in fields["schemes"]]
            return cls(
                linears={path: schemes[i] for path, i in fields["linears"].items()},
                experts={
                    path: {name: tuple(schemes[i] for i in row) for name, row in table.items()}
                    for path, table in fields["experts"].items()
                },
                rotated=frozenset(fields["rotated"]),
                files=dict(fields["files"]),
            )
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(
                f"the quantization_config of this checkpoint was edited or damaged: {error!r}"
            ) from error
