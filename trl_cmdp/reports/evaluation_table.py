"""Evaluations as Markdown tables."""

from collections.abc import Sequence

from ..evaluation import EvaluationDifference, EvaluationSummary, Figure, RolloutSummary


def evaluation_table(summaries: Sequence[EvaluationSummary]) -> str:
    """
    Write evaluations as GitHub Markdown: a row for each student's sampled rollouts, and one for its greedy ones.

    Args:
        summaries (`Sequence[EvaluationSummary]`):
            Evaluations with one limit and scope.

    Returns:
        `str`: A table, and a line on how to read it.
    """
    rows = [_cells(name, rollouts) for name, rollouts in _kinds(summaries)]
    first = summaries[0]
    settings = first.settings
    exceeds = f"{first.cost_limit:g} ({_UNITS[first.cost_scope]})"
    missing = [f"{one.num_missing} of {one.settings.name}" for one in summaries if one.num_missing]
    return _table(_COLUMNS, rows) + (
        f"\nTask `{settings.task}`, split `{settings.split}`, {settings.num_problems} problems, sampled at temperature "
        f"{settings.temperature:g}; limit {exceeds}. Intervals at 95%, clustered by problem. The last column: with 95% "
        "confidence at most this share of rollouts exceeds the limit, from one rollout per problem.\n"
        + (f"\nNot finished, rollouts that are missing: {', '.join(missing)}.\n" if missing else "")
    )


def strata_table(summaries: Sequence[EvaluationSummary]) -> str:
    """
    Write evaluations by difficulty as GitHub Markdown.

    Args:
        summaries (`Sequence[EvaluationSummary]`):
            Evaluations with one limit and scope.

    Returns:
        `str`: A table with a row for each student and difficulty, empty if the problems have none.
    """
    rows = [
        (name, difficulty, *_cells(name, stratum)[1:])
        for name, rollouts in _kinds(summaries)
        for difficulty, stratum in rollouts.strata.items()
    ]
    return _table((_COLUMNS[0], "difficulty", *_COLUMNS[1:]), rows) if rows else ""


def difference_table(differences: Sequence[EvaluationDifference]) -> str:
    """
    Write paired differences as GitHub Markdown.

    Args:
        differences (`Sequence[EvaluationDifference]`):
            The differences.

    Returns:
        `str`: A table with a row for each, empty if there is none.
    """
    if not differences:
        return ""
    columns = ("difference", "problems", "final answer", "satisfaction", "mean cost", "length")
    return _table(
        columns,
        [
            (
                f"{row.name} − {row.reference}{_GREEDY * row.greedy}",
                str(row.right.num_problems),
                _percent(row.right, "+"),
                "–" if row.satisfaction is None else _percent(row.satisfaction, "+"),
                "–" if row.cost is None else _number(row.cost, "+.3f"),
                _number(row.length, "+.1f"),
            )
            for row in differences
        ],
    )


_GREEDY = ", greedy"
_UNITS = {"mean": "nats per token", "sum": "nats per rollout", "worst_prefix": "nats per token of the worst prefix"}
_COLUMNS = (
    "student",
    "rollouts",
    "problems",
    "final answer, %",
    "satisfaction, %",
    "KL, nats per token",
    "length, tokens",
    "mean cost",
    "median / 90% / 95% / 99% / max cost",
    "truncated, %",
    "exceed the limit, at most %",
)


def _kinds(summaries: Sequence[EvaluationSummary]) -> list[tuple[str, RolloutSummary]]:
    kinds = []
    for summary in summaries:
        if summary.sampled is not None:
            kinds.append((summary.settings.name, summary.sampled))
        if summary.greedy is not None:
            kinds.append((summary.settings.name + _GREEDY, summary.greedy))
    return kinds


def _cells(name: str, rollouts: RolloutSummary) -> tuple[str, ...]:
    costs = rollouts.costs
    return (
        name,
        str(rollouts.right.num_rollouts),
        str(rollouts.right.num_problems),
        _percent(rollouts.right),
        "–" if costs is None else _percent(costs.satisfaction),
        "–" if costs is None else _number(costs.divergence, ".3f"),
        _number(rollouts.length, ".1f"),
        "–" if costs is None else _number(costs.mean, ".3f"),
        "–" if costs is None else " / ".join(f"{cost:.3f}" for cost in (*costs.quantiles.values(), costs.max)),
        _percent(rollouts.truncated),
        "–" if costs is None else f"{100 * costs.violation_bound:.1f}",
    )


def _percent(figure: Figure, sign: str = "") -> str:
    return "{:{form}} [{:{form}}, {:{form}}]".format(
        100 * figure.value, 100 * figure.low, 100 * figure.high, form=f"{sign}.1f"
    )


def _number(figure: Figure, form: str) -> str:
    return f"{figure.value:{form}} [{figure.low:{form}}, {figure.high:{form}}]"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    alignment = [":---", *["---:"] * (len(columns) - 1)]
    # A name is the user's own.
    return "".join(
        f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in (columns, alignment, *rows)
    )
