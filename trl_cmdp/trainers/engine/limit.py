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


@dataclass(frozen=True)
class LimitPlan:
    """How the limit of a run comes about."""

    # Limit, one for each teacher, or `"auto"`: from the costs that imitation reaches
    target: float | str | dict[str, float]
    imitation_steps: int  # optimizer steps of the imitation phase of `"auto"`
    quantile: float  # quantile of the costs at its end
    margin: float  # factor on that quantile
    schedule: str  # `"constant"`, or `"linear"` or `"cosine"` from `start` to the target
    start: float | None  # limit that a schedule starts from
    schedule_steps: int | None  # optimizer steps of the schedule, those of the run if `None`

    def __post_init__(self):
        if not 0 < self.quantile <= 1:
            raise ValueError(f"`auto_limit_quantile` must lie in (0, 1], got {self.quantile}.")
        if self.schedule == "constant":
            if self.start is not None or self.schedule_steps is not None:
                raise ValueError(
                    "`cost_limit_start` and `cost_limit_schedule_steps` belong to a schedule: set "
                    "`cost_limit_schedule` to 'linear' or 'cosine'."
                )
        elif self.start is None:
            raise ValueError(f"`cost_limit_schedule={self.schedule!r}` needs `cost_limit_start`.")


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
        costs = rollout_cost(rollouts.costs, rollouts.mask, cost_scope)
        self._auto.record(step, costs[rollouts.mask.any(1)].tolist())

    def end_imitation(self, step: int) -> None:
        """Settle the limit if the imitation phase is over at this step."""
        if not self.known and step >= self._plan.imitation_steps:
            _logger.warning(f"`cost_limit='auto'` set the limit to {self._auto.settle():.4g} nats at step {step}.")

    def of(self, rollouts: Rollouts, step: int, max_steps: int, training: bool) -> float | torch.Tensor:
        """Limit of the rollouts, one number or (B,). Evaluation is against the limit that is meant, without schedule."""
        plan, first, target = self._plan, 0, self._plan.target
        if self._auto is not None:
            first, target = plan.imitation_steps, self._auto.limit
        targets = [target[name] for name in self._teachers] if isinstance(target, Mapping) else [target]
        if training and plan.schedule != "constant":
            progress = (step - first) / (plan.schedule_steps or max(1, max_steps - first))
            targets = [scheduled_limit(plan.start, target, progress, plan.schedule) for target in targets]
        if len(set(targets)) == 1:
            return targets[0]
        return torch.tensor(targets, device=rollouts.costs.device)[rollouts.teacher_index]

    def state(self) -> dict[str, Any]:
        """What a resumed run must find again."""
        return {} if self._auto is None else asdict(self._auto)

    def load_state(self, state: dict[str, Any]) -> None:
        """Take what was learnt from a checkpoint; what was chosen comes from the arguments."""
        if self._auto is not None:
            for name in ("limit", "costs", "last_step"):
                setattr(self._auto, name, state[name])
