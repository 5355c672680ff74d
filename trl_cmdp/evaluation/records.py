"""The record of one cell of a comparison: one method, one seed."""

import io
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from .._defaults import COST_SCOPE, COST_UNITS, CostScope
from ._lines import from_line, read_lines, to_line


@dataclass(frozen=True)
class Outcome:
    """What a model did with one held-out problem."""

    right: Literal[0, 1]  # 1 if the final answer is correct, else 0
    valid: (
        Literal[0, 1] | None
    )  # 1 if every step of the answer is valid, else 0; `None` where nothing checks the steps
    cost: float  # cost in the unit of the record's scope: mean divergence from the teacher, in nats per token
    length: int  # number of completion tokens
    reward: float | None = None  # task reward; `None` where in the whole cell it is 1 if the answer is right, else 0

    @property
    def task_reward(self) -> float:
        """The reward, recorded or not."""
        return self.right if self.reward is None else self.reward


@dataclass(frozen=True)
class CellRecord:
    """One cell: a method trained with one seed, and evaluated. Or a reference, evaluated as it is."""

    method: str  # name of the method in the table
    trainer: str  # its trainer, or `"none"` for a reference
    seed: int  # seed of the problems, of the rollouts and of the evaluation
    task: str  # task, a module of `trl_cmdp.tasks`, or the experiment's test dataset
    # What the cell was asked for: a cell with equal settings need not be run again. Holds `cost_limit`
    settings: dict[str, Any]
    config: dict[str, Any]  # all arguments of the training, without its output folder. Empty for a reference
    versions: dict[str, str]  # versions of Python and of the libraries
    git_commit: str | None  # commit of the source checkout, `None` if the package was not run from one
    git_dirty: bool  # whether the package differed from that commit
    wall_s: float  # wall-clock time of the cell's process, in seconds
    cpu_s: float  # its processor time, user and system, in seconds
    peak_memory_mb: float  # its largest resident memory, in MiB
    # Of each held-out problem, in the problems' order, which is the same for every method of a seed
    outcomes: list[Outcome]
    # Of each logged step: `step` and, where logged, `reward`, `cost`, `satisfaction`, `distill_loss` and
    # `lagrange_multiplier`
    history: list[dict[str, float]]

    @property
    def cost_limit(self) -> float:
        """Limit that satisfaction is measured against, in the unit of the scope."""
        return float(self.settings["cost_limit"])

    @property
    def cost_scope(self) -> CostScope:
        """Scope of the limit and of the outcomes' costs."""
        return cast(CostScope, self.settings.get("cost_scope", COST_SCOPE))

    def to_json(self) -> str:
        """The record on one line."""
        # A thousand outcomes: values alone, in the fields' order, and a reward where there is one.
        values = [list(asdict(outcome).values()) for outcome in self.outcomes]
        return to_line({**asdict(self), "outcomes": [row[:-1] if row[-1] is None else row for row in values]})

    @classmethod
    def from_json(cls, line: str) -> "CellRecord":
        """Read [`~CellRecord.to_json`]'s line. One of other keys, or values of other types, is a `ValueError`."""
        record = from_line(cls, line)
        if not record["outcomes"]:
            raise ValueError("its `outcomes` are empty.")
        if type(record["settings"].get("cost_limit")) not in (int, float):
            raise ValueError("its `settings` hold no `cost_limit` that is a number.")
        if record["settings"].get("cost_scope", COST_SCOPE) not in list(COST_UNITS):
            raise ValueError("its `settings` hold a `cost_scope` that is none.")
        return cls(**{**record, "outcomes": [Outcome(*values) for values in record["outcomes"]]})


def read_records(text: str) -> list[CellRecord]:
    """
    Read a records file.

    Args:
        text (`str`):
            One record a line. A last line without its end was cut while it was written, and is left out.

    Returns:
        `list[CellRecord]`: The records, in the file's order.

    Raises:
        ValueError: If another line is not a record (its number is named), or if a cell is recorded twice.
    """
    records: dict[tuple[str, int], CellRecord] = {}
    for number, record in read_lines(io.StringIO(text), CellRecord.from_json, "record"):
        if (record.method, record.seed) in records:
            raise ValueError(
                f"Line {number}: {record.method!r} with seed {record.seed} is recorded twice: delete one of its lines."
            )
        records[record.method, record.seed] = record
    return list(records.values())
