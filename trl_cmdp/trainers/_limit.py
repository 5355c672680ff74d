"""The limit of the constrained method as training goes: a number, one for each teacher, scheduled, or found out."""

import logging
from dataclasses import asdict
from typing import Any

import torch

from ..core import AutoLimit, rollout_cost, scheduled_limit
from ._signal import Rollouts
from .constrained_config import ConstrainedDistillConfig


_logger = logging.getLogger(__name__)


class CostLimit:
    """
    Limit d of the rollouts at hand.

    Args:
        args ([`ConstrainedDistillConfig`]):
            What was asked for.
        teachers (`list[str]`):
            Names of the teachers.

    Raises:
        ValueError: If `args.cost_limit` is a `dict` of other names.
    """

    def __init__(self, args: ConstrainedDistillConfig, teachers: list[str]):
        self._args = args
        self._auto = AutoLimit(args.auto_limit_steps, args.auto_limit_quantile, args.auto_limit_margin)
        self._is_auto = args.cost_limit == "auto"
        self._targets = [args.cost_limit] * len(teachers)
        if isinstance(args.cost_limit, dict):
            if set(args.cost_limit) != set(teachers):
                raise ValueError(
                    f"`cost_limit` gives limits for {sorted(args.cost_limit)}, and the teachers are {sorted(teachers)}: "
                    "name each of them once."
                )
            self._targets = [args.cost_limit[name] for name in teachers]

    def of(self, rollouts: Rollouts, step: int, max_steps: int, training: bool) -> float | torch.Tensor | None:
        """
        Limit of the rollouts, one number or of shape `(B,)`; `None` while imitation finds it out.

        Args:
            rollouts ([`Rollouts`]):
                Rollouts.
            step (`int`):
                Optimizer steps done.
            max_steps (`int`):
                Optimizer steps of the run.
            training (`bool`):
                Whether a schedule applies. Evaluation is against the limit that is meant.
        """
        args = self._args
        first = args.auto_limit_steps if self._is_auto else 0
        targets = self._targets
        if self._is_auto:
            if training and self._auto.limit is None and step >= first:
                _logger.warning(f"`cost_limit='auto'` set the limit to {self._auto.settle():.4g} nats at step {step}.")
            if self._auto.limit is None:
                return None
            targets = [self._auto.limit] * len(targets)
        if training and args.cost_limit_schedule != "constant":
            progress = (step - first) / (args.cost_limit_schedule_steps or max(1, max_steps - first))
            start, schedule = args.cost_limit_start, args.cost_limit_schedule
            targets = [scheduled_limit(start, target, progress, schedule) for target in targets]
        if len(set(targets)) == 1:
            return targets[0]
        return torch.tensor(targets, device=rollouts.costs.device)[rollouts.teacher_index]

    def imitate(self, rollouts: Rollouts, step: int, max_steps: int) -> None:
        """
        Keep what the rollouts of the imitation phase cost.

        Raises:
            ValueError: If the phase would be the whole run.
        """
        if max_steps <= self._args.auto_limit_steps:
            raise ValueError(
                f"The imitation phase of `cost_limit='auto'` ({self._args.auto_limit_steps} steps) would be the whole "
                f"run of {max_steps} steps. Train longer or lower `auto_limit_steps`."
            )
        costs = rollout_cost(rollouts.costs, rollouts.mask, self._args.cost_scope)
        self._auto.record(step, costs[rollouts.mask.any(1)].tolist())

    def state(self) -> dict[str, Any]:
        """What a resumed run must find again."""
        return asdict(self._auto) if self._is_auto else {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take what was learnt from a checkpoint; what was chosen comes from the arguments."""
        for name in ("limit", "costs", "last_step"):
            setattr(self._auto, name, state[name])
