"""Which block gets which scheme: problem, bounds, solvers, costs. Numbers only, no tensors.

``SOLVERS`` maps a name to a solver, a callable ``(AllocationProblem, *, gap, time_limit_s)``;
``allocate`` takes such a callable too. Importing this package does not import PuLP.
"""

from mxq.search.allocate import allocate, best_uniform, pareto, uniform
from mxq.search.cost import CostModel, LatencyModel, storage_cost
from mxq.search.device import Device, load_device
from mxq.search.granularity import GRANULARITIES
from mxq.search.problem import (
    AllocationProblem,
    Budget,
    Floor,
    InfeasibleError,
    Solution,
    Solver,
    tie,
)
from mxq.search.solvers import SOLVERS

__all__ = [
    "GRANULARITIES",
    "SOLVERS",
    "AllocationProblem",
    "Budget",
    "CostModel",
    "Device",
    "Floor",
    "InfeasibleError",
    "LatencyModel",
    "Solution",
    "Solver",
    "allocate",
    "best_uniform",
    "load_device",
    "pareto",
    "storage_cost",
    "tie",
    "uniform",
]
