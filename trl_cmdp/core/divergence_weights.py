"""Weights of the differentiated divergence: where the loss asks the teacher, and how much."""

import math
from dataclasses import dataclass

import torch

from .budget import CostScope, CreditAssignment, _check_credit_assignment, infeasible_steps, rollout_cost


# The least weight of `unrewarded_weights`. Where most answers are right the reward no longer sees by what steps: without
# it a tenth of the word problems' answers were right by steps that do not hold (docs/test_beds.md).
LEAST_WEIGHT = 0.3


def violation_weights(
    costs: torch.Tensor,
    mask: torch.Tensor,
    cost_limit: float | torch.Tensor,
    scope: CostScope = "mean",
    credit_assignment: CreditAssignment = "trajectory",
) -> torch.Tensor:
    """
    Weights w_t of the differentiated divergence Σ_t w_t ∇D(π(.|s_t), μ(.|s_t)): the part of ∇J that comes from π
    inside the penalty, up to the scope's 1/length (docs/math.md, "The two parts of the gradient").

    Args:
        costs (`torch.Tensor`):
            Per-token costs of shape `(B, T)`, in nats.
        mask (`torch.Tensor`):
            Mask of shape `(B, T)`, nonzero on the completion tokens that count.
        cost_limit (`float` or `torch.Tensor`):
            Limit d, in the unit of the scope; one for all rollouts, or of shape `(B,)`.
        scope (`str`, *optional*, defaults to `"mean"`):
            As in [`rollout_cost`].
        credit_assignment (`str`, *optional*, defaults to `"trajectory"`):
            `"trajectory"`: 1 on every token of a rollout whose cost exceeds the limit. `"token"`: 1 on the
            [`infeasible_steps`].

    Returns:
        `torch.Tensor`: Weights of shape `(B, T)`, 0 on masked positions.
    """
    _check_credit_assignment(credit_assignment)
    if credit_assignment == "token":
        weights = infeasible_steps(costs, mask, cost_limit, scope)
    else:
        weights = (rollout_cost(costs, mask, scope) > cost_limit).unsqueeze(-1) & (mask != 0)
    return weights.to(costs.dtype)


@dataclass
class RewardRange:
    """
    Lowest and highest reward that a run has seen: the scale on which a reward of any size is low or high.

    Args:
        low, high (`float`, *optional*):
            The two; `None` before the first reward.
    """

    low: float | None = None
    high: float | None = None

    def update(self, rewards: torch.Tensor) -> None:
        """Take in rewards of shape `(B,)`. NaN, where a rollout was not scored, is left out."""
        seen = [reward for reward in (self.low, self.high, *rewards.tolist()) if reward is not None]
        seen = [reward for reward in seen if math.isfinite(reward)]
        self.low, self.high = min(seen, default=None), max(seen, default=None)

    def success(self, rewards: torch.Tensor) -> torch.Tensor:
        """
        Where rewards stand between the lowest, 0, and the highest, 1.

        Args:
            rewards (`torch.Tensor`):
                Rewards of shape `(B,)`, NaN where a rollout was not scored.

        Returns:
            `torch.Tensor`: Values of shape `(B,)` in [0, 1], NaN stays NaN. 0 as long as the run has seen one value
            alone: nobody knows yet whether that is success.
        """
        if self.low is None or self.high is None or self.low == self.high:
            return torch.where(rewards.isnan(), rewards, 0.0)
        return ((rewards - self.low) / (self.high - self.low)).clamp(0, 1)


def unrewarded_weights(
    success: torch.Tensor,
    costs: torch.Tensor,
    mask: torch.Tensor,
    num_generations: int,
    cost_limit: float | torch.Tensor,
    scope: CostScope = "mean",
) -> torch.Tensor:
    """
    Weights w_t of the differentiated divergence for what the reward does not say: 1 less the mean success of the
    rollout's group, and never less than 0.3, which is also the weight of a feasible rollout that did better than its
    group. Outside the limit they fall with the cost C, as d/C: far from the teacher the limit leads, and the student is
    not made a copy first.

    Args:
        success (`torch.Tensor`):
            Success of each rollout in [0, 1], of shape `(B,)`, whole groups of `num_generations` after one another
            ([`RewardRange`]). NaN where a rollout was not scored: it has its group's weight.
        costs (`torch.Tensor`):
            Per-token costs of shape `(B, T)`, in nats.
        mask (`torch.Tensor`):
            Mask of shape `(B, T)`, nonzero on the completion tokens that count.
        num_generations (`int`):
            Rollouts per prompt, G.
        cost_limit (`float` or `torch.Tensor`):
            Limit d, in the unit of the scope; one for all rollouts, or of shape `(B,)`.
        scope (`str`, *optional*, defaults to `"mean"`):
            As in [`rollout_cost`].

    Returns:
        `torch.Tensor`: Weights of shape `(B, T)`, 0 on masked positions.
    """
    group = success.to(costs.dtype).view(-1, num_generations)  # (B/G, G)
    mean = group.nanmean(1, keepdim=True).nan_to_num(nan=0.0)
    lowest = group.nan_to_num(nan=torch.inf).amin(1, keepdim=True)
    better = (group > mean) & (group > lowest)  # a mean of equal values may be below them by a rounding error
    cost = rollout_cost(costs, mask, scope)  # (B,)
    limit = torch.as_tensor(cost_limit, dtype=cost.dtype, device=cost.device).expand_as(cost)
    silence = (1 - mean).expand_as(group).flatten().masked_fill(better.flatten() & (cost <= limit), 0.0)  # (B,)
    weights = silence.clamp(min=LEAST_WEIGHT) * limit / torch.maximum(cost, limit)
    return weights.unsqueeze(-1) * (mask != 0)
