"""The words, units and defaults of a limit. Nothing is imported here, so that the command line's help stays fast."""

from typing import Literal


CostScope = Literal["mean", "sum", "worst_prefix"]
# Unit of a rollout's cost, and so of a limit, in each scope.
COST_UNITS: dict[CostScope, str] = {
    "mean": "nats per token",
    "sum": "nats per rollout",
    "worst_prefix": "nats per token of the worst prefix",
}
COST_SCOPE: CostScope = "mean"
COST_LIMIT = 0.35
VIOLATION_PENALTY = 20.0
# Share of rollouts within the limit from which on a student counts as one that satisfies it.
FEASIBLE_SATISFACTION = 0.95
