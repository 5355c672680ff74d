"""The metrics of a logging window as one object: rates as numerators and denominators, maxima, and verdicts."""

from collections.abc import Sequence
from typing import Any

import torch

from ...core import infeasible_steps, rollout_cost
from ...core.signal import Rollouts
from .satisfaction import SatisfactionCounts
from .selection import FEASIBLE_REWARD, Verdicts


class DistillMetrics:
    """
    What has been counted since the last log, in training (`mode="train"`) and in evaluation (`"eval"`) each. TRL
    averages logged values unweighted, which is wrong for rates.
    """

    def __init__(self, teachers: Sequence[str], tolerated_violation_rate: float | None):
        self._teachers, self._tolerated_violation_rate = teachers, tolerated_violation_rate
        self._sums: dict[str, dict[str, list[float]]] = {"train": {}, "eval": {}}
        self._maxima: dict[str, dict[str, float]] = {"train": {}, "eval": {}}
        self._verdicts = Verdicts()  # of the evaluation under way
        self.satisfaction = SatisfactionCounts()

    def count(self, mode: str, name: str, numerator: torch.Tensor | float, denominator: torch.Tensor | float) -> None:
        """The metric is numerator/denominator, both summed over the window. Give global sums."""
        sums = self._sums[mode].setdefault(name, [0.0, 0.0])
        sums[0] += float(numerator)
        sums[1] += float(denominator)

    def maximum(self, mode: str, name: str, value: torch.Tensor) -> None:
        """The metric is the largest value of the window. Give the global one."""
        maxima = self._maxima[mode]
        maxima[name] = max(maxima.get(name, -torch.inf), float(value))

    def constraint(
        self, mode: str, rollouts: Rollouts, cost_limit: float | torch.Tensor | None, cost_scope: str
    ) -> dict[str, list]:
        """Count the metrics of a limit (of the cost alone where none is set yet); its columns of the table."""
        costs, mask = rollouts.costs, rollouts.mask
        cost = rollout_cost(costs, mask, cost_scope)  # (B,)
        has_tokens = mask.any(1)
        self.count(mode, "constraint/cost", cost.sum(), has_tokens.sum())
        self.maximum(mode, "constraint/cost_max", cost.max())
        if cost_limit is None:
            return {"cost": cost.tolist(), "feasible": [None] * len(cost)}
        feasible = cost <= cost_limit
        judged = has_tokens & ~rollouts.rewards.isnan()
        self.count(mode, "constraint/limit", torch.as_tensor(cost_limit, dtype=torch.float64).mean(), 1)
        self.count(mode, "constraint/satisfaction_rate", (feasible & judged).sum(), judged.sum())
        self.satisfaction.add(mode, feasible, judged, rollouts.num_generations)
        if mode == "eval":
            self._verdicts.add(rollouts.rewards, feasible, judged)
        if len(self._teachers) > 1:
            for index, name in enumerate(self._teachers):
                own = judged & (rollouts.teacher_index == index)
                self.count(mode, f"constraint/satisfaction_rate/{name}", (feasible & own).sum(), own.sum())
        infeasible = infeasible_steps(costs, mask, cost_limit, cost_scope)
        self.count(mode, "constraint/violated_token_frac", infeasible.sum(), mask.sum())
        self.count(mode, "constraint/unjudged_frac", (~judged).sum(), len(judged))
        verdicts = [
            verdict if counts else None for verdict, counts in zip(feasible.tolist(), judged.tolist(), strict=True)
        ]
        return {"cost": cost.tolist(), "feasible": verdicts}

    def divergence(self, mode: str, rollouts: Rollouts) -> None:
        """Count what is known of the divergence from the teachers."""
        if rollouts.costs is not None:
            self.count(mode, "teacher/divergence", rollouts.costs.sum(), rollouts.mask.sum())
        if rollouts.divergence_lower_bound is not None:
            bound = rollouts.divergence_lower_bound.sum()
            self.count(mode, "teacher/divergence_lower_bound", bound, rollouts.mask.sum())

    def close(self, mode: str, step: int) -> dict[str, float]:
        """Value of each metric at an optimizer step. The next window begins."""
        values = {
            name: numerator / denominator if denominator else float("nan")
            for name, (numerator, denominator) in self._sums[mode].items()
        }
        values |= self._maxima[mode]
        self._sums[mode], self._maxima[mode] = {}, {}
        self.satisfaction.close(mode, step)
        # The log of an evaluation, not one after it.
        if self._tolerated_violation_rate is not None and mode == "eval" and values:
            values[FEASIBLE_REWARD] = self._verdicts.feasible_reward(self._tolerated_violation_rate)
            self._verdicts = Verdicts()
        return values

    def state(self) -> dict[str, Any]:
        """What a resumed run must find again of the training window."""
        return {"sums": self._sums["train"], "maxima": self._maxima["train"]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue the window of [`~DistillMetrics.state`]."""
        self._sums["train"].update(state["sums"])
        self._maxima["train"].update(state["maxima"])
