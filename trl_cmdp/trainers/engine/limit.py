"""The limit of the constrained method: parsed once from what `cost_limit` may be, and as training goes."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..._defaults import AUTO, check_auto_limit
from ...core import AutoLimit, rollout_cost, scheduled_limit
from ...core.signal import Rollouts
from .guards import RefusedRun


_logger = logging.getLogger(__name__)

# Where a schedule starts if nobody says so: at the limit that nine in ten of the untrained student's rollouts keep.
_START_QUANTILE = 0.9


@dataclass(frozen=True)
class LimitPlan:
    """How the limit of a run comes about."""

    # Limit, one for each teacher, or `"auto"`: from the costs that imitation reaches
    target: float | str | dict[str, float]
    imitation_steps: int  # optimizer steps of the imitation phase of `"auto"`
    quantile: float  # quantile of the costs at its end
    margin: float  # factor on that quantile
    schedule: str  # `"constant"`, or `"linear"` or `"cosine"` from `start` to the target
    start: float | None  # limit that a schedule starts from; `None`: from the costs of the first rollouts
    schedule_steps: float | None  # optimizer steps of the schedule, below 1 a share of the run; `None`: all of it

    def __post_init__(self):
        if not 0 < self.quantile <= 1:
            raise ValueError(f"`auto_limit_quantile` must lie in (0, 1], got {self.quantile}.")
        if self.schedule == "constant":
            if self.start is not None:
                raise ValueError(
                    "`cost_limit_start` belongs to a schedule: set `cost_limit_schedule` to 'linear' or 'cosine'."
                )
        elif self.schedule_steps is not None and self.schedule_steps > 1 and self.schedule_steps % 1:
            raise ValueError(
                "`cost_limit_schedule_steps` must be a whole number of steps, or a share of the run below 1, got "
                f"{self.schedule_steps}."
            )


class CostLimit:
    """Limit d of the rollouts at hand."""

    def __init__(self, plan: LimitPlan, teachers: Sequence[str]):
        self._plan = plan
        self._auto = None
        if plan.target == AUTO:
            self._auto = AutoLimit(plan.imitation_steps, plan.quantile, plan.margin)
        if isinstance(plan.target, Mapping) and set(plan.target) != set(teachers):
            raise ValueError(
                f"`cost_limit` gives limits for {sorted(plan.target)}, and the teachers are {sorted(teachers)}: "
                "name each of them once."
            )
        self._teachers = teachers
        self._start = plan.start  # limit that the schedule starts from; `None` until the first rollouts

    @property
    def known(self) -> bool:
        """Whether there is a limit: the imitation phase of `"auto"` has none."""
        return self._auto is None or self._auto.limit is not None

    def imitate(self, rollouts: Rollouts, cost_scope: str, step: int, max_steps: int) -> None:
        """Keep what the rollouts of the imitation phase cost."""
        try:
            check_auto_limit(max_steps, self._plan.imitation_steps)
        except ValueError as error:  # of a run whose steps come from its epochs
            raise RefusedRun(str(error)) from None
        self._auto.record(step, _costs_of(rollouts, cost_scope).tolist())

    def end_imitation(self, step: int) -> None:
        """Settle the limit if the imitation phase is over at this step."""
        if not self.known and step >= self._plan.imitation_steps:
            _logger.warning(f"`cost_limit='auto'` set the limit to {self._auto.settle():.4g} nats at step {step}.")

    def target_of(self, rollouts: Rollouts) -> float | torch.Tensor:
        """Limit that is meant, one number for all rollouts or (B,)."""
        return self._each(self._targets, rollouts)

    def scheduled(self, rollouts: Rollouts, cost_scope: str, step: int, max_steps: int) -> float | torch.Tensor:
        """Limit of the schedule at a step, one number for all rollouts or (B,)."""
        plan, targets = self._plan, self._targets
        if self._start is None:
            costs = _costs_of(rollouts, cost_scope)
            if len(costs) == 0:  # nothing to start from yet
                return self._each(targets, rollouts)
            self._start = costs.quantile(_START_QUANTILE).item()
        first = 0 if self._auto is None else plan.imitation_steps
        steps = max_steps - first
        if plan.schedule_steps is not None:
            steps = plan.schedule_steps * (steps if plan.schedule_steps < 1 else 1)
        progress = (step - first) / max(1, steps)
        # A start that was measured may lie below the limit: of a student that is within it already.
        starts = [self._start if plan.start is not None else max(self._start, target) for target in targets]
        limits = [
            scheduled_limit(start, target, progress, plan.schedule)
            for start, target in zip(starts, targets, strict=True)
        ]
        return self._each(limits, rollouts)

    @property
    def _targets(self) -> list[float]:
        target = self._plan.target if self._auto is None else self._auto.limit
        return [target[name] for name in self._teachers] if isinstance(target, Mapping) else [target]

    def _each(self, limits: list[float], rollouts: Rollouts) -> float | torch.Tensor:
        if len(set(limits)) == 1:
            return limits[0]
        return torch.tensor(limits, device=rollouts.costs.device)[rollouts.teacher_index]

    def state(self) -> dict[str, Any]:
        """What a resumed run must find again."""
        measured = self._plan.schedule != "constant" and self._plan.start is None
        start = {"schedule_start": self._start} if measured else {}
        return start if self._auto is None else start | asdict(self._auto)

    def load_state(self, state: dict[str, Any]) -> None:
        """Take what was learnt from a checkpoint; what was chosen comes from the arguments."""
        if self._plan.start is None:
            self._start = state.get("schedule_start")
        if self._auto is not None:
            for name in ("limit", "costs", "last_step"):
                setattr(self._auto, name, state[name])


def _costs_of(rollouts: Rollouts, cost_scope: str) -> torch.Tensor:
    """Costs of the rollouts that have tokens, of shape at most (B,)."""
    return rollout_cost(rollouts.costs, rollouts.mask, cost_scope)[rollouts.mask.any(1)]
