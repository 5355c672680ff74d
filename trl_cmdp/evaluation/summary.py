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
_Clusters = Sequence[Sequence[RolloutRecord]]  # rollouts of each problem

_MOST_DRAWS = 2**26  # of problems, in one bootstrap
_MOST_STRATA = 100
_ROWS = 1024  # rollouts whose costs are computed at a time


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
            The same figures for the problems of each difficulty, easiest first. Empty where the data has none, or more
            than a hundred.
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

    sides = [list(side) for side in zip(*pairs, strict=True)]

    def difference(values: Callable[[_Clusters], Sequence[Sequence[float]]]) -> Figure:
        first, second = (torch.tensor(list(map(mean, values(side))), dtype=torch.float64) for side in sides)
        differences = first - second
        num_rollouts = sum(len(our) + len(their) for our, their in pairs)
        interval = bootstrap_interval(differences, num_resamples=_num_resamples(len(pairs)))
        return Figure(differences.mean().item(), *interval, num_rollouts, len(pairs))

    def satisfied(side: _Clusters) -> list[list[bool]]:
        return [[cost <= limit for cost in costs] for costs in rollout_costs(side, scope)]

    has_costs = ours.teacher is not None and theirs.teacher is not None
    return EvaluationDifference(
        name=ours.name,
        reference=theirs.name,
        greedy=greedy,
        right=difference(lambda side: [[record.right for record in rollouts] for rollouts in side]),
        satisfaction=difference(satisfied) if has_costs else None,
        cost=difference(lambda side: rollout_costs(side, scope)) if has_costs else None,
        length=difference(lambda side: [[len(record.completion_ids) for record in rollouts] for rollouts in side]),
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
        strata={
            name: _summary(groups[name], limit, scope, strata=False)
            for name in sorted(groups, key=_by_number)
            if len(groups) <= _MOST_STRATA
        },
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
    # Rollouts of one length together: the same sums, and none of padding.
    by_length: dict[int, list[tuple[int, int]]] = {}
    for problem, rollouts in enumerate(clusters):
        for sample, record in enumerate(rollouts):
            by_length.setdefault(len(record.costs or ()), []).append((problem, sample))
    found = [[0.0] * len(rollouts) for rollouts in clusters]
    for indices in by_length.values():
        for start in range(0, len(indices), _ROWS):
            batch = indices[start : start + _ROWS]
            rows = [clusters[problem][sample].costs for problem, sample in batch]
            costs = torch.tensor(rows, dtype=torch.float64)
            of_rollouts = rollout_cost(costs, torch.ones_like(costs), scope).tolist()
            for (problem, sample), cost in zip(batch, of_rollouts, strict=True):
                found[problem][sample] = cost
    return found


def rate_of_clusters(outcomes: Sequence[Sequence[bool]]) -> Figure:
    """Rate of the `True` among the rollouts of each problem."""
    rate = Rate.of_clusters(outcomes)
    return Figure(rate.value, *rate.interval, rate.n, len(outcomes))


def _mean(values: Sequence[Sequence[float]], clusters: Sequence[Sequence[RolloutRecord]]) -> Figure:
    """Mean of the values of each problem's rollouts, one or more of a rollout."""
    flat = torch.tensor([value for of_problem in values for value in of_problem], dtype=torch.float64)
    problem = torch.arange(len(values)).repeat_interleave(torch.tensor([len(of_problem) for of_problem in values]))
    interval = bootstrap_interval(flat, problem, num_resamples=_num_resamples(len(clusters)))
    return Figure(flat.mean().item(), *interval, sum(map(len, clusters)), len(clusters))


def _num_resamples(num_problems: int) -> int:
    """10,000, and fewer only where that would take minutes: then the interval is narrow."""
    return min(10_000, max(1_000, _MOST_DRAWS // num_problems))
