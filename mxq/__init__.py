"""Mixed-precision quantization of Mixture-of-Experts and dense language models.

Importing mxq registers its checkpoint format, so that
``transformers.AutoModelForCausalLM.from_pretrained(folder)`` loads what ``mxq quantize`` wrote.
"""

from mxq.api import export, quantize
from mxq.checkpoint import load as _registers_the_format
from mxq.checkpoint.engine import set_engine
from mxq.scheme import Scheme

__version__ = "0.1.0"

__all__ = ["Scheme", "__version__", "export", "quantize", "set_engine"]

del _registers_the_format
