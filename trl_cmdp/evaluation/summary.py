"""The figures of an evaluation, each with its interval, from its records alone."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean as mean
from typing import Any, get_args

import torch

from .._defaults import CostScope
from ..core import bootstrap_interval, clopper_pearson_interval, rollout_cost
from .rates import Rate, ValueWithInterval
from .rollout_records import PROBLEM_SETTINGS, EvaluationSettings, RolloutRecord, difference_of_settings


Evaluation = tuple[EvaluationSettings, Sequence[RolloutRecord]]


@dataclass(frozen=True)
class Figure(ValueWithInterval):
    """
    A figure with its 95% interval, for rollouts that are independent between problems only.

    Args:
        value, low, high (`float`):
            The figure and the bounds of its interval.
        num_rollouts (`int`):
            Number of rollouts.
        num_problems (`int`):
            Number of problems that they belong to.
    """

    num_rollouts: int
    num_problems: int


@dataclass(frozen=True)
class CostSummary:
    """
    Costs of rollouts against a limit.

    Args:
        satisfaction (`Figure`):
            Share of rollouts whose cost is within the limit.
        violation_bound (`float`):
            Exact 95% upper bound on the probability that a rollout exceeds the limit, from the first rollout of each
            problem, which are independent (Clopper-Pearson, one-sided).
        mean (`Figure`):
            Mean cost of a rollout, in the unit of the scope.
        quantiles (`dict[str, float]`):
            Quantiles of the costs of all rollouts: `"0.5"`, `"0.9"`, `"0.95"` and `"0.99"`.
        max (`float`):
            Largest cost.
        divergence (`Figure`):
            Mean divergence of a token, every token with the same weight, in nats.
    """

    satisfaction: Figure
    violation_bound: float
    mean: Figure
    quantiles: dict[str, float]
    max: float
    divergence: Figure


@dataclass(frozen=True)
class RolloutSummary:
    """
    Figures of rollouts of one kind, sampled or greedy.

    Args:
        right (`Figure`):
            Share of correct final answers; of sampled rollouts this is pass@1.
        costs (`CostSummary`, *optional*):
            Costs, `None` without a teacher.
        length (`Figure`):
            Mean completion length, in tokens.
        truncated (`Figure`):
            Share of completions cut at the maximum length.
        strata (`dict[str, RolloutSummary]`):
            The same figures for the problems of each difficulty, easiest first. Empty where the data has none.
    """

    right: Figure
    costs: CostSummary | None
    length: Figure
    truncated: Figure
    strata: "dict[str, RolloutSummary]"


@dataclass(frozen=True)
class EvaluationSummary:
    """
    Figures of one evaluation.

    Args:
        settings ([`EvaluationSettings`]):
            Its settings.
        cost_limit (`float`):
            Limit that the figures are of, in the unit of the scope.
        cost_scope (`str`):
            Scope that the figures are of.
        num_missing (`int`):
            Rollouts that the settings ask for and the records do not hold.
        sampled ([`RolloutSummary`], *optional*):
            Sampled rollouts, `None` if there are none.
        greedy ([`RolloutSummary`], *optional*):
            Greedy rollouts, `None` if there are none.
    """

    settings: EvaluationSettings
    cost_limit: float
    cost_scope: CostScope
    num_missing: int
    sampled: RolloutSummary | None
    greedy: RolloutSummary | None


@dataclass(frozen=True)
class EvaluationDifference:
    """
    Differences between two students on the same problems, in rollouts of one kind. They are paired by problem: means
    over a problem's rollouts are subtracted, and problems are resampled.

    Args:
        name (`str`):
            Name of the student.
        reference (`str`):
            Name of the other student, which is subtracted.
        greedy (`bool`):
            Whether the rollouts are greedy.
        right (`Figure`):
            Difference in the share of correct final answers.
        satisfaction, cost (`Figure`, *optional*):
            Differences in satisfaction and in the mean cost of a rollout, `None` if either has no teacher.
        length (`Figure`):
            Difference in the mean completion length, in tokens.
    """

    name: str
    reference: str
    greedy: bool
    right: Figure
    satisfaction: Figure | None
    cost: Figure | None
    length: Figure


def summarize(
    settings: EvaluationSettings,
    records: Sequence[RolloutRecord],
    *,
    cost_limit: float | None = None,
    cost_scope: CostScope | None = None,
) -> EvaluationSummary:
    """
    Compute the figures of an evaluation.

    Args:
        settings ([`EvaluationSettings`]):
            Its settings.
        records (`Sequence[RolloutRecord]`):
            Its records, in any order.
        cost_limit (`float`, *optional*):
            Limit, in the unit of the scope. That of the settings if `None`.
        cost_scope (`str`, *optional*):
            Cost of a rollout, `"mean"`, `"sum"` or `"worst_prefix"`. That of the settings if `None`.

    Returns:
        [`EvaluationSummary`]: The figures.

    Raises:
        ValueError: If there is no record.
    """
    if not records:
        raise ValueError(f"There are no rollouts of {settings.name!r} to summarise.")
    limit, scope = _limit(settings, cost_limit, cost_scope)
    expected = settings.num_problems * (settings.num_samples + settings.greedy)
    sampled, greedy = (rollouts_by_problem(records, greedy) for greedy in (False, True))
    return EvaluationSummary(
        settings=settings,
        cost_limit=limit,
        cost_scope=scope,
        num_missing=expected - len(records),
        sampled=_summary(sampled, limit, scope) if sampled else None,
        greedy=_summary(greedy, limit, scope) if greedy else None,
    )


def compare_evaluations(
    evaluation: Evaluation,
    reference: Evaluation,
    *,
    greedy: bool = False,
    cost_limit: float | None = None,
    cost_scope: CostScope | None = None,
) -> EvaluationDifference:
    """
    Compare two students on the problems that both have rollouts of.

    Args:
        evaluation (`tuple[EvaluationSettings, Sequence[RolloutRecord]]`):
            Settings and records of the student.
        reference (`tuple[EvaluationSettings, Sequence[RolloutRecord]]`):
            Settings and records of the other student.
        greedy (`bool`, *optional*, defaults to `False`):
            Compare greedy rollouts instead of sampled ones.
        cost_limit (`float`, *optional*):
            Limit for both. That of the settings if `None`.
        cost_scope (`str`, *optional*):
            Scope for both. That of the settings if `None`.

    Returns:
        [`EvaluationDifference`]: The first minus the second.

    Raises:
        ValueError: If they were not evaluated on the same problems, or under the same limit and scope.
    """
    (ours, _), (theirs, _) = evaluation, reference
    if found := difference_of_settings(ours, theirs, PROBLEM_SETTINGS):
        raise ValueError(
            f"{ours.name!r} and {theirs.name!r} were not evaluated on the same problems: their `{found[0]}` are "
            f"{found[1]!r} and {found[2]!r}."
        )
    limit, scope = _limit(ours, cost_limit, cost_scope)
    if (limit, scope) != _limit(theirs, cost_limit, cost_scope):
        raise ValueError(
            f"{ours.name!r} and {theirs.name!r} have different limits or scopes: give the `cost_limit` and "
            "`cost_scope` to compare them under."
        )
    first, second = rollouts_by_problem(evaluation[1], greedy), rollouts_by_problem(reference[1], greedy)
    pairs = [(first[problem], second[problem]) for problem in sorted(first.keys() & second.keys())]
    if not pairs:
        raise ValueError(
            f"{ours.name!r} and {theirs.name!r} have no {'greedy' if greedy else 'sampled'} rollouts of the same problem."
        )
    for our, their in pairs:
        if our[0].answer != their[0].answer:
            raise ValueError(
                f"{ours.name!r} and {theirs.name!r} were not evaluated on the same problems: the answers of problem "
                f"{our[0].problem} are {our[0].answer!r} and {their[0].answer!r}."
            )

    def difference(value: Callable[[RolloutRecord], float]) -> Figure:
        means = [[mean(map(value, rollouts)) for rollouts in pair] for pair in pairs]
        values = torch.tensor(means, dtype=torch.float64)
        differences = values[:, 0] - values[:, 1]
        num_rollouts = sum(len(our) + len(their) for our, their in pairs)
        return Figure(differences.mean().item(), *bootstrap_interval(differences), num_rollouts, len(pairs))

    has_costs = ours.teacher is not None and theirs.teacher is not None
    return EvaluationDifference(
        name=ours.name,
        reference=theirs.name,
        greedy=greedy,
        right=difference(lambda record: record.right),
        satisfaction=difference(lambda record: _rollout_cost(record, scope) <= limit) if has_costs else None,
        cost=difference(lambda record: _rollout_cost(record, scope)) if has_costs else None,
        length=difference(lambda record: len(record.completion_ids)),
    )


def _limit(
    settings: EvaluationSettings, cost_limit: float | None, cost_scope: CostScope | None
) -> tuple[float, CostScope]:
    scope = check_cost_scope(settings.cost_scope if cost_scope is None else cost_scope)
    return settings.cost_limit if cost_limit is None else cost_limit, scope


def check_cost_scope(scope: CostScope) -> CostScope:
    """The scope itself, or an error if there is no such scope."""
    if scope not in get_args(CostScope):
        raise ValueError(f"`cost_scope` must be one of {', '.join(map(repr, get_args(CostScope)))}, got {scope!r}.")
    return scope


def rollouts_by_problem(records: Iterable[RolloutRecord], greedy: bool) -> dict[int, list[RolloutRecord]]:
    """Rollouts of one kind of each problem, in the order of problem and sample, whatever the order of the records."""
    problems: dict[int, list[RolloutRecord]] = {}
    for record in sorted(records, key=lambda record: record.key):
        if record.greedy == greedy:
            problems.setdefault(record.problem, []).append(record)
    return problems


def _summary(
    problems: dict[int, list[RolloutRecord]], limit: float, scope: CostScope, strata: bool = True
) -> RolloutSummary:
    groups: dict[str, dict[int, list[RolloutRecord]]] = {}
    for problem, rollouts in problems.items():
        difficulty = rollouts[0].difficulty
        if strata and difficulty is not None:
            groups.setdefault(difficulty, {})[problem] = rollouts
    clusters = list(problems.values())

    def of_rollouts(value: Callable[[RolloutRecord], Any]) -> list[list[Any]]:
        return [list(map(value, rollouts)) for rollouts in clusters]

    return RolloutSummary(
        right=rate_of_clusters(of_rollouts(lambda record: record.right)),
        costs=None if clusters[0][0].costs is None else _costs(clusters, limit, scope),
        length=_mean(of_rollouts(lambda record: len(record.completion_ids)), clusters),
        truncated=rate_of_clusters(of_rollouts(lambda record: record.truncated)),
        strata={name: _summary(groups[name], limit, scope, strata=False) for name in sorted(groups, key=_by_number)},
    )


def _by_number(difficulty: str) -> tuple[bool, float, str]:
    """Order of strata: by their first number ("2 steps" before "10 steps"), and words after them."""
    number = re.search(r"\d+(\.\d+)?", difficulty)
    return number is None, float(number[0]) if number else 0.0, difficulty


def _costs(clusters: Sequence[Sequence[RolloutRecord]], limit: float, scope: CostScope) -> CostSummary:
    costs = rollout_costs(clusters, scope)
    flat = torch.tensor([cost for rollouts in costs for cost in rollouts], dtype=torch.float64)
    first = Rate.of(rollouts[0] > limit for rollouts in costs)
    token_costs = [[cost for record in rollouts for cost in record.costs or ()] for rollouts in clusters]
    return CostSummary(
        satisfaction=rate_of_clusters([[cost <= limit for cost in rollouts] for rollouts in costs]),
        # The upper end of the two-sided interval at 90% is the one-sided bound at 95%.
        violation_bound=clopper_pearson_interval(first.k, first.n, 0.9)[1],
        mean=_mean(costs, clusters),
        quantiles={f"{level:g}": flat.quantile(level).item() for level in (0.5, 0.9, 0.95, 0.99)},
        max=flat.max().item(),
        divergence=_mean(token_costs, clusters),
    )


def rollout_costs(clusters: Sequence[Sequence[RolloutRecord]], scope: CostScope) -> list[list[float]]:
    """Cost of each rollout, by problem."""
    return [[_rollout_cost(record, scope) for record in rollouts] for rollouts in clusters]


def _rollout_cost(record: RolloutRecord, scope: CostScope) -> float:
    costs = torch.tensor([record.costs], dtype=torch.float64)
    return rollout_cost(costs, torch.ones_like(costs), scope).item()


def rate_of_clusters(outcomes: Sequence[Sequence[bool]]) -> Figure:
    """Rate of the `True` among the rollouts of each problem."""
    rate = Rate.of_clusters(outcomes)
    return Figure(rate.value, *rate.interval, rate.n, len(outcomes))


def _mean(values: Sequence[Sequence[float]], clusters: Sequence[Sequence[RolloutRecord]]) -> Figure:
    """Mean of the values of each problem's rollouts, one or more of a rollout."""
    flat = torch.tensor([value for of_problem in values for value in of_problem], dtype=torch.float64)
    problem = torch.arange(len(values)).repeat_interleave(torch.tensor([len(of_problem) for of_problem in values]))
    return Figure(flat.mean().item(), *bootstrap_interval(flat, problem), sum(map(len, clusters)), len(clusters))
