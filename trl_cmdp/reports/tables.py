"""Comparisons, evaluations and win rates as tables of GitHub Markdown."""

from collections.abc import Collection, Sequence
from typing import Any

from .._defaults import COST_UNITS
from .._messages import printable
from ..evaluation import Comparison, EvaluationDifference, EvaluationSummary, MethodSummary, RolloutSummary
from ..evaluation.rates import ValueWithInterval


_GREEDY = ", greedy"
_COLUMNS = (
    *("student", "rollouts", "problems", "final answer, %", "satisfaction, %", "KL, nats per token", "length, tokens"),
    *("mean cost", "median / 90% / 95% / 99% / max cost", "truncated, %", "exceed the limit, at most %"),
)


def markdown_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,), padded: bool = False
) -> str:
    """
    A table of GitHub Markdown. The columns with the indices `left` are aligned left, the others right; `padded` cells
    align in a terminal too.
    """
    # A name is the user's own, and may hold what ends a cell or a row.
    lines = [[_one_line(cell).replace("|", "/") for cell in line] for line in (columns, *rows)]
    widths = [max(map(len, column)) if padded else 0 for column in zip(*lines, strict=True)]
    dashes = ["-" * max(3, width - 1) for width in widths]
    rule = [f":{dash}" if index in left else f"{dash}:" for index, dash in enumerate(dashes)]
    justify = [str.ljust if index in left else str.rjust for index in range(len(columns))]
    return "".join(
        f"| {' | '.join(put(cell, width) for put, cell, width in zip(justify, line, widths, strict=True))} |\n"
        for line in (lines[0], rule, *lines[1:])
    )


def _one_line(text: str) -> str:
    return " ".join(printable(text).split("\n"))


def percent(figure: ValueWithInterval | None, sign: str = "") -> str:
    """A share with its interval, in percent, a dash for `None`."""
    return "–" if figure is None else figure.text(f"{sign}.1f", 100)


def comparison_table(comparison: Comparison) -> str:
    """Write a comparison as GitHub Markdown."""
    difference = f"correct minus {comparison.reference}'s [95%]" if comparison.reference else "difference"
    columns = (
        *("rank", "method", "seeds", "correct [95%]", *(f"{name} [95%]" for name in _judged(comparison.methods[0]))),
        *("satisfaction [95%]", "mean cost", difference),
        *("steps to 0.95", "violations in training (last quarter)", "CPU s"),
    )
    return markdown_table(columns, [_method_cells(row) for row in comparison.methods], left=(1,)) + (
        f"\nTask `{_one_line(comparison.task)}`, {comparison.num_problems} held-out problems a seed, sampled at temperature 1; "
        f"limit {comparison.cost_limit:g} {COST_UNITS[comparison.cost_scope]}. Methods of which at least 95% of the rollouts satisfy the "
        "limit rank first, then correct answers count. Intervals: two-level bootstrap over seeds and problems; "
        "differences are paired. Steps to 0.95: until 95% of the training rollouts of 5 steps satisfy the method's "
        "limit, mean over the seeds that reached it.\n"
    )


def method_label(row: MethodSummary) -> str:
    """Name of a method in tables and plots."""
    return "untrained student" if row.trainer == "none" and row.method == "student" else row.method


def evaluation_table(summaries: Sequence[EvaluationSummary]) -> str:
    """Write evaluations as GitHub Markdown: a row for each student's sampled rollouts, and one for its greedy ones."""
    first, settings = summaries[0], summaries[0].settings
    task, split = _one_line(settings.task), _one_line(settings.split)
    missing = [f"{one.num_missing} of {_one_line(one.settings.name)}" for one in summaries if one.num_missing]
    return markdown_table(_COLUMNS, [_rollout_cells(name, rollouts) for name, rollouts in _kinds(summaries)]) + (
        f"\nTask `{task}`, split `{split}`, {settings.num_problems} problems, sampled at temperature "
        f"{settings.temperature:g}; limit {first.cost_limit:g} ({COST_UNITS[first.cost_scope]}). Intervals at 95%, "
        "clustered by problem. The last column: with 95% confidence at most this share of rollouts exceeds the limit, "
        "from one rollout per problem.\n"
        + (f"\nNot finished, rollouts that are missing: {', '.join(missing)}.\n" if missing else "")
    )


def strata_table(summaries: Sequence[EvaluationSummary]) -> str:
    """Write evaluations by difficulty as GitHub Markdown."""
    rows = [
        (name, difficulty, *_rollout_cells(name, stratum)[1:])
        for name, rollouts in _kinds(summaries)
        for difficulty, stratum in rollouts.strata.items()
    ]
    return markdown_table((_COLUMNS[0], "difficulty", *_COLUMNS[1:]), rows) if rows else ""


def difference_table(differences: Sequence[EvaluationDifference]) -> str:
    """Write paired differences as GitHub Markdown."""
    columns = ("difference", "problems", "final answer", "satisfaction", "mean cost", "length")
    rows = [
        (
            f"{row.name} − {row.reference}{_GREEDY * row.greedy}",
            str(row.right.num_problems),
            percent(row.right, "+"),
            percent(row.satisfaction, "+"),
            "–" if row.cost is None else row.cost.text("+.3f"),
            row.length.text("+.1f"),
        )
        for row in differences
    ]
    return markdown_table(columns, rows) if rows else ""


def win_rate_table(rows: Sequence[dict[str, Any]]) -> str:
    """Write win rates, as `trl-cmdp evaluate` writes them into summary.json, as GitHub Markdown; empty without any."""
    if not rows:
        return ""
    columns = (
        *("reasoning", "judge", "judged / pairs", "win, %", "tie, %", "loss, %", "orders agree, %"),
        *("agreement with process, %", "kappa", "failures"),
    )

    def rate(values: dict[str, Any] | None) -> str:
        return percent(values and ValueWithInterval(values["value"], values["low"], values["high"]))

    lines = []
    for row in rows:
        agreed = row.get("agreement_with_process") or {"rate": None, "kappa": None}
        lines.append(
            (
                f"{row['student']} against {row['reference']}{_GREEDY * row['greedy']}",
                row["judge"],
                f"{row['num_judged']} / {row['num_pairs']}",
                *(rate(row[name]) for name in ("win", "tie", "loss", "position_consistency")),
                rate(agreed["rate"]),
                "–" if agreed["kappa"] is None else f"{agreed['kappa']:.2f}",
                ", ".join(f"{count} {kind}" for kind, count in row["failures"].items()) or "none",
            )
        )
    return markdown_table(columns, lines, left=(0, 1, 9)) + (
        "\nRates are over the pairs with a verdict; a tie is a verdict of a tie, verdicts that change with the "
        "order, or one text from both. Intervals at 95%, clustered by problem.\n"
    )


def _judged(row: MethodSummary) -> dict[str, ValueWithInterval]:
    """What is known of answers beside their correctness, by the names of the columns."""
    figures = {"reward": row.reward, "valid": row.valid}
    return {name: figure for name, figure in figures.items() if figure is not None}


def _method_cells(row: MethodSummary) -> tuple[str, ...]:
    violations = steps = "–"
    if row.violations is not None and row.late_violations is not None:
        violations = f"{row.violations:.3f} ({row.late_violations:.3f})"
        steps = "never" if row.steps_to_satisfaction is None else f"{row.steps_to_satisfaction:.0f}"
        if row.seeds_satisfied < len(row.right.by_seed):
            steps += f" ({row.seeds_satisfied}/{len(row.right.by_seed)} seeds)"
    return (
        "–" if row.rank is None else str(row.rank),
        method_label(row),
        str(len(row.right.by_seed)),
        row.right.text(),
        *(figure.text() for figure in _judged(row).values()),
        row.satisfaction.text(),
        f"{row.cost.value:.3f}",
        "–" if row.right_difference is None else row.right_difference.text("+.3f"),
        steps,
        violations,
        f"{row.cpu_s:.0f}",
    )


def _kinds(summaries: Sequence[EvaluationSummary]) -> list[tuple[str, RolloutSummary]]:
    """Name and figures of each kind of rollouts that there is."""
    kinds = [
        (summary.settings.name + suffix, rollouts)
        for summary in summaries
        for suffix, rollouts in (("", summary.sampled), (_GREEDY, summary.greedy))
    ]
    return [(name, rollouts) for name, rollouts in kinds if rollouts is not None]


def _rollout_cells(name: str, rollouts: RolloutSummary) -> tuple[str, ...]:
    costs = rollouts.costs
    return (
        name,
        str(rollouts.right.num_rollouts),
        str(rollouts.right.num_problems),
        percent(rollouts.right),
        "–" if costs is None else percent(costs.satisfaction),
        "–" if costs is None else costs.divergence.text(),
        rollouts.length.text(".1f"),
        "–" if costs is None else costs.mean.text(),
        "–" if costs is None else " / ".join(f"{cost:.3f}" for cost in (*costs.quantiles.values(), costs.max)),
        percent(rollouts.truncated),
        "–" if costs is None else f"{100 * costs.violation_bound:.1f}",
    )
