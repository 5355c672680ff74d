"""The modified reward of the constrained problem (2509.22921, section 4; 2202.06558 for its origin in Sauté RL)."""

import torch

from .budget import CostScope, infeasible_steps, last_token, rollout_cost


def modified_reward(
    rewards: torch.Tensor,
    costs: torch.Tensor,
    mask: torch.Tensor,
    cost_limit: float | torch.Tensor,
    penalty: float,
    scope: CostScope = "mean",
) -> torch.Tensor:
    """
    Modified reward of a whole rollout: R̂(y) = R(y) if C(y) ≤ d, and −(n + C(y)) otherwise.

    Args:
        rewards (`torch.Tensor`):
            Task rewards R of shape `(B,)`. NaN where a rollout could not be scored; it stays NaN if feasible.
        costs (`torch.Tensor`):
            Per-token costs of shape `(B, T)`, in nats.
        mask (`torch.Tensor`):
            Mask of shape `(B, T)`, nonzero on the completion tokens that count.
        cost_limit (`float` or `torch.Tensor`):
            Limit d, in the unit of the scope; one for all rollouts, or of shape `(B,)`.
        penalty (`float`):
            Penalty n. Must exceed the largest |R|, so that no violation is worth its reward.
        scope (`str`, *optional*, defaults to `"mean"`):
            As in [`rollout_cost`].

    Returns:
        `torch.Tensor`: Modified rewards of shape `(B,)`.
    """
    cost = rollout_cost(costs, mask, scope)
    return torch.where(cost <= cost_limit, rewards.to(cost.dtype), -(penalty + cost))


def token_modified_rewards(
    rewards: torch.Tensor,
    costs: torch.Tensor,
    mask: torch.Tensor,
    cost_limit: float | torch.Tensor,
    penalty: float,
    scope: CostScope = "mean",
    *,
    horizon: int,
) -> torch.Tensor:
    """
    Modified reward of every step R̂_t, with what falls after the end of the completion in a last column.

    A violated episode keeps paying −(n + C(y))/H for each of the H − L steps after its end. Without it, a student
    that has violated would escape further penalty by ending early.

    Args:
        rewards (`torch.Tensor`):
            Task rewards R of shape `(B,)`, paid at the last token of a feasible rollout.
        costs (`torch.Tensor`):
            Per-token costs of shape `(B, T)`, in nats.
        mask (`torch.Tensor`):
            Mask of shape `(B, T)`, nonzero on the completion tokens that count.
        cost_limit (`float` or `torch.Tensor`):
            Limit d, in the unit of the scope; one for all rollouts, or of shape `(B,)`.
        penalty (`float`):
            Penalty n.
        scope (`str`, *optional*, defaults to `"mean"`):
            As in [`rollout_cost`].
        horizon (`int`):
            H, the largest number of completion tokens (`max_completion_length`).

    Returns:
        `torch.Tensor`: Step rewards of shape `(B, T + 1)`. The last column is the sum of what falls after the end.
    """
    if horizon < 1:
        raise ValueError(f"`horizon` must be at least 1 (it is `max_completion_length`), got {horizon}.")
    cost = rollout_cost(costs, mask, scope)  # (B,)
    violated = cost > cost_limit  # (B,)
    zeros = torch.zeros_like(costs)
    kept = torch.where(mask != 0, costs, zeros)
    steps = torch.where(infeasible_steps(costs, mask, cost_limit, scope), -(penalty + kept) / horizon, zeros)
    final = last_token(mask) & ~violated.unsqueeze(-1)
    steps = torch.where(final, rewards.to(costs.dtype).unsqueeze(-1), steps)  # (B, T)

    steps_left = (horizon - (mask != 0).sum(-1)).clamp(min=0)  # (B,)
    after = torch.where(violated, -(penalty + cost) / horizon * steps_left, torch.zeros_like(cost))
    return torch.cat([steps, after.unsqueeze(-1)], dim=-1)


def returns_to_go(step_rewards: torch.Tensor) -> torch.Tensor:
    """
    Undiscounted returns-to-go G_t = Σ_{k≥t} R̂_k.

    Args:
        step_rewards (`torch.Tensor`):
            Step rewards of shape `(B, T + 1)`, from [`token_modified_rewards`].

    Returns:
        `torch.Tensor`: Returns-to-go of shape `(B, T)`, what falls after the end included in each.
    """
    return step_rewards.flip(-1).cumsum(-1).flip(-1)[:, :-1]
