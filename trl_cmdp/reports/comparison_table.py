"""A comparison as a Markdown table."""

from ..evaluation import Comparison, Estimate, MethodSummary


def comparison_table(comparison: Comparison) -> str:
    """
    Write a comparison as GitHub Markdown.

    Args:
        comparison (`Comparison`):
            The comparison.

    Returns:
        `str`: A table with a row for each method, and a line on how to read it.
    """
    difference = f"right minus {comparison.reference}'s [95%]" if comparison.reference else "difference"
    header = (
        "rank",
        "method",
        "seeds",
        "right [95%]",
        "valid [95%]",
        "satisfaction [95%]",
        "mean cost",
        difference,
        "steps to 0.95",
        "violations in training (last quarter)",
        "CPU s",
    )
    lines = [_line(header), _line(("---:", ":---", *["---:"] * (len(header) - 2)))]
    lines += [_line(_cells(row)) for row in comparison.methods]
    return "\n".join(lines) + (
        f"\n\nTask `{comparison.task}`, {comparison.num_problems} held-out problems a seed, sampled at temperature 1; "
        f"limit {comparison.cost_limit:g} nats per token. Methods of which at least 95% of the rollouts satisfy the "
        "limit rank first, then right answers count. Intervals: two-level bootstrap over seeds and problems; "
        "differences are paired. Steps to 0.95: until 95% of the training rollouts of 5 steps satisfy the method's "
        "limit, mean over the seeds that came there.\n"
    )


def _cells(row: MethodSummary) -> tuple[str, ...]:
    violations = "–"
    if row.violations is not None and row.late_violations is not None:
        violations = f"{row.violations:.3f} ({row.late_violations:.3f})"
    steps = "–"
    if row.violations is not None:
        reached = f"{row.seeds_satisfied}/{len(row.right.by_seed)} seeds"
        steps = f"never ({reached})" if row.steps_to_satisfaction is None else f"{row.steps_to_satisfaction:.0f}"
        if row.steps_to_satisfaction is not None and row.seeds_satisfied < len(row.right.by_seed):
            steps += f" ({reached})"
    return (
        "–" if row.rank is None else str(row.rank),
        row.method if row.trainer != "none" else {"student": "untrained student"}.get(row.method, row.method),
        str(len(row.right.by_seed)),
        _estimate(row.right),
        _estimate(row.valid),
        _estimate(row.satisfaction),
        f"{row.cost.value:.3f}",
        "–" if row.right_difference is None else _estimate(row.right_difference, "+"),
        steps,
        violations,
        f"{row.cpu_s:.0f}",
    )


def _estimate(estimate: Estimate, sign: str = "") -> str:
    return f"{estimate.value:{sign}.3f} [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"
