"""Mixed-precision quantization of Mixture-of-Experts and dense language models."""

__version__ = "0.1.0"
