"""What inference engines can load: their rules as data, a check of plans, and plans inside them.

``load_rules`` gives the rules of an engine, ``check`` says which of them a deployment breaks, and
``restrict`` says what a planner may choose. Numbers and names only: no tensors, no files but the
rules.
"""

from mxq.engines.check import check, unchecked
from mxq.engines.deployment import ConfigGroup, Deployment, Exported, Finding, Verdict
from mxq.engines.formats import DENSE, StoredFormat, format_of
from mxq.engines.restrict import Restriction, fitting_schemes, format_warnings, restrict
from mxq.engines.rules import (
    ENGINES,
    EXPORTED,
    EngineRules,
    Rule,
    check_engine,
    check_tensor_parallel,
    fused_linears,
    load_rules,
)

__all__ = [
    "DENSE",
    "ENGINES",
    "EXPORTED",
    "ConfigGroup",
    "Deployment",
    "EngineRules",
    "Exported",
    "Finding",
    "Restriction",
    "Rule",
    "StoredFormat",
    "Verdict",
    "check",
    "check_engine",
    "check_tensor_parallel",
    "fitting_schemes",
    "format_of",
    "format_warnings",
    "fused_linears",
    "load_rules",
    "restrict",
    "unchecked",
]
