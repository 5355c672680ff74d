"""Evaluation of a student against its teacher: rollouts, exact divergence, rates with their intervals, comparisons."""

from importlib import import_module
from typing import TYPE_CHECKING

from .calibration import Calibration, CostDistribution, calibrate_limit
from .comparison import Comparison, Estimate, MethodSummary, compare_methods
from .rates import Rate
from .records import CellRecord, Outcome, read_records
from .rollout_records import EvaluationSettings, RolloutRecord, read_rollout_records
from .summary import (
    CostSummary,
    EvaluationDifference,
    EvaluationSummary,
    Figure,
    RolloutSummary,
    compare_evaluations,
    summarize,
)
from .win_rates import Agreement, WinRate, agreement, judge_pairs, pair_rollouts, win_rate


if TYPE_CHECKING:
    from .divergence import score_rollouts, with_teacher_prompts
    from .evaluator import evaluate
    from .rollouts import Rollout, sample_rollouts

__all__ = [
    "Agreement",
    "Calibration",
    "CellRecord",
    "Comparison",
    "CostDistribution",
    "CostSummary",
    "Estimate",
    "EvaluationDifference",
    "EvaluationSettings",
    "EvaluationSummary",
    "Figure",
    "MethodSummary",
    "Outcome",
    "Rate",
    "Rollout",
    "RolloutRecord",
    "RolloutSummary",
    "WinRate",
    "agreement",
    "calibrate_limit",
    "compare_evaluations",
    "compare_methods",
    "evaluate",
    "judge_pairs",
    "pair_rollouts",
    "read_records",
    "read_rollout_records",
    "sample_rollouts",
    "score_rollouts",
    "summarize",
    "win_rate",
    "with_teacher_prompts",
]

# These need transformers, which what is computed from records should not wait for.
_OF_MODELS = {
    "Rollout": "rollouts",
    "sample_rollouts": "rollouts",
    "score_rollouts": "divergence",
    "with_teacher_prompts": "divergence",
    "evaluate": "evaluator",
}


def __getattr__(name: str) -> object:
    if name in _OF_MODELS:
        return getattr(import_module(f".{_OF_MODELS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
