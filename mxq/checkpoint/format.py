"""The ``quantization_config`` of a checkpoint: which module has which scheme.

The schemes are listed once and modules refer to them by position, so 36 thousand expert linears
take some 100 kB of JSON that a person can still read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxq.counted import counted
from mxq.scheme import Scheme

QUANT_METHOD = "mxq"
FORMAT_VERSION = 1

FIELDS = ("quant_method", "format_version", "schemes", "linears", "experts", "rotated", "files")
"""All fields of ``quantization_config``; another one is no part of this version."""

LONGEST_SHOWN = 60
"""Characters of a wrong value that a message quotes."""

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
        unknown = sorted(set(fields) - set(FIELDS))
        if unknown:
            raise _damaged(f"it has an unknown field {unknown[0]!r}")
        schemes = [Scheme.parse(_text(text)) for text in _list(fields, "schemes")]
        linears, experts = _mapping(fields, "linears"), _mapping(fields, "experts")
        rotated = frozenset(_text(path) for path in _list(fields, "rotated"))
        if not rotated <= linears.keys() | experts.keys():
            raise _damaged("'rotated' names a module that has no scheme")
        return cls(
            linears={path: _pick(schemes, place) for path, place in linears.items()},
            experts={
                path: {
                    name: tuple(_pick(schemes, place) for place in _list(table, name))
                    for name in _mapping(experts, path)
                }
                for path, table in experts.items()
            },
            rotated=rotated,
            files={
                _file_name(name): _text(digest)
                for name, digest in _mapping(fields, "files").items()
            },
        )


def _mapping(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = fields.get(name)
    if not isinstance(found, dict):
        raise _damaged(f"{name!r} is {_shown(found)}, not an object")
    return found


def _list(fields: Mapping[str, Any], name: str) -> list[Any]:
    found = fields.get(name)
    if not isinstance(found, list):
        raise _damaged(f"{name!r} is {_shown(found)}, not a list")
    return found


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise _damaged(f"{_shown(value)} stands where a text is expected")
    return value


def _pick(schemes: Sequence[Scheme], place: object) -> Scheme:
    # True is an integer to Python, and -1 the last place.
    if type(place) is not int or not 0 <= place < len(schemes):
        raise _damaged(
            f"{_shown(place)} is no place in its list of {counted(len(schemes), 'scheme')}"
        )
    return schemes[place]


def _file_name(name: str) -> str:
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise _damaged(f"{_shown(name)} is no name of a safetensors file in the folder")
    return name


def _shown(value: object) -> str:
    """A value that may be long, for a message."""
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "..."


def _damaged(what: str) -> ValueError:
    return ValueError(
        f"the quantization_config of this checkpoint was edited or damaged: {what}; copy or "
        "download config.json again"
    )
