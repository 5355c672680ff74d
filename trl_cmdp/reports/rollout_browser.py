"""The data of the report's rollout browser: which rollouts, their tokens' costs, and where each leaves the limit."""

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise, takewhile
from typing import Any

import torch

from .._defaults import CostScope
from ..core import prefix_cost, rollout_cost
from ..evaluation import EvaluationSettings, RolloutRecord
from ..evaluation.summary import Evaluation


# About 15 bytes a token and a page of a few megabytes at most.
MAX_ROLLOUTS, MAX_TOKENS, MAX_CHARACTERS = 1000, 200_000, 3_500_000
# Characters of a prompt in the list; and those after which it has to differ from the others.
_EXCERPT, _ALIKE = 120, 40
_Size = tuple[int, int, int]  # rollouts, tokens, characters
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


def prompt_text(prompt: str | list[dict[str, str]]) -> str:
    """A prompt to be read: text, or what its messages say."""
    return prompt if isinstance(prompt, str) else "\n\n".join(f"{one['role']}: {one['content']}" for one in prompt)


def script_json(value: Any) -> str:
    """JSON for a `<script>` element: no completion can end it, or begin a comment in it."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def choose_problems(
    evaluations: Sequence[Evaluation], max_rollouts: int = MAX_ROLLOUTS, max_tokens: int = MAX_TOKENS
) -> set[int]:
    """As many problems as fit, but at least one, at even distances, each with all its rollouts of all students."""
    sizes: dict[int, _Size] = {}
    for _, records in evaluations:
        for record in records:
            before = sizes.get(record.problem) or (
                0,
                0,
                len(script_json([record.prompt, record.teacher_prompt, record.answer, record.images])),
            )
            sizes[record.problem] = _sum([before, _size(record)])
    problems = sorted(sizes)
    chosen = _fitting([sizes[problem] for problem in problems], (max_rollouts, max_tokens, MAX_CHARACTERS))
    return {problems[index] for index in chosen}


def keep_shown(
    evaluations: Sequence[Evaluation], problems: set[int], max_rollouts: int = MAX_ROLLOUTS
) -> list[Evaluation]:
    """Evaluations with the rollouts of these problems alone and, where those of one are too many, as many as fit."""
    kept = [(student, record) for student, (_, records) in enumerate(evaluations) for record in records]
    kept = [(student, record) for student, record in kept if record.problem in problems]
    if len(problems) == 1:
        sizes = [_size(record) for _, record in kept]
        kept = [kept[index] for index in _fitting(sizes, (max_rollouts, MAX_TOKENS, MAX_CHARACTERS))]
    return [
        (settings, [record for owner, record in kept if owner == student])
        for student, (settings, _) in enumerate(evaluations)
    ]


def _size(record: RolloutRecord) -> _Size:
    """Rollouts, tokens and characters of one rollout in the page, about seven of them a cost."""
    return 1, len(record.tokens), 200 + len(script_json(record.tokens)) + 7 * len(record.tokens)


def _sum(sizes: Sequence[_Size]) -> _Size:
    rollouts, tokens, characters = map(sum, zip(*sizes, strict=True))
    return rollouts, tokens, characters


def _fitting(sizes: Sequence[_Size], largest: _Size) -> list[int]:
    """Indices at even distances: as many as fit together, but at least the first."""

    def spread(count: int) -> list[int]:
        return [index * len(sizes) // count for index in range(count)]

    def too_large(count: int) -> bool:
        total = _sum([sizes[index] for index in spread(count)])
        return any(size > most for size, most in zip(total, largest, strict=True))

    # More of them are larger, but for how much each is.
    return spread(1 + bisect_left(range(2, len(sizes) + 1), True, key=too_large))


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
    excerpts = distinct_excerpts({problem: prompt_text(record.prompt) for problem, record in shown.items()})
    return {
        "limit": settings.cost_limit,
        "scope": settings.cost_scope,
        "shades": SHADES,
        "students": list(names),
        "problems": {
            problem: {
                "prompt": record.prompt,
                "teacher_prompt": record.teacher_prompt,
                "excerpt": excerpts[problem],
                "answer": record.answer,
                "difficulty": record.difficulty,
                "images": record.images or [],
            }
            for problem, record in sorted(shown.items())
        },
        "rollouts": [_rollout(student, record, settings) for student, record in kept],
    }


def distinct_excerpts(prompts: Mapping[int, str]) -> dict[int, str]:
    """
    A line of each prompt by which it is told from the others: without the lines that more than half of them share, such
    as those of a template, without the words that all begin with, and of what begins like another its first words and
    what differs.
    """
    lines = {problem: [line.strip() for line in text.split("\n") if line.strip()] for problem, text in prompts.items()}
    counts = Counter(line for of_prompt in lines.values() for line in set(of_prompt))
    own = {
        problem: [line for line in of_prompt if len(prompts) < 2 or 2 * counts[line] <= len(prompts)] or of_prompt[-1:]
        for problem, of_prompt in lines.items()
    }
    words = {problem: tuple(" ".join(of_prompt).split()) for problem, of_prompt in own.items()}
    different = sorted(set(words.values()))
    shared = dict.fromkeys(different, 0)  # words with the prompt that is most like it
    for one, other in pairwise(different):
        same = _num_shared(one, other)
        shared[one], shared[other] = max(shared[one], same), max(shared[other], same)
    first = _num_shared(different[0], different[-1]) if len(different) > 1 else 0  # words that all begin with
    return {problem: _excerpt(of_prompt, first, shared[of_prompt]) for problem, of_prompt in words.items()}


def _excerpt(words: Sequence[str], first: int, different: int) -> str:
    """A text without its first words, and without what follows until it differs from others if that is long."""
    text = " ".join(words[first:]) or " ".join(words)
    if len(" ".join(words[first:different])) > _ALIKE:
        text = f"{' '.join(words[first : first + 3])} … {' '.join(words[different:])}"
    return f"{'… ' * (0 < first < len(words))}{text}"[:_EXCERPT]


def _num_shared(one: Sequence[str], other: Sequence[str]) -> int:
    """Number of words with which both texts begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


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
