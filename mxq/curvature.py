"""Second moments of the gradients at the outputs of the sites, kept for the stage that packs.

They say which outputs of a block the model's loss hangs on, and are taken while gradients pass: in
the backward sweep that measures. One file for each layer in the work folder.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mxq.artifacts import Provenance
from mxq.blocks import LinearBlock, piece_sizes
from mxq.storage import digest_of, to_text, write_whole

Curvature = Mapping[str, tuple[Tensor, ...]]
"""``site -> second moments``: [H, H] of experts, [n, n] for each ``row_piece`` of a linear."""

KeepCurvature = Callable[[int, Curvature], None]
"""Takes that of a layer."""


def curvature_bytes(blocks: Sequence[LinearBlock]) -> int:
    """Bytes in files of the moments of the sites of those blocks, all of one layer."""
    linears = [block.out_features for block in blocks if block.expert is None]
    widths = [rows for outputs in linears for rows in piece_sizes(outputs)]
    # Experts write to one space, which the down projections do.
    routed = {b.out_features for b in blocks if b.expert is not None and b.projection == "down"}
    return 2 * sum(width**2 for width in (*widths, *routed))


@dataclass(frozen=True, slots=True)
class CurvatureFiles:
    """The moments of all layers, each a file in ``folder``, and what they are made from."""

    folder: Path
    provenance: Provenance

    def has(self, layer: int) -> bool:
        """Whether the moments of a layer are there and made from the same."""
        try:
            with safe_open(self._path(layer), "pt") as found:
                return bool((found.metadata() or {}).get("made_from") == self._made_from())
        except (OSError, SafetensorError):
            return False

    def save(self, layer: int, curvature: Curvature) -> None:
        """Write those of a layer."""
        tensors = {
            f"{site}/{place}": piece.contiguous()
            for site, pieces in curvature.items()
            for place, piece in enumerate(pieces)
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        metadata = {"made_from": self._made_from()}
        write_whole(
            self._path(layer), lambda temporary: save_file(tensors, temporary, metadata=metadata)
        )

    def load(self, layer: int) -> dict[str, Tensor]:
        """Those of a layer as they are in the file, ``site/piece -> moments``.

        Raises:
            ValueError: If they are absent, or of another model, text or scope.
        """
        if not self.has(layer):
            raise ValueError(
                f"{self._path(layer)} is absent or was made from something else, and the quantizer "
                "kronecker needs it; run mxq measure with this work folder again"
            )
        with safe_open(self._path(layer), "pt") as found:
            return {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118

    def _path(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.safetensors"

    def _made_from(self) -> str:
        return digest_of(to_text(self.provenance))


def joined(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, ...]]:
    """The curvature of a file's tensors."""
    found: dict[str, list[Tensor]] = {}
    for name in sorted(tensors, key=_place):
        found.setdefault(name.rpartition("/")[0], []).append(tensors[name])
    return {site: tuple(pieces) for site, pieces in found.items()}


def _place(name: str) -> tuple[str, int]:
    site, _, piece = name.rpartition("/")
    return site, int(piece)
