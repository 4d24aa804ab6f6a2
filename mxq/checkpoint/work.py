"""What packing a model, and one layer of it, goes by."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mxq.artifacts import Allocation
from mxq.curvature import Curvature
from mxq.distributed import Team
from mxq.models.activations import ActivationStore
from mxq.models.adapter import ModelAdapter
from mxq.models.lockstep import LayerCall
from mxq.models.probes import SiteInputs
from mxq.models.residual import Residual
from mxq.models.sweep import Batches
from mxq.quantizers.method import Method


@dataclass(frozen=True, slots=True)
class PackJob:
    """The unchanging arguments of one packing run.

    ``target`` is what blocks are fitted to, one of ``mxq.config.TARGETS``. ``curvature`` gives what
    is known of the gradients of a layer's sites, None where nothing is.
    """

    adapter: ModelAdapter
    allocation: Allocation
    method: Method
    batches: Batches
    team: Team
    target: str
    curvature: Callable[[int], Curvature] | None = None

    @property
    def fit_tokens(self) -> int:
        """Tokens that may be fitted to."""
        return self.batches.fit_tokens

    @property
    def store(self) -> ActivationStore:
        """Where activations are kept."""
        return self.batches.store

    def curvature_of(self, layer: int) -> Curvature:
        """What is known of the gradients of a layer's sites; every process asks for it."""
        return {} if self.curvature is None else self.curvature(layer)

    def rotated(self, layer: int) -> bool:
        """Whether the layer's block inputs are rotated."""
        return layer in self.allocation.rotated_layers


@dataclass(frozen=True, slots=True)
class LayerWork:
    """A loaded layer that is to be quantized, and its calls.

    ``origins`` are the inputs that its sites, and the stream in ``residual``, have in the original
    model, where blocks are fitted to that; else it is empty. ``curvature`` is of the sites whose
    gradients are known. ``residual`` is where the layer's residual stream is read, None where
    blocks are not fitted to it.
    """

    job: PackJob
    layer: int
    calls: Sequence[LayerCall]
    origins: Mapping[str, SiteInputs]
    curvature: Curvature
    residual: Residual | None = None
