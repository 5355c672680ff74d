"""The budget: what a rollout costs, what its prefixes cost, and where it leaves the limit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from .._defaults import CostScope as CostScope


CreditAssignment = Literal["trajectory", "token"]
LimitSchedule = Literal["constant", "linear", "cosine"]
# A student whose rollouts cost less does not differ from its teacher in practice: by Pinsker's inequality a divergence
# of 0.01 nats moves no event's probability by more than 0.07.
NEGLIGIBLE_COST = 0.01


def rollout_cost(costs: torch.Tensor, mask: torch.Tensor, scope: CostScope = "mean") -> torch.Tensor:
    """
    Cost C(x, y) of a rollout over its completion tokens, in the unit of the scope.

    Args:
        costs (`torch.Tensor`):
            Per-token costs c_t of shape `(B, T)`, in nats. Masked positions never contribute, whatever they hold.
        mask (`torch.Tensor`):
            Mask of shape `(B, T)`, nonzero on the completion tokens that count.
        scope (`str`, *optional*, defaults to `"mean"`):
            `"mean"`: (1/L) Σ_t c_t. `"sum"`: Σ_t c_t (2509.22921 as printed). `"worst_prefix"`: max_t (1/t) Σ_{k≤t} c_k
            (2610.00332).

    Returns:
        `torch.Tensor`: Costs of shape `(B,)`; 0 for a rollout without tokens that count.
    """
    _check_scope(scope)
    kept = _masked(costs, mask)
    counts = (mask != 0).sum(-1)  # (B,)
    if scope == "sum":
        return kept.sum(-1)
    if scope == "mean":
        return kept.sum(-1) / counts.clamp(min=1)
    running = _running_mean(kept, mask).amax(-1)
    return torch.where(counts > 0, running, torch.zeros_like(running))


def prefix_cost(costs: torch.Tensor, mask: torch.Tensor, scope: CostScope = "mean") -> torch.Tensor:
    """
    Cost P_t of the tokens before each position, in the unit of the scope.

    Args:
        costs (`torch.Tensor`):
            Per-token costs of shape `(B, T)`, in nats.
        mask (`torch.Tensor`):
            Mask of shape `(B, T)`, nonzero on the completion tokens that count.
        scope (`str`, *optional*, defaults to `"mean"`):
            As in [`rollout_cost`].

    Returns:
        `torch.Tensor`: Costs of shape `(B, T)`; position t holds the cost of the counted tokens *before* t, and 0
        where there are none.
    """
    _check_scope(scope)
    kept = _masked(costs, mask)
    if scope == "sum":
        through = kept.cumsum(-1)
    elif scope == "mean":
        through = kept.cumsum(-1) / (mask != 0).cumsum(-1).clamp(min=1)
    else:
        through = _running_mean(kept, mask).cummax(-1).values
        through = torch.where((mask != 0).cumsum(-1) > 0, through, torch.zeros_like(through))
    return torch.cat([torch.zeros_like(through[:, :1]), through[:, :-1]], dim=-1)


def infeasible_steps(
    costs: torch.Tensor, mask: torch.Tensor, cost_limit: float | torch.Tensor, scope: CostScope = "mean"
) -> torch.Tensor:
    """
    Steps whose own reward is the penalty: P_t > d before the last token, C(y) > d at the last one.

    Args:
        costs (`torch.Tensor`):
            Per-token costs of shape `(B, T)`, in nats.
        mask (`torch.Tensor`):
            Mask of shape `(B, T)`, nonzero on the completion tokens that count.
        cost_limit (`float` or `torch.Tensor`):
            Limit d, in the unit of the scope; one for all rollouts, or of shape `(B,)`.
        scope (`str`, *optional*, defaults to `"mean"`):
            As in [`rollout_cost`].

    Returns:
        `torch.Tensor`: Booleans of shape `(B, T)`, `False` on masked positions.
    """
    violated = (rollout_cost(costs, mask, scope) > cost_limit).unsqueeze(-1)  # (B, 1)
    step_limit = cost_limit.unsqueeze(-1) if isinstance(cost_limit, torch.Tensor) else cost_limit
    step_violated = torch.where(last_token(mask), violated, prefix_cost(costs, mask, scope) > step_limit)
    return step_violated & (mask != 0)


def scheduled_limit(start: float, end: float, progress: float, schedule: LimitSchedule) -> float:
    """
    Limit on its way from a start value to the one that is meant, in the manner of Simmer (2206.02675).

    Args:
        start (`float`):
            Limit at progress 0.
        end (`float`):
            Limit from progress 1 on.
        progress (`float`):
            Steps done over steps of the schedule; what lies outside [0, 1] is held at its ends.
        schedule (`str`):
            `"constant"`: `end` throughout. `"linear"`, or `"cosine"`: slow at both ends.

    Returns:
        `float`: Limit, in the unit of both ends.
    """
    if schedule not in ("constant", "linear", "cosine"):
        raise ValueError(f"`schedule` must be 'constant', 'linear' or 'cosine', got {schedule!r}.")
    if schedule == "constant":
        return end
    progress = min(max(progress, 0.0), 1.0)
    share = progress if schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return start + share * (end - start)


@dataclass
class AutoLimit:
    """
    Limit taken from what imitation alone reaches: a quantile of the costs of the rollouts in the last quarter of an
    imitation phase, times a margin. An estimate, as good as those rollouts are many.

    Args:
        steps (`int`):
            Optimizer steps of the phase.
        quantile (`float`):
            Quantile in (0, 1], linearly interpolated.
        margin (`float`):
            Factor on it, above 0.
        limit (`float`, *optional*):
            Limit, in the unit of the costs; `None` until it is settled.
        costs (`list[float]`, *optional*):
            Costs of the rollouts that it will be taken from.
        last_step (`int`, *optional*):
            Step of the latest ones.
    """

    steps: int
    quantile: float
    margin: float
    limit: float | None = None
    costs: list[float] = field(default_factory=list)
    last_step: int = 0

    def record(self, step: int, costs: list[float]) -> None:
        """Keep the costs of the rollouts of one step. Before the last quarter only the latest are kept."""
        self.costs = self.costs + costs if 4 * self.last_step >= 3 * self.steps else costs
        self.last_step = step

    def settle(self) -> float:
        """
        Set the limit from the costs recorded, and return it.

        Raises:
            ValueError: If there are no costs, or the limit would not be positive.
        """
        if not self.costs:
            raise ValueError("There are no rollout costs to take a limit from.")
        limit = self.margin * torch.tensor(self.costs, dtype=torch.float64).quantile(self.quantile).item()
        if not limit > 0:
            raise ValueError(
                f"The limit taken from {len(self.costs)} rollouts is {limit:g}: the student does not differ from its "
                "teacher there. Set `cost_limit` to a number."
            )
        self.limit, self.costs = limit, []
        return limit


def cost_quantiles(costs: torch.Tensor, levels: Sequence[float]) -> list[float]:
    """
    Quantiles of the costs of rollouts, linearly interpolated.

    Args:
        costs (`torch.Tensor`):
            Costs of shape `(N,)`, of at least one rollout.
        levels (`Sequence[float]`):
            Levels in [0, 1].

    Returns:
        `list[float]`: The quantile of each level, in the unit of the costs.

    Raises:
        ValueError: If there are no costs.
    """
    if costs.dim() != 1 or costs.numel() == 0:
        raise ValueError(f"`costs` must be a non-empty vector, got shape {tuple(costs.shape)}.")
    values: list[float] = costs.double().quantile(torch.tensor(levels, dtype=torch.float64)).tolist()
    return values


def candidate_limits(low: float, high: float, count: int = 7) -> list[float]:
    """
    Limits to look at between two costs: evenly spaced on a logarithmic scale, of two significant digits.

    Args:
        low, high (`float`):
            The costs, `high` above 0. A `low` below a thousandth of it is raised to that.
        count (`int`, *optional*, defaults to `7`):
            Number of limits, at least 2; fewer where rounding makes them equal.

    Returns:
        `list[float]`: Limits in ascending order.

    Raises:
        ValueError: If `high` is not above 0, or below `low`.
    """
    if not high > 0 or low > high:
        raise ValueError(f"`low` and `high` must be ascending and `high` above 0, got {low} and {high}.")
    low = max(low, high / 1000)
    return sorted({float(f"{low * (high / low) ** (place / (count - 1)):.2g}") for place in range(count)})


@dataclass(frozen=True)
class LimitRange:
    """
    Between what limits a useful one lies, an estimate: above what imitation alone reaches, below where the student
    starts.

    Args:
        verdict (`str`):
            `"range"`: both ends are known and in order. `"start_only"`: imitation was not measured, so the lower end is
            unknown. `"not_below"`: imitation does not go below where the student starts, so nothing lies between.
            `"inert"`: the student's costs are negligible, so any limit would bound nothing.
        reached (`float`, *optional*):
            What imitation reaches: the upper quantile of the costs after it; `None` where it was not measured.
        start (`float`):
            Where the student starts: the median of its costs.
    """

    verdict: Literal["range", "start_only", "not_below", "inert"]
    reached: float | None
    start: float


def suggested_limit_range(
    start: torch.Tensor, imitation: torch.Tensor | None = None, quantile: float = 0.95
) -> LimitRange:
    """
    Take the range of useful limits from rollouts of the student before, and after imitation alone.

    Args:
        start (`torch.Tensor`):
            Costs of the student's rollouts, of shape `(N,)`.
        imitation (`torch.Tensor`, *optional*):
            Costs of its rollouts after imitation, of shape `(M,)`, in the same scope.
        quantile (`float`, *optional*, defaults to `0.95`):
            Upper quantile: the share of rollouts that satisfies a limit which imitation reaches. The student is called
            inert where this quantile of its costs is below `NEGLIGIBLE_COST`.

    Returns:
        [`LimitRange`]: The range, in the unit of the costs.

    Raises:
        ValueError: If there are no costs.
    """
    median, upper = cost_quantiles(start, (0.5, quantile))
    reached = None if imitation is None else cost_quantiles(imitation, (quantile,))[0]
    if upper < NEGLIGIBLE_COST:
        return LimitRange("inert", reached, median)
    if reached is None:
        return LimitRange("start_only", None, median)
    return LimitRange("range" if reached < median else "not_below", reached, median)


def last_token(mask: torch.Tensor) -> torch.Tensor:
    """Booleans of shape `(B, T)`, `True` on the last token that counts of each rollout that has one."""
    counted = mask != 0
    return counted & (counted.cumsum(-1) == counted.sum(-1, keepdim=True))


def _masked(costs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    # `where`, not a product: NaN and inf at masked positions must not survive.
    return torch.where(mask != 0, costs, torch.zeros_like(costs))


def _running_mean(kept: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean cost of the tokens up to and including each position, −inf where a position holds no token."""
    running = kept.cumsum(-1) / (mask != 0).cumsum(-1).clamp(min=1)
    return running.masked_fill(mask == 0, -torch.inf)


def _check_scope(scope: str) -> None:
    if scope not in ("mean", "sum", "worst_prefix"):
        raise ValueError(f"`cost_scope` must be 'mean', 'sum' or 'worst_prefix', got {scope!r}.")


def _check_credit_assignment(credit_assignment: str) -> None:
    if credit_assignment not in ("trajectory", "token"):
        raise ValueError(f"`credit_assignment` must be 'trajectory' or 'token', got {credit_assignment!r}.")
