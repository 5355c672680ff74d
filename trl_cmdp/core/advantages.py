"""Group-relative advantages from task rewards and teacher costs."""

from typing import Literal

import torch

from .budget import CostScope, CreditAssignment, _check_credit_assignment, rollout_cost
from .rewards import modified_reward, returns_to_go, token_modified_rewards


ConstraintAggregation = Literal["lexicographic", "sum_then_normalize"]
ScaleRewards = Literal["group", "batch", "none"]

_STD_EPSILON = 1e-4  # TRL's


def group_advantages(
    rewards: torch.Tensor, num_generations: int, scale_rewards: ScaleRewards = "group"
) -> torch.Tensor:
    """
    GRPO's advantages (2402.03300), exactly as TRL computes them.

    Args:
        rewards (`torch.Tensor`):
            Rewards of shape `(B,)`, whole groups of `num_generations` after one another. NaN where a rollout could
            not be scored: it is left out, and its advantage is 0.
        num_generations (`int`):
            Rollouts per prompt, G.
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            `"group"`, `"batch"` or `"none"`, as in TRL.

    Returns:
        `torch.Tensor`: Advantages of shape `(B,)`.
    """
    return _standardize(rewards, rewards, num_generations, scale_rewards).nan_to_num(nan=0.0)


def constrained_advantages(
    rewards: torch.Tensor,
    costs: torch.Tensor,
    mask: torch.Tensor,
    num_generations: int,
    cost_limit: float | torch.Tensor,
    penalty: float,
    scope: CostScope = "mean",
    credit_assignment: CreditAssignment = "trajectory",
    constraint_aggregation: ConstraintAggregation = "lexicographic",
    scale_rewards: ScaleRewards = "group",
    horizon: int | None = None,
    reward_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Group-relative advantages of the constrained problem. They equal GRPO's when every rollout is feasible.

    `"lexicographic"` keeps the order that the penalty n → ∞ gives (feasible and right > feasible and wrong > violating
    a little > violating a lot) at a bounded size. With z_i the reward standardised over the group's feasible rollouts,

        U_i = z_i if feasible, min(0, min_j z_j) − 1 − min(C_i, n)/n otherwise;    A_i = U_i − mean_j U_j

    and with `credit_assignment="token"`, G_it being the return-to-go of the penalty part of R̂_t over n,

        A_it = 1{i feasible}·z_i + (G_it − mean_j G_j1)/(std_j G_j1 + 1e-4).

    `"sum_then_normalize"` standardises R̂ itself, as 2509.22921 reads.

    Args:
        rewards (`torch.Tensor`):
            Task rewards of shape `(B,)`, whole groups of `num_generations` after one another. NaN where a rollout
            could not be scored: its reward part is 0 and it is left out of every z. The same holds for a rollout
            without tokens that count. Of shape `(B, F)`, one column per reward function, with `reward_weights`.
        costs (`torch.Tensor`):
            Per-token costs of shape `(B, T)`, in nats.
        mask (`torch.Tensor`):
            Mask of shape `(B, T)`, nonzero on the completion tokens that count.
        num_generations (`int`):
            Rollouts per prompt, G. A group of one has advantage 0.
        cost_limit (`float` or `torch.Tensor`):
            Limit d, in the unit of the scope; one for all rollouts, or of shape `(B,)`.
        penalty (`float`):
            Penalty n. In `"sum_then_normalize"` it must exceed the largest |R|.
        scope (`str`, *optional*, defaults to `"mean"`):
            `"mean"`, `"sum"` or `"worst_prefix"`, as in [`rollout_cost`].
        credit_assignment (`str`, *optional*, defaults to `"trajectory"`):
            `"trajectory"`: one advantage per rollout, from R̂(y). `"token"`: returns-to-go of R̂_t.
        constraint_aggregation (`str`, *optional*, defaults to `"lexicographic"`):
            `"lexicographic"` or `"sum_then_normalize"`.
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            `"group"`: divide by the group's standard deviation. `"batch"`: by the whole batch's. `"none"`: only
            centre; violators then stand n below the worst feasible rollout. All deviations are TRL's: Bessel's
            correction, NaN left out, + 1e-4.
        horizon (`int`, *optional*):
            `max_completion_length`. Needed by `credit_assignment="token"` alone.
        reward_weights (`torch.Tensor`, *optional*):
            Weights of the reward functions, of shape `(F,)`. z is then TRL's
            `multi_objective_aggregation="normalize_then_sum"`, whatever `scale_rewards` says: each function is
            standardised over the group's feasible rollouts, and the weighted sum brought to the batch's scale. Only
            for `"lexicographic"`, as R̂ needs one reward.

    Returns:
        `torch.Tensor`: Advantages of shape `(B,)` for `"trajectory"`, `(B, T)` for `"token"`.
    """
    _check_credit_assignment(credit_assignment)
    if constraint_aggregation not in ("lexicographic", "sum_then_normalize"):
        raise ValueError(
            "`constraint_aggregation` must be 'lexicographic' or 'sum_then_normalize', got "
            f"{constraint_aggregation!r}."
        )
    if scale_rewards not in ("group", "batch", "none"):
        raise ValueError(f"`scale_rewards` must be 'group', 'batch' or 'none', got {scale_rewards!r}.")
    if reward_weights is not None and constraint_aggregation == "sum_then_normalize":
        raise ValueError(
            "`constraint_aggregation='sum_then_normalize'` standardises one modified reward, which rewards that are "
            "standardised apart do not make. Leave out `reward_weights` and give the weighted sum as `rewards`, or use "
            "'lexicographic'."
        )
    if rewards.shape[0] % num_generations != 0:
        raise ValueError(f"{rewards.shape[0]} rollouts are not whole groups of {num_generations}.")
    if num_generations == 1:
        return torch.zeros_like(costs if credit_assignment == "token" else costs[:, 0])

    cost = rollout_cost(costs, mask, scope)  # (B,)
    feasible = cost <= cost_limit  # (B,)
    has_tokens = (mask != 0).any(-1)  # (B,)
    rewards = rewards.to(costs.dtype)

    if reward_weights is None:
        # NaN where there is nothing to judge: no reward, or no tokens.
        scored = torch.where(has_tokens, rewards, torch.nan)  # (B,)
        z = group_advantages(torch.where(feasible, scored, torch.nan), num_generations, scale_rewards)  # (B,)
    else:
        z = _normalize_then_sum(rewards, reward_weights, feasible & has_tokens, num_generations)  # (B,)
        scale_rewards = "group"  # z has a scale, also where `scale_rewards` asks for none

    if credit_assignment == "trajectory":
        if constraint_aggregation == "sum_then_normalize":
            whole = modified_reward(scored, costs, mask, cost_limit, penalty, scope)  # (B,)
            return group_advantages(whole, num_generations, scale_rewards)
        return _lexicographic(z, cost, feasible, penalty, num_generations, scale_rewards)

    if horizon is None:
        raise ValueError("`credit_assignment='token'` needs `horizon`, the `max_completion_length`.")
    if constraint_aggregation == "lexicographic":  # the reward enters through z, the steps hold the penalty alone
        unit = 1.0 if scale_rewards == "none" else penalty
        nothing = torch.zeros_like(cost)
        steps = token_modified_rewards(nothing, costs, mask, cost_limit, penalty, scope, horizon=horizon) / unit
        penalties = _standardize(returns_to_go(steps), steps.sum(-1), num_generations, scale_rewards)
        return z.unsqueeze(-1) + penalties
    steps = token_modified_rewards(
        scored.nan_to_num(nan=0.0), costs, mask, cost_limit, penalty, scope, horizon=horizon
    )  # (B, T + 1)
    left_out = feasible & scored.isnan()  # (B,)
    whole = torch.where(left_out, torch.nan, steps.sum(-1))
    advantages = _standardize(returns_to_go(steps), whole, num_generations, scale_rewards)
    return advantages.masked_fill(left_out.unsqueeze(-1), 0.0).nan_to_num(nan=0.0)


def minillm_advantages(
    student_logps: torch.Tensor,
    teacher_logps: torch.Tensor,
    mask: torch.Tensor,
    single_step_decomposition: bool = True,
    length_normalization: bool = True,
    teacher_mixed_alpha: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Advantages and single-step weights of MiniLLM (2306.08543, section 2.2), with r_t = log μ(a_t) − log π(a_t) at the
    sampled tokens and w_t = π(a_t)/(α·μ(a_t) + (1 − α)·π(a_t)):

        A_t = w_t · mean_{k>t} r_k   and   w_t on −KL(π‖μ) at t      (single-step decomposition, equation 7)
        A_t = w_t · mean_{k≥t} r_k                                   (without it)

    Without length normalisation the means are sums. The mean is over the tokens that are summed: the paper's
    1/(T − t − 1) is one less than the number of its terms. The paper's −1 on the return is a baseline, left out.

    Args:
        student_logps (`torch.Tensor`):
            Student's log-probabilities of the sampled tokens, of shape `(B, T)`, as they were when sampled.
        teacher_logps (`torch.Tensor`):
            Teacher's, of shape `(B, T)`.
        mask (`torch.Tensor`):
            Mask of shape `(B, T)`, nonzero on the completion tokens that count.
        single_step_decomposition (`bool`, *optional*, defaults to `True`):
            Whether the token's own log-ratio is left to the exact single-step divergence.
        length_normalization (`bool`, *optional*, defaults to `True`):
            Whether returns-to-go are divided by their number of terms.
        teacher_mixed_alpha (`float`, *optional*, defaults to `0.0`):
            α of the mixture that the tokens were sampled from. The weight is the paper's approximation, of the token's
            own factor alone.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Advantages and importance weights, each of shape `(B, T)`, detached, 0 on
        masked positions.
    """
    counted = mask != 0
    zeros = torch.zeros_like(student_logps)
    log_ratio = torch.where(counted, teacher_logps - student_logps, zeros).detach()  # (B, T), r_t
    to_go = log_ratio.flip(-1).cumsum(-1).flip(-1)
    terms = counted.to(log_ratio.dtype).flip(-1).cumsum(-1).flip(-1)
    if single_step_decomposition:
        to_go, terms = to_go - log_ratio, terms - counted.to(terms.dtype)
    if length_normalization:
        to_go = to_go / terms.clamp(min=1)
    importance = 1 / (teacher_mixed_alpha * log_ratio.exp() + (1 - teacher_mixed_alpha))
    importance = torch.where(counted, importance, zeros)
    return importance * to_go, importance


def _lexicographic(
    z: torch.Tensor,
    cost: torch.Tensor,
    feasible: torch.Tensor,
    penalty: float,
    num_generations: int,
    scale_rewards: ScaleRewards,
) -> torch.Tensor:
    # z is 0 on violators, so with one in the group this minimum is min(0, min_j z_j) over the feasible ones.
    floor = _per_group(z, num_generations).amin(1).repeat_interleave(num_generations)
    excess = cost.clamp(max=penalty)
    violator = floor - (penalty + excess if scale_rewards == "none" else 1 + excess / penalty)
    utility = torch.where(feasible, z, violator)  # (B,)
    centred = utility - _per_group(utility, num_generations).mean(1).repeat_interleave(num_generations)
    # z is centred already: subtracting its mean again would move GRPO's advantages by a rounding error.
    all_feasible = _per_group(feasible, num_generations).all(1).repeat_interleave(num_generations)
    return torch.where(all_feasible, z, centred)


def _normalize_then_sum(
    rewards: torch.Tensor, weights: torch.Tensor, counted: torch.Tensor, num_generations: int
) -> torch.Tensor:
    """
    TRL's `"normalize_then_sum"` of rewards (B, F) over the rollouts that are `counted` (B,), 0 for the others. Mean and
    deviation of the batch are those of all its rollouts, so that a group counted as a whole has TRL's advantages
    whatever the others are.
    """

    def weighted_sum(values: torch.Tensor) -> torch.Tensor:
        grouped = values.view(-1, num_generations, values.size(1))  # TRL's shape: another would round otherwise
        std = nanstd(grouped, dim=1).unsqueeze(1)
        normalized = (grouped - grouped.nanmean(1, keepdim=True)) / (std + _STD_EPSILON)
        total = (normalized.view_as(values) * weights.to(values)).nansum(1)
        return total.masked_fill(values.isnan().all(1), torch.nan)

    batch = weighted_sum(rewards)
    kept = weighted_sum(torch.where(counted.unsqueeze(1), rewards, torch.nan))
    return ((kept - batch.nanmean()) / (nanstd(batch) + _STD_EPSILON)).nan_to_num(nan=0.0)


def _standardize(
    values: torch.Tensor, returns: torch.Tensor, num_generations: int, scale_rewards: ScaleRewards
) -> torch.Tensor:
    """(values − mean)/(std + 1e-4) with mean and std of `returns` (B,) over groups or batch; values (B,) or (B, T)."""
    grouped = _per_group(returns, num_generations)  # (B/G, G)
    mean = grouped.nanmean(1).repeat_interleave(num_generations)
    if values.dim() == 2:
        mean = mean.unsqueeze(-1)
    if scale_rewards == "none":
        return values - mean
    if scale_rewards == "group":
        std = nanstd(grouped, dim=1).repeat_interleave(num_generations)
    else:
        std = nanstd(returns).expand_as(returns)
    return (values - mean) / (std.unsqueeze(-1) if values.dim() == 2 else std).add(_STD_EPSILON)


def nanstd(values: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Standard deviation with Bessel's correction, NaN left out, NaN for fewer than two values (TRL's `nanstd`)."""
    mean = torch.nanmean(values, dim=dim, keepdim=True)
    variance = torch.nanmean((values - mean) ** 2, dim=dim, keepdim=True)
    count = torch.sum(~torch.isnan(values), dim=dim, keepdim=True)
    correction = count / (count - 1)
    correction = torch.where(count > 1, correction, torch.full_like(correction, torch.nan))
    std = torch.sqrt(variance * correction)
    return std.squeeze() if dim is None else std.squeeze(dim)


def _per_group(values: torch.Tensor, num_generations: int) -> torch.Tensor:
    return values.view(-1, num_generations)
