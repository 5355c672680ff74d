"""The figures of an evaluation, each with its interval, from its records alone."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast, get_args

import torch

from ..core import bootstrap_interval, clopper_pearson_interval, rollout_cost
from ..core.budget import CostScope
from .rates import Rate
from .rollout_records import EvaluationSettings, RolloutRecord


@dataclass(frozen=True)
class Figure:
    """
    A figure with its 95% interval, for rollouts that are independent between problems only.

    Args:
        value (`float`):
            The figure.
        low (`float`):
            Lower bound.
        high (`float`):
            Upper bound.
        num_rollouts (`int`):
            Number of rollouts.
        num_problems (`int`):
            Number of problems that they belong to.
    """

    value: float
    low: float
    high: float
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
            Mean divergence of a token, every token weighing alike, in nats.
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
            Share of right final answers; of sampled rollouts this is pass@1.
        costs (`CostSummary`, *optional*):
            Costs, `None` without a teacher.
        length (`Figure`):
            Mean completion length, in tokens.
        truncated (`Figure`):
            Share of completions cut at the greatest length.
        strata (`dict[str, RolloutSummary]`):
            The same of the problems of each difficulty, easiest first. Empty where the data has none.
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
            What it was asked for.
        cost_limit (`float`):
            Limit of the figures here, in the unit of the scope.
        cost_scope (`str`):
            Scope of the figures here.
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
    What one student has over another on the same problems, in rollouts of one kind. Paired by problem: means over a
    problem's rollouts are subtracted, and problems are resampled.

    Args:
        name (`str`):
            The one.
        reference (`str`):
            The other, which is subtracted.
        greedy (`bool`):
            Whether the rollouts are greedy.
        right (`Figure`):
            Difference in the share of right final answers.
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
            What it was asked for.
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
    sampled, greedy = (_problems(records, greedy) for greedy in (False, True))
    return EvaluationSummary(
        settings=settings,
        cost_limit=limit,
        cost_scope=scope,
        num_missing=expected - len(records),
        sampled=_summary(sampled, limit, scope) if sampled else None,
        greedy=_summary(greedy, limit, scope) if greedy else None,
    )


def compare_evaluations(
    evaluation: tuple[EvaluationSettings, Sequence[RolloutRecord]],
    reference: tuple[EvaluationSettings, Sequence[RolloutRecord]],
    *,
    greedy: bool = False,
    cost_limit: float | None = None,
    cost_scope: CostScope | None = None,
) -> EvaluationDifference:
    """
    Compare two students on the problems that both have rollouts of.

    Args:
        evaluation (`tuple[EvaluationSettings, Sequence[RolloutRecord]]`):
            Settings and records of the one.
        reference (`tuple[EvaluationSettings, Sequence[RolloutRecord]]`):
            Settings and records of the other.
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
    for name in ("task", "split", "num_problems", "seed"):
        if getattr(ours, name) != getattr(theirs, name):
            raise ValueError(
                f"{ours.name!r} and {theirs.name!r} were not evaluated on the same problems: their `{name}` are "
                f"{getattr(ours, name)!r} and {getattr(theirs, name)!r}."
            )
    limit, scope = _limit(ours, cost_limit, cost_scope)
    if (limit, scope) != _limit(theirs, cost_limit, cost_scope):
        raise ValueError(
            f"{ours.name!r} and {theirs.name!r} have other limits or scopes: give the `cost_limit` and `cost_scope` "
            "that both are asked for."
        )
    first, second = _problems(evaluation[1], greedy), _problems(reference[1], greedy)
    pairs = [(first[problem], second[problem]) for problem in sorted(first.keys() & second.keys())]
    if not pairs:
        raise ValueError(
            f"{ours.name!r} and {theirs.name!r} have no {'greedy' if greedy else 'sampled'} rollouts of one problem."
        )
    for our, their in pairs:
        if our[0].answer != their[0].answer:
            raise ValueError(
                f"{ours.name!r} and {theirs.name!r} were not evaluated on the same problems: the answers of problem "
                f"{our[0].problem} are {our[0].answer!r} and {their[0].answer!r}."
            )

    def difference(ours: list[list[float]], theirs: list[list[float]]) -> Figure:
        means = [[sum(values) / len(values) for values in pair] for pair in zip(ours, theirs, strict=True)]
        values = torch.tensor(means, dtype=torch.float64)
        differences = values[:, 0] - values[:, 1]
        num_rollouts = sum(len(our) + len(their) for our, their in pairs)
        return Figure(differences.mean().item(), *bootstrap_interval(differences), num_rollouts, len(pairs))

    sides = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    costs = None if ours.teacher is None or theirs.teacher is None else [_rollout_costs(side, scope) for side in sides]
    return EvaluationDifference(
        name=ours.name,
        reference=theirs.name,
        greedy=greedy,
        right=difference(*([[float(record.right) for record in rollouts] for rollouts in side] for side in sides)),
        satisfaction=None
        if costs is None
        else difference(*([[float(cost <= limit) for cost in rollouts] for rollouts in side] for side in costs)),
        cost=None if costs is None else difference(*costs),
        length=difference(
            *([[float(len(record.completion_ids)) for record in rollouts] for rollouts in side] for side in sides)
        ),
    )


def _limit(
    settings: EvaluationSettings, cost_limit: float | None, cost_scope: CostScope | None
) -> tuple[float, CostScope]:
    scope = settings.cost_scope if cost_scope is None else cost_scope
    if scope not in get_args(CostScope):
        raise ValueError(f"`cost_scope` must be 'mean', 'sum' or 'worst_prefix', got {scope!r}.")
    return settings.cost_limit if cost_limit is None else cost_limit, cast(CostScope, scope)


def _problems(records: Iterable[RolloutRecord], greedy: bool) -> dict[int, list[RolloutRecord]]:
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
    return RolloutSummary(
        right=_rate([[record.right for record in rollouts] for rollouts in clusters]),
        costs=None if clusters[0][0].costs is None else _costs(clusters, limit, scope),
        length=_mean([[len(record.completion_ids) for record in rollouts] for rollouts in clusters], clusters),
        truncated=_rate([[record.truncated for record in rollouts] for rollouts in clusters]),
        strata={name: _summary(groups[name], limit, scope, strata=False) for name in sorted(groups, key=_by_number)},
    )


def _by_number(difficulty: str) -> tuple[bool, float, str]:
    """Order of strata: by their first number ("2 steps" before "10 steps"), and words after them."""
    number = re.search(r"\d+(\.\d+)?", difficulty)
    return number is None, float(number[0]) if number else 0.0, difficulty


def _costs(clusters: Sequence[Sequence[RolloutRecord]], limit: float, scope: CostScope) -> CostSummary:
    costs = _rollout_costs(clusters, scope)
    flat = torch.tensor([cost for rollouts in costs for cost in rollouts], dtype=torch.float64)
    first = Rate.of(rollouts[0] > limit for rollouts in costs)
    token_costs = [[cost for record in rollouts for cost in record.costs or ()] for rollouts in clusters]
    return CostSummary(
        satisfaction=_rate([[cost <= limit for cost in rollouts] for rollouts in costs]),
        # The upper end of the two-sided interval at 90% is the one-sided bound at 95%.
        violation_bound=clopper_pearson_interval(first.k, first.n, 0.9)[1],
        mean=_mean(costs, clusters),
        quantiles={f"{level:g}": flat.quantile(level).item() for level in (0.5, 0.9, 0.95, 0.99)},
        max=flat.max().item(),
        divergence=_mean(token_costs, clusters),
    )


def _rollout_costs(clusters: Sequence[Sequence[RolloutRecord]], scope: CostScope) -> list[list[float]]:
    return [[_rollout_cost(record, scope) for record in rollouts] for rollouts in clusters]


def _rollout_cost(record: RolloutRecord, scope: CostScope) -> float:
    costs = torch.tensor([record.costs], dtype=torch.float64)
    return rollout_cost(costs, torch.ones_like(costs), scope).item()


def _rate(outcomes: Sequence[Sequence[bool]]) -> Figure:
    rate = Rate.of_clusters(outcomes)
    return Figure(rate.value, *rate.interval, rate.n, len(outcomes))


def _mean(values: Sequence[Sequence[float]], clusters: Sequence[Sequence[RolloutRecord]]) -> Figure:
    """Mean of the values of each problem's rollouts, one or more of a rollout."""
    flat = torch.tensor([value for of_problem in values for value in of_problem], dtype=torch.float64)
    problem = torch.arange(len(values)).repeat_interleave(torch.tensor([len(of_problem) for of_problem in values]))
    return Figure(flat.mean().item(), *bootstrap_interval(flat, problem), sum(map(len, clusters)), len(clusters))
