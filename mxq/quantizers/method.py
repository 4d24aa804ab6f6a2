"""What a quantizer is: a plain function, and the name under which its results are reported."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mxq.numerics import QuantizedWeight
from mxq.quantizers.kronecker import quantize_kronecker
from mxq.scheme import Scheme

Quantizer = Callable[[Tensor, Scheme, Tensor | None], QuantizedWeight]
"""``(w_NK, scheme, hessian_KK | None) -> QuantizedWeight``, pure, batch dimensions allowed."""


@dataclass(frozen=True, slots=True)
class Method:
    """A quantizer with its name."""

    name: str
    quantizer: Quantizer

    @property
    def reads_gradients(self) -> bool:
        """Whether packing makes use of the second moments of the gradients at the outputs."""
        return self.quantizer is quantize_kronecker
