"""Evaluation of a student against its teacher: rollouts, exact divergence, rates with their intervals, comparisons."""

from .comparison import Comparison, Estimate, MethodSummary, compare_methods
from .divergence import score_rollouts
from .rates import Rate
from .records import CellRecord, Outcome, read_records
from .rollouts import Rollout, sample_rollouts


__all__ = [
    "CellRecord",
    "Comparison",
    "Estimate",
    "MethodSummary",
    "Outcome",
    "Rate",
    "Rollout",
    "compare_methods",
    "read_records",
    "sample_rollouts",
    "score_rollouts",
]
