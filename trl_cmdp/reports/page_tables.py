"""The tables of the page: names, values, and the small print below a value."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from ..evaluation import Comparison, EvaluationDifference, RolloutSummary
from ..evaluation.rates import ValueWithInterval
from ._curves import logged
from .runs import ComparisonRun, EvaluationRun, TrainingRun
from .tables import method_label


LAST_VALUES = 10
_LONGEST_FINGERPRINT = 12
_TRAINING_COLUMNS = {
    "reward": "reward",
    "mean cost": "constraint/cost",
    "largest cost": "constraint/cost_max",
    "limit": "constraint/limit",
    "satisfaction": "constraint/satisfaction_rate",
    "multiplier": "lagrange_multiplier",
    "tokens": "completions/mean_length",
}


@dataclass(frozen=True)
class Cell:
    """A value, and its interval below it."""

    value: str
    interval: str = ""


@dataclass(frozen=True)
class PageTable:
    """A table: its rows have a name each, and a cell for each column but the first, or one for all."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]


def number(figure: ValueWithInterval | None, form: str = ".3f", factor: float = 1.0, unit: str = "") -> Cell:
    """A figure with its interval."""
    if figure is None:
        return Cell("–")
    value, low, high = (f"{factor * bound:{form}}" for bound in (figure.value, figure.low, figure.high))
    return Cell(value + unit, f"{low} to {high}")


def share(figure: ValueWithInterval | None) -> Cell:
    """A share with its interval, in percent."""
    return number(figure, ".1f", 100, "%")


def points(figure: ValueWithInterval | None) -> Cell:
    """A difference of shares, in percentage points."""
    return number(figure, "+.1f", 100)


def summary_table(caption: str, summaries: dict[str, RolloutSummary]) -> PageTable:
    """Figures of one kind of rollouts, a row for each student."""
    costly = any(summary.costs is not None for summary in summaries.values())
    of_costs = ("within the limit", "violations at most*", "mean cost", "divergence of a token") if costly else ()
    rows = []
    for name, summary in summaries.items():
        costs = summary.costs
        cells = [share(summary.right)]
        if costs is not None:
            bound = Cell(f"{100 * costs.violation_bound:.1f}%")
            cells += [share(costs.satisfaction), bound, number(costs.mean), number(costs.divergence)]
        cells += [number(summary.length, ".1f"), share(summary.truncated), Cell(str(summary.right.num_rollouts))]
        rows.append((name, cells))
    return PageTable(caption, ("student", "correct answers", *of_costs, "tokens", "truncated", "rollouts"), rows)


def differences_table(differences: Sequence[EvaluationDifference]) -> PageTable:
    """Paired differences to one student."""
    costly = any(row.cost is not None for row in differences)
    of_costs = ("within the limit, points", "mean cost") if costly else ()
    rows = [
        (
            row.name,
            [
                points(row.right),
                *((points(row.satisfaction), number(row.cost, "+.3f")) if costly else ()),
                number(row.length, "+.1f"),
            ],
        )
        for row in differences
    ]
    caption = f"Minus {differences[0].reference}, paired by problem"
    return PageTable(caption, ("student", "correct answers, points", *of_costs, "tokens"), rows)


def strata_table(strata: Sequence[str], summaries: dict[str, RolloutSummary]) -> PageTable:
    """Rates by difficulty."""
    costly = any(summary.costs is not None for summary in summaries.values())
    rows = []
    for stratum in strata:
        for name, summary in summaries.items():
            if part := summary.strata.get(stratum):
                cells = [Cell(name), Cell(str(part.right.num_problems)), share(part.right)]
                rows.append((stratum, cells + ([share(part.costs and part.costs.satisfaction)] if costly else [])))
    columns = ("difficulty", "student", "problems", "correct answers", *(("within the limit",) if costly else ()))
    return PageTable("By difficulty", columns, rows)


def training_table(runs: Sequence[TrainingRun]) -> PageTable:
    """How each training run ended."""
    metrics = {
        title: key for title, key in _TRAINING_COLUMNS.items() if any(logged(run.history, key)[0] for run in runs)
    }
    rows, most = [], 0
    for run in runs:
        cells = [Cell(str(run.steps))]
        for title, key in metrics.items():
            last = logged(run.history, key)[1][-LAST_VALUES:]
            most = max(most, len(last))
            of_last = max if title == "largest cost" else mean
            text = (f"{100 * mean(last):.1f}%" if title == "satisfaction" else f"{of_last(last):.4g}") if last else "–"
            cells.append(Cell(text))
        rows.append((run.name, cells))
    largest = ", and the largest cost among them" if "largest cost" in metrics else ""
    caption = f"Means over the last {most} logged values{largest}" if most > 1 else "The one logged value"
    return PageTable(caption if most else "Nothing is logged yet", ("run", "steps", *metrics), rows)


def comparison_page_table(comparison: Comparison) -> PageTable:
    """A row for each method, by rank."""
    reference = comparison.reference
    of_reference = (f"correct minus {reference}’s, points",) if reference else ()
    rewarded = any(row.reward is not None for row in comparison.methods)
    checked = any(row.valid is not None for row in comparison.methods)
    rows = [
        (
            method_label(row),
            [
                Cell("–" if row.rank is None else str(row.rank)),
                share(row.right),
                *((number(row.reward),) if rewarded else ()),
                *((share(row.valid),) if checked else ()),
                share(row.satisfaction),
                number(row.cost),
                *((points(row.right_difference),) if reference else ()),
                Cell("–" if row.violations is None else f"{100 * row.violations:.1f}%"),
                Cell(str(len(row.right.by_seed))),
            ],
        )
        for row in comparison.methods
    ]
    of_answers = (*(("reward",) if rewarded else ()), *(("all steps valid",) if checked else ()))
    columns = ("method", "rank", "correct answers", *of_answers, "within the limit", "mean cost")
    several = max(len(row.right.by_seed) for row in comparison.methods) > 1
    caption = "Means over the seeds" if several else "One seed"
    return PageTable(caption, (*columns, *of_reference, "violations in training", "seeds"), rows)


def settings_table(runs: Sequence[EvaluationRun]) -> PageTable:
    """What was asked for: one value where it is the same for all, else one for each student."""
    flat = []
    for run in runs:
        settings = asdict(run.settings)
        settings["versions"] = ", ".join(f"{name} {version}" for name, version in settings["versions"].items())
        flat.append({name: _setting(name, value) for name, value in {**settings, "records": len(run.records)}.items()})
    rows = []
    for name in flat[0]:
        values = [settings[name] for settings in flat]
        if set(values) != {"–"}:  # asked for by nobody
            cells = [Cell(value) for value in (values[:1] if len(set(values)) == 1 else values)]
            rows.append((name.replace("_", " "), cells))
    names = [run.name for run in runs]
    return PageTable("Evaluation", ("setting", *(names if len(names) > 1 else ("value",))), rows)


def comparison_settings_table(run: ComparisonRun, task: str) -> PageTable:
    """How the cells of a comparison were made."""
    values: dict[str, set[str]] = {}
    for record in run.records:
        versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
        commit = f"{_setting('git_commit', record.git_commit)}{' with changes' * record.git_dirty}"
        for name, value in {"versions": versions, "git commit": commit, "seeds": str(record.seed)}.items():
            values.setdefault(name, set()).add(value)
    rows = [("task", [Cell(task)]), *((name, [Cell("; ".join(sorted(values[name])))]) for name in values)]
    return PageTable(run.name, ("setting", "value"), rows)


def _setting(name: str, value: Any) -> str:
    if value is None:
        return "–"
    # Enough of a hash to tell two apart.
    return str(value)[:_LONGEST_FINGERPRINT] if name.endswith(("_fingerprint", "_commit")) else str(value)
