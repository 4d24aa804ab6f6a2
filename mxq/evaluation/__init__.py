"""How models are compared: what the scripts under ``eval/`` share.

``texts`` scores models on text and ``tasks`` on questions, ``statistics`` says how sure a mean or a
difference is, ``sizes`` weighs a checkpoint; ``output`` and ``plot`` show what was found.
"""

from mxq.evaluation.loading import load_model, load_tokenizer

__all__ = ["load_model", "load_tokenizer"]
