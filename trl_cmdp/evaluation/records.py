"""The record of one cell of a comparison: one method, one seed."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """
    What a model did with one held-out problem.

    Args:
        right (`int`):
            1 if the final answer is right, else 0.
        valid (`int`):
            1 if every step of the answer is valid, else 0.
        cost (`float`):
            Mean divergence from the teacher, in nats per token.
        length (`int`):
            Number of completion tokens.
    """

    right: int
    valid: int
    cost: float
    length: int


@dataclass(frozen=True)
class CellRecord:
    """
    One cell: a method trained with one seed, and evaluated. Or a reference, evaluated as it is.

    Args:
        method (`str`):
            Name of the method in the table.
        trainer (`str`):
            Its trainer, or `"none"` for a reference.
        seed (`int`):
            Seed of the problems, of the rollouts and of the evaluation.
        task (`str`):
            Task, a module of `trl_cmdp.tasks`.
        settings (`dict[str, Any]`):
            What the cell was asked for: a cell with equal settings need not be run again. Holds `cost_limit`.
        config (`dict[str, Any]`):
            All arguments of the training, without its output folder. Empty for a reference.
        versions (`dict[str, str]`):
            Versions of Python and of the libraries.
        git_commit (`str`, *optional*):
            Commit of the source checkout, `None` if the package was not run from one.
        git_dirty (`bool`):
            Whether the package differed from that commit.
        wall_s (`float`):
            Wall-clock time of the cell's process, in seconds.
        cpu_s (`float`):
            Its processor time, user and system, in seconds.
        peak_memory_mb (`float`):
            Its largest resident memory, in MiB.
        outcomes (`list[Outcome]`):
            Of each held-out problem, in the problems' order, which is the same for every method of a seed.
        history (`list[dict[str, float]]`):
            Of each logged step: `step` and, where logged, `reward`, `cost`, `satisfaction`, `distill_loss` and
            `lagrange_multiplier`.
    """

    method: str
    trainer: str
    seed: int
    task: str
    settings: dict[str, Any]
    config: dict[str, Any]
    versions: dict[str, str]
    git_commit: str | None
    git_dirty: bool
    wall_s: float
    cpu_s: float
    peak_memory_mb: float
    outcomes: list[Outcome]
    history: list[dict[str, float]]

    @property
    def cost_limit(self) -> float:
        """Limit that satisfaction is measured against, in nats per token."""
        return float(self.settings["cost_limit"])

    def to_json(self) -> str:
        """The record on one line."""
        record = asdict(self)
        # A thousand of them: values alone, in the fields' order.
        record["outcomes"] = [list(asdict(outcome).values()) for outcome in self.outcomes]
        return json.dumps(record, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> "CellRecord":
        """
        Read [`~CellRecord.to_json`]'s line.

        Raises:
            ValueError: If it is not a record: no JSON, a key missing or unknown, a value of another type.
        """
        record = json.loads(line)
        if not isinstance(record, dict):
            raise ValueError(f"A record is a JSON object, got {type(record).__name__}.")
        names = {field.name for field in fields(cls)}
        if record.keys() != names:
            raise ValueError(f"A record has the wrong keys: {', '.join(sorted(record.keys() ^ names))}.")
        for name, kind in _TYPES.items():
            if not isinstance(record[name], kind) or (isinstance(record[name], bool) and kind is not bool):
                raise ValueError(f"`{name}` of a record has the wrong type: {type(record[name]).__name__}.")
        if not record["outcomes"]:
            raise ValueError("`outcomes` of a record are empty.")
        if "cost_limit" not in record["settings"]:
            raise ValueError("`settings` of a record hold no `cost_limit`.")
        return cls(**{**record, "outcomes": [_outcome(values) for values in record["outcomes"]]})


_NUMBER = (int, float)
_TYPES: dict[str, Any] = {
    "method": str,
    "trainer": str,
    "seed": int,
    "task": str,
    "settings": dict,
    "config": dict,
    "versions": dict,
    "git_commit": (str, type(None)),
    "git_dirty": bool,
    "wall_s": _NUMBER,
    "cpu_s": _NUMBER,
    "peak_memory_mb": _NUMBER,
    "outcomes": list,
    "history": list,
}


def read_records(text: str) -> list[CellRecord]:
    """
    Read a records file.

    Args:
        text (`str`):
            One record a line. A last line without its end was cut while it was written, and is left out.

    Returns:
        `list[CellRecord]`: The records, in the file's order.

    Raises:
        ValueError: If another line is not a record (its number is named), or if a cell is there twice.
    """
    records: list[CellRecord] = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            records.append(CellRecord.from_json(line))
        except ValueError as error:
            raise ValueError(f"Line {number} is not a record: {error}") from error
    _check_unique(records)
    return records


def _outcome(values: Any) -> Outcome:
    if not (isinstance(values, list) and len(values) == len(fields(Outcome))):
        raise ValueError(f"An outcome is [right, valid, cost, length], got {values!r}.")
    right, valid, cost, length = values
    if right not in (0, 1) or valid not in (0, 1) or not isinstance(cost, _NUMBER) or not isinstance(length, int):
        raise ValueError(f"An outcome is [right, valid, cost, length], got {values!r}.")
    return Outcome(right, valid, float(cost), length)


def _check_unique(records: Sequence[CellRecord]) -> None:
    seen = set()
    for record in records:
        if (record.method, record.seed) in seen:
            raise ValueError(f"{record.method!r} with seed {record.seed} is there twice: delete one of its lines.")
        seen.add((record.method, record.seed))
