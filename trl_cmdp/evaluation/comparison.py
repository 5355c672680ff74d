"""Statistics of a comparison, from its records alone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean

import torch

from .._defaults import COST_SCOPE, FEASIBLE_SATISFACTION, CostScope
from ..core import two_level_bootstrap_interval
from .rates import ValueWithInterval
from .records import CellRecord, Outcome


_SATISFACTION_WINDOW = 5
_Value = Callable[[Outcome], float]  # what is estimated of an outcome


@dataclass(frozen=True)
class Estimate(ValueWithInterval):
    """A mean over seeds with its 95% interval (two-level bootstrap over seeds and problems)."""

    by_seed: dict[int, float]  # mean of each seed


@dataclass(frozen=True)
class MethodSummary:
    """One row of the table."""

    method: str  # name of the method
    trainer: str  # its trainer, `"none"` for a reference that was not trained
    # Rank, from 1: methods that satisfy the limit first, then by correct answers. `None` without a trainer
    rank: int | None
    feasible: bool  # whether satisfaction reaches 0.95
    right: Estimate  # share of correct final answers
    valid: Estimate | None  # share of answers of which every step is valid. `None` where nothing checks the steps
    satisfaction: Estimate  # share of rollouts whose cost is within the limit
    cost: Estimate  # mean cost, in the unit of the scope
    reward: Estimate | None  # mean task reward. `None` where it only says which answers are correct
    # Method minus reference method, paired by seed and problem. `None` for the reference method itself, without a
    # trainer, where they have no seed in common, and of what either lacks
    right_difference: Estimate | None
    valid_difference: Estimate | None
    satisfaction_difference: Estimate | None
    # First step at which the training rollouts' satisfaction, averaged over 5 logged steps, reaches 0.95: mean over
    # the seeds that reached it, `None` if none did
    steps_to_satisfaction: float | None
    seeds_satisfied: int  # number of seeds that reached it
    # Share of training rollouts above the method's own limit, over the whole run. `None` if not logged
    violations: float | None
    late_violations: float | None  # the same over the last quarter of the steps
    wall_s: float  # means over seeds of what a cell took
    cpu_s: float  # means over seeds of what a cell took
    peak_memory_mb: float  # means over seeds of what a cell took


@dataclass(frozen=True)
class Comparison:
    """The whole table."""

    task: str  # task of all cells
    cost_limit: float  # limit of the evaluation, in the unit of the scope
    num_problems: int  # held-out problems of each seed
    # Method that the differences are to: the one asked for, or `"constrained"` where it is there, or the first trained
    reference: str | None
    methods: list[MethodSummary]  # rows, by rank; those without a trainer at the end
    cost_scope: CostScope = COST_SCOPE  # scope of the limit and the costs


def compare_methods(records: Sequence[CellRecord], reference: str | None = None) -> Comparison:
    """
    Compare methods, each over its seeds.

    Args:
        records (`Sequence[CellRecord]`):
            Cells of one task, one limit and scope, and one number of held-out problems.
        reference (`str`, *optional*):
            Trained method that the differences are to. By default `"constrained"` where it is there, else the first.

    Returns:
        `Comparison`: The table.

    Raises:
        ValueError: If there is no record, they do not belong together, or the reference is not among them.
    """
    if not records:
        raise ValueError("There are no records to compare.")
    shared = {(record.task, record.cost_limit, record.cost_scope, len(record.outcomes)) for record in records}
    if len(shared) > 1:
        raise ValueError(
            f"The records have more than one (task, cost limit, scope, held-out problems): {sorted(shared)}."
        )
    task, limit, scope, num_problems = shared.pop()
    cells: dict[str, dict[int, CellRecord]] = {}
    for record in records:
        cells.setdefault(record.method, {})[record.seed] = record
    trained = [record.method for record in records if record.trainer != "none"]
    if reference is None:
        reference = "constrained" if "constrained" in trained else trained[0] if trained else None
    elif reference not in trained:
        raise ValueError(f"`reference={reference!r}` is not a trained method of the records: {sorted(set(trained))}.")

    values = _figures(records, limit)
    rows = [_summary(by_seed, cells.get(reference or ""), values) for by_seed in cells.values()]
    # Where no answer is right, as none has a reward of 1, the reward decides.
    rows.sort(
        key=lambda row: (row.trainer == "none", not row.feasible, -row.right.value, -(row.reward or row.right).value)
    )
    ranked = [replace(row, rank=None if row.trainer == "none" else rank) for rank, row in enumerate(rows, start=1)]
    return Comparison(task, limit, num_problems, reference, ranked, scope)


def _figures(records: Sequence[CellRecord], limit: float) -> dict[str, _Value]:
    """What is estimated, by its name in a summary: valid steps where all are checked, rewards where any is recorded."""
    values: dict[str, _Value] = {
        "right": lambda outcome: outcome.right,
        "satisfaction": lambda outcome: outcome.cost <= limit,
        "cost": lambda outcome: outcome.cost,
    }
    outcomes = [outcome for record in records for outcome in record.outcomes]
    if all(outcome.valid is not None for outcome in outcomes):
        values["valid"] = lambda outcome: outcome.valid or 0
    if any(outcome.reward is not None for outcome in outcomes):
        values["reward"] = lambda outcome: outcome.task_reward
    return values


def _summary(
    cells: dict[int, CellRecord], reference: dict[int, CellRecord] | None, values: dict[str, _Value]
) -> MethodSummary:
    first = next(iter(cells.values()))
    # Not against itself, and an untrained model is not a method.
    paired = {} if reference is None or reference is cells or first.trainer == "none" else reference
    estimates = {name: _estimate(cells, value) for name, value in values.items()}
    differences = {name: _difference(cells, paired, value) for name, value in values.items()}
    reached = [steps_to_satisfaction(cell.history) for cell in cells.values()]
    steps = [step for step in reached if step is not None]
    violations = [_violations(cell.history) for cell in cells.values()]
    whole, late = ([pair[i] for pair in violations if pair is not None] for i in (0, 1))
    return MethodSummary(
        method=first.method,
        trainer=first.trainer,
        rank=None,
        feasible=estimates["satisfaction"].value >= FEASIBLE_SATISFACTION,
        steps_to_satisfaction=mean(steps) if steps else None,
        seeds_satisfied=len(steps),
        violations=mean(whole) if whole else None,
        late_violations=mean(late) if late else None,
        wall_s=mean(cell.wall_s for cell in cells.values()),
        cpu_s=mean(cell.cpu_s for cell in cells.values()),
        peak_memory_mb=mean(cell.peak_memory_mb for cell in cells.values()),
        right=estimates["right"],
        valid=estimates.get("valid"),
        satisfaction=estimates["satisfaction"],
        cost=estimates["cost"],
        reward=estimates.get("reward"),
        right_difference=differences["right"],
        valid_difference=differences.get("valid"),
        satisfaction_difference=differences["satisfaction"],
    )


def steps_to_satisfaction(history: Sequence[dict[str, float]]) -> float | None:
    """First step of a cell's history at which satisfaction, averaged over 5 logged steps, reaches 0.95, if any does."""
    logged = [entry for entry in history if "satisfaction" in entry]
    for end in range(_SATISFACTION_WINDOW, len(logged) + 1):
        window = [entry["satisfaction"] for entry in logged[end - _SATISFACTION_WINDOW : end]]
        # A sum of five rates of 0.95 is not exactly 4.75.
        if mean(window) >= FEASIBLE_SATISFACTION - 1e-9:
            return logged[end - 1]["step"]
    return None


def _violations(history: Sequence[dict[str, float]]) -> tuple[float, float] | None:
    """Shares over the whole run and its last quarter. Every step has equally many rollouts."""
    rates = [1 - entry["satisfaction"] for entry in history if "satisfaction" in entry]
    if not rates:
        return None
    return mean(rates), mean(rates[-math.ceil(len(rates) / 4) :])


def _estimate(cells: dict[int, CellRecord], value: _Value) -> Estimate:
    return _bootstrap({seed: _values(cell, value) for seed, cell in sorted(cells.items())})


def _difference(cells: dict[int, CellRecord], reference: dict[int, CellRecord], value: _Value) -> Estimate | None:
    seeds = sorted(cells.keys() & reference.keys())
    if not seeds:
        return None
    # Differences are taken problem by problem, so that a resample draws the same seeds and problems of both.
    return _bootstrap({seed: _values(cells[seed], value) - _values(reference[seed], value) for seed in seeds})


def _values(cell: CellRecord, value: _Value) -> torch.Tensor:
    return torch.tensor([float(value(outcome)) for outcome in cell.outcomes])


def _bootstrap(values: dict[int, torch.Tensor]) -> Estimate:
    by_seed = {seed: observed.double().mean().item() for seed, observed in values.items()}
    low, high = two_level_bootstrap_interval(list(values.values()))
    return Estimate(mean(by_seed.values()), low, high, by_seed)
