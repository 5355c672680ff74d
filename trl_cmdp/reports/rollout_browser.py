"""The data of the report's rollout browser: which rollouts, their tokens' costs, and where each leaves the limit."""

from collections.abc import Sequence
from typing import Any

import torch

from .._defaults import CostScope
from ..core import prefix_cost, rollout_cost
from ..evaluation import EvaluationSettings, RolloutRecord
from ..evaluation.summary import Evaluation


# About 15 bytes a token and a page of a few megabytes at most.
MAX_ROLLOUTS, MAX_TOKENS = 1000, 200_000
# Lower bounds, in nats, of the shades: half decades, so that the eye sees both a slip and a leap.
SHADES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def cost_through(costs: Sequence[float], scope: CostScope) -> list[float]:
    """Cost of the prefix that ends with each token of one rollout. The last one is the rollout's own."""
    exact = torch.tensor([costs], dtype=torch.float64)
    mask = torch.ones_like(exact)
    # `prefix_cost` ends before each token: through token t is before token t + 1. The last is the rollout's own cost,
    # to the last bit, or what exceeds the limit here would satisfy it elsewhere.
    return [*prefix_cost(exact, mask, scope)[0, 1:].tolist(), rollout_cost(exact, mask, scope).item()]


def first_exceeding(costs: Sequence[float], cost_limit: float, scope: CostScope) -> int | None:
    """
    Index of the first token with which the cost of the prefix exceeds the limit, `None` if there is none. With the
    scope `"mean"` a rollout may come back within the limit.
    """
    return next((index for index, cost in enumerate(cost_through(costs, scope)) if cost > cost_limit), None)


def choose_problems(
    evaluations: Sequence[Evaluation], max_rollouts: int = MAX_ROLLOUTS, max_tokens: int = MAX_TOKENS
) -> set[int]:
    """As many problems as fit, but at least one, at even distances, each with all its rollouts of all students."""
    sizes: dict[int, tuple[int, int]] = {}
    for _, records in evaluations:
        for record in records:
            rollouts, tokens = sizes.get(record.problem, (0, 0))
            sizes[record.problem] = (rollouts + 1, tokens + len(record.tokens))
    problems = sorted(sizes)
    for count in range(len(problems), 1, -1):
        chosen = [problems[index * len(problems) // count] for index in range(count)]
        rollouts, tokens = (sum(sizes[problem][part] for problem in chosen) for part in (0, 1))
        if rollouts <= max_rollouts and tokens <= max_tokens:
            return set(chosen)
    return set(problems[:1])


def browser_data(names: Sequence[str], evaluations: Sequence[Evaluation], problems: set[int]) -> dict[str, Any]:
    """What the page's script shows of some problems, as JSON values. The evaluations have one limit and scope."""
    settings = evaluations[0][0]
    kept = [
        (student, record)
        for student, (_, records) in enumerate(evaluations)
        for record in records
        if record.problem in problems
    ]
    shown = {record.problem: record for _, record in reversed(kept)}
    return {
        "limit": settings.cost_limit,
        "scope": settings.cost_scope,
        "shades": SHADES,
        "students": list(names),
        "problems": {
            problem: {"prompt": record.prompt, "answer": record.answer, "difficulty": record.difficulty}
            for problem, record in sorted(shown.items())
        },
        "rollouts": [_rollout(student, record, settings) for student, record in kept],
    }


def _rollout(student: int, record: RolloutRecord, settings: EvaluationSettings) -> dict[str, Any]:
    rollout: dict[str, Any] = {
        "student": student,
        "problem": record.problem,
        "greedy": record.greedy,
        "sample": record.sample,
        "right": record.right,
        "truncated": record.truncated,
        "tokens": record.tokens,
    }
    if record.costs:
        cost = cost_through(record.costs, settings.cost_scope)[-1]
        rollout |= {
            # Four decimals are for the eye; what is above the limit is decided here, on the costs themselves.
            "costs": [round(cost, 4) for cost in record.costs],
            "cost": round(cost, 4),
            "within": cost <= settings.cost_limit,
            "first": first_exceeding(record.costs, settings.cost_limit, settings.cost_scope),
        }
    return rollout
