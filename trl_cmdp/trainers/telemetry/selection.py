"""Choosing the checkpoint: feasibility first, reward second, as one number that `metric_for_best_model` can name."""

from dataclasses import dataclass
from typing import Any

import torch
from trl import GRPOConfig


FEASIBLE_REWARD = "constraint/feasible_reward"
_LARGEST_REWARD = torch.finfo(torch.float32).max  # TRL's rewards are float32: a mean of them lies within ± this


@dataclass
class Verdicts:
    """Rollouts of one evaluation that were judged against the limit."""

    judged: int = 0  # their number
    violations: int = 0  # how many of them exceed the limit
    reward_sum: float = 0.0  # sum of their task rewards

    def add(self, rewards: torch.Tensor, feasible: torch.Tensor, judged: torch.Tensor) -> None:
        """Count more rollouts: task rewards, and whether each is feasible and judged, of shape `(B,)` each."""
        self.judged += int(judged.sum())
        self.violations += int((judged & ~feasible).sum())
        self.reward_sum += float(rewards[judged].double().sum())

    def feasible_reward(self, tolerated_violation_rate: float) -> float:
        """
        Number that orders students by feasibility first and reward second. With v the violation rate and M the largest
        float32:

            mean reward, in [−M, M]       if v ≤ tolerated_violation_rate
            −(1 + v)·M, in [−2M, −M)      otherwise: below every reward, and the more violations the lower
            −3·M                          without a verdict (no rollout was judged, or no limit is set yet)
        """
        if self.judged == 0:
            return -3 * _LARGEST_REWARD
        violation_rate = self.violations / self.judged
        if violation_rate > tolerated_violation_rate:
            return -(1 + violation_rate) * _LARGEST_REWARD
        return self.reward_sum / self.judged


def asks_for_feasible_reward(args: GRPOConfig, with_teacher: bool, eval_dataset: Any) -> bool:
    """Whether checkpoints are to be chosen by feasibility first and reward second."""
    if args.metric_for_best_model not in (FEASIBLE_REWARD, f"eval_{FEASIBLE_REWARD}"):
        return False
    asked = f"`metric_for_best_model={args.metric_for_best_model!r}`"
    if not with_teacher:
        raise ValueError(
            f"{asked} needs a teacher: without one nothing is measured against a limit. Pass `teacher_model`, or choose "
            "by 'reward'."
        )
    if args.eval_strategy == "no":
        raise ValueError(f"{asked} is measured in evaluation: pass `eval_dataset` and set `eval_strategy` to 'steps'.")
    if isinstance(eval_dataset, dict):
        raise ValueError(
            f"{asked} is one number of one evaluation, and `eval_dataset` is a dict of {len(eval_dataset)}, whose "
            "metrics have the same names. Pass a single dataset."
        )
    if not args.greater_is_better:
        raise ValueError(f"{asked} is better the greater it is: leave out `greater_is_better=False`.")
    return True
