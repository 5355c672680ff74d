"""What a user needs to choose a limit, from the records of the student before and after imitation alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch

from .._defaults import CostScope
from ..core import LimitRange, candidate_limits, cost_quantiles, suggested_limit_range
from .rollout_records import PROBLEM_SETTINGS, EvaluationSettings, RolloutRecord, difference_of_settings
from .summary import Evaluation, Figure, check_cost_scope, rate_of_clusters, rollout_costs, rollouts_by_problem


LEVELS = (0.05, 0.25, 0.5, 0.75, 0.9, 0.95)
# What has to be equal for costs to be compared.
_SHARED = (
    *PROBLEM_SETTINGS,
    *(
        "num_samples",
        "temperature",
        "max_new_tokens",
        "chat_template",
        "chat_template_kwargs",
        "teacher",
        "teacher_beta",
        "teacher_eos_token",
    ),
)


@dataclass(frozen=True)
class CostDistribution:
    """Costs of the sampled rollouts of one student."""

    settings: EvaluationSettings  # settings of its evaluation
    num_rollouts: int  # number of rollouts
    # For each scope the quantiles of their costs: `"0.05"`, `"0.25"`, `"0.5"`, `"0.75"`, `"0.9"`, `"0.95"`
    quantiles: dict[str, dict[str, float]]
    satisfaction: list[Figure]  # share of rollouts within each of the calibration's limits


@dataclass(frozen=True)
class Calibration:
    """The figures that a limit is chosen from."""

    cost_scope: CostScope  # scope of the limits and of the suggestion
    limits: list[float]  # limits that satisfaction is given for, in the unit of the scope
    start: CostDistribution  # the student
    imitation: CostDistribution | None  # the student after imitation alone, `None` where that was not measured
    suggestion: LimitRange  # estimate of the useful limits


def calibrate_limit(
    start: Evaluation,
    imitation: Evaluation | None = None,
    *,
    cost_scope: CostScope | None = None,
    limits: Sequence[float] | None = None,
) -> Calibration:
    """
    Compute the figures that a limit is chosen from.

    Args:
        start (`tuple[EvaluationSettings, Sequence[RolloutRecord]]`):
            Settings and records of the student, with costs. Greedy rollouts are left out: the limit is on samples.
        imitation (`tuple[EvaluationSettings, Sequence[RolloutRecord]]`, *optional*):
            The same of the student after imitation alone, on the same problems.
        cost_scope (`str`, *optional*):
            Scope of the limits and of the suggestion. That of the student's settings if `None`.
        limits (`Sequence[float]`, *optional*):
            Limits to give satisfaction for. If `None`, [`~core.candidate_limits`] from the median after imitation (without it, the
            student's 5% quantile) to the student's 95% quantile.

    Returns:
        [`Calibration`]: The figures.

    Raises:
        ValueError: If there are no sampled rollouts, no costs, or the two are not of the same problems and teacher.
    """
    scope = check_cost_scope(start[0].cost_scope if cost_scope is None else cost_scope)
    if imitation is not None:
        found = difference_of_settings(_with_plain_teacher(start[0]), _with_plain_teacher(imitation[0]), _SHARED)
        if found is not None:
            raise ValueError(
                f"{start[0].name!r} and {imitation[0].name!r} cannot be compared: their `{found[0]}` are "
                f"{found[1]!r} and {found[2]!r}."
            )
    evaluations = [start] if imitation is None else [start, imitation]
    costs = [sampled_costs(*evaluation) for evaluation in evaluations]
    flat = [_flat(of[scope]) for of in costs]
    if limits is None:
        low = cost_quantiles(flat[-1], (0.05 if imitation is None else 0.5,))[0]
        high = cost_quantiles(flat[0], (0.95,))[0]
        limits = candidate_limits(min(low, high), high) if high > 0 else []
    limits = sorted(limits)
    distributions = [
        CostDistribution(
            settings=settings,
            num_rollouts=sum(map(len, of[scope])),
            quantiles={
                name: dict(zip(map(str, LEVELS), cost_quantiles(_flat(clusters), LEVELS), strict=True))
                for name, clusters in of.items()
            },
            satisfaction=[
                rate_of_clusters([[cost <= limit for cost in of_problem] for of_problem in of[scope]])
                for limit in limits
            ],
        )
        for (settings, _), of in zip(evaluations, costs, strict=True)
    ]
    return Calibration(
        cost_scope=scope,
        limits=limits,
        start=distributions[0],
        imitation=None if imitation is None else distributions[1],
        suggestion=suggested_limit_range(flat[0], None if imitation is None else flat[1]),
    )


def sampled_costs(
    settings: EvaluationSettings, records: Sequence[RolloutRecord]
) -> dict[CostScope, list[list[float]]]:
    """Costs of sampled rollouts: for each scope the costs of each problem's rollouts."""
    if settings.teacher is None:
        raise ValueError(f"The rollouts of {settings.name!r} have no costs: they were measured without a teacher.")
    clusters = list(rollouts_by_problem(records, greedy=False).values())
    if not clusters:
        raise ValueError(f"There are no sampled rollouts of {settings.name!r} to choose a limit from.")
    return {scope: rollout_costs(clusters, scope) for scope in get_args(CostScope)}


def _with_plain_teacher(settings: EvaluationSettings) -> EvaluationSettings:
    # A student's own base is named after the student, which has another name after imitation.
    if settings.teacher is None:
        return settings
    return replace(settings, teacher=settings.teacher.removeprefix(f"{settings.student}, "))


def _flat(clusters: Sequence[Sequence[float]]) -> torch.Tensor:
    return torch.tensor([cost for costs in clusters for cost in costs], dtype=torch.float64)
