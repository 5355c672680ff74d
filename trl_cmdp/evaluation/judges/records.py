"""What judges compare and what they say: typed, one judgement a line, so that rates need no model."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Protocol, cast


Outcome = Literal["win", "tie", "loss"]

OUTCOMES: tuple[Outcome, ...] = ("win", "tie", "loss")


@dataclass(frozen=True)
class Pair:
    """
    Two solutions of one problem.

    Args:
        problem (`int`):
            Index of the problem in its split.
        greedy (`bool`):
            Whether they are the greedy rollouts.
        sample (`int`):
            Number of the sample.
        prompt (`str`):
            Text of the problem.
        solution (`str`):
            Solution of the student whose win is a win.
        other (`str`):
            Solution of the other student.
        students (`tuple[str, str]`, *optional*):
            Names of the two. No model is told.
    """

    problem: int
    greedy: bool
    sample: int
    prompt: str
    solution: str
    other: str
    students: tuple[str, str] = ("first", "second")


@dataclass(frozen=True)
class Judgement:
    """
    What a judge says of one pair.

    Args:
        problem (`int`):
            Index of the problem in its split.
        greedy (`bool`):
            Whether the greedy rollouts were compared.
        sample (`int`):
            Number of the sample.
        judge (`str`):
            Name of the judge.
        outcome (`str`, *optional*):
            `"win"`, `"tie"` or `"loss"` of the first student, `None` where there is no verdict.
        orders (`list[str | None]`):
            Outcome, for the first student too, in each order in which a model was asked: its solution first, then
            second. Empty where no model was asked.
        failures (`dict[str, int]`):
            How often each kind of failure happened, those that a retry cured included.
        students (`list[str]`):
            Names of the two.
    """

    problem: int
    greedy: bool
    sample: int
    judge: str
    outcome: Outcome | None
    orders: list[Outcome | None]
    failures: dict[str, int]
    students: list[str]

    @property
    def key(self) -> tuple[int, bool, int]:
        """What pairs it with another judge's judgement."""
        return self.problem, self.greedy, self.sample

    def to_json(self) -> str:
        """The judgement on one line."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> "Judgement":
        """
        Read [`~Judgement.to_json`]'s line.

        Raises:
            ValueError: If it is not a judgement: no JSON, a key missing or unknown, a value that cannot be.
        """
        record = json.loads(line)
        if not isinstance(record, dict) or record.keys() != {field.name for field in fields(cls)}:
            raise ValueError("A judgement is a JSON object with the fields of `Judgement`.")
        _check(record)
        return cls(**record)


class Judge(Protocol):
    """Anything that compares pairs of solutions."""

    name: str

    def judge(self, pairs: Sequence[Pair]) -> Iterator[Judgement]:
        """A judgement of each pair, in their order."""


def judgement(pair: Pair, judge: str, outcome: Outcome | None, **kwargs: Any) -> Judgement:
    """The judgement of a pair; `orders` and `failures` are empty unless given."""
    kwargs = {"orders": [], "failures": {}, "students": list(pair.students), **kwargs}
    return Judgement(pair.problem, pair.greedy, pair.sample, judge, outcome, **kwargs)


def write_judgements(judgements: Iterable[Judgement]) -> str:
    """The text of a judgements file, one a line."""
    return "".join(judgement.to_json() + "\n" for judgement in judgements)


def read_judgements(text: str) -> list[Judgement]:
    """
    Read a judgements file.

    Args:
        text (`str`):
            One judgement a line. A last line without its end was cut while it was written, and is left out.

    Returns:
        `list[Judgement]`: The judgements, in the file's order.

    Raises:
        ValueError: If another line is not a judgement; its number is named.
    """
    judgements = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            judgements.append(Judgement.from_json(line))
        except ValueError as error:
            raise ValueError(f"Line {number} is not a judgement: {error}") from error
    return judgements


def _check(record: dict[str, Any]) -> None:
    outcomes = (*OUTCOMES, None)
    orders, failures, students = record["orders"], record["failures"], record["students"]
    valid = {
        "problem": type(record["problem"]) is int,
        "greedy": type(record["greedy"]) is bool,
        "sample": type(record["sample"]) is int,
        "judge": isinstance(record["judge"], str),
        "outcome": record["outcome"] in outcomes,
        "orders": isinstance(orders, list) and len(orders) in (0, 2) and all(order in outcomes for order in orders),
        "failures": isinstance(failures, dict) and all(type(count) is int for count in failures.values()),
        "students": isinstance(students, list) and [type(name) for name in students] == [str, str],
    }
    for name, value in valid.items():
        if not value:
            raise ValueError(f"`{name}` of a judgement cannot be {record[name]!r}.")


def flipped(outcome: Outcome) -> Outcome:
    """The outcome for the other student."""
    return cast(Outcome, {"win": "loss", "tie": "tie", "loss": "win"}[outcome])
