"""Evaluation of a student against its teacher: rollouts, exact divergence, rates with their intervals."""

from .divergence import score_rollouts
from .rates import Rate
from .rollouts import Rollout, sample_rollouts


__all__ = ["Rate", "Rollout", "sample_rollouts", "score_rollouts"]
