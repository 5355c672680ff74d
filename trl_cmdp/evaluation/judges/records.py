"""What judges compare and what they say: typed, one judgement a line, so that rates need no model."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Protocol, cast

from .._lines import parse_json


Outcome = Literal["win", "tie", "loss"]

OUTCOMES: tuple[Outcome, ...] = ("win", "tie", "loss")


@dataclass(frozen=True)
class Pair:
    """Two solutions of one problem."""

    problem: int  # index of the problem in its split
    greedy: bool  # whether they are the greedy rollouts
    sample: int  # number of the sample
    prompt: str  # text of the problem
    solution: str  # solution of the student whose win is a win
    other: str  # solution of the other student
    students: tuple[str, str] = ("first", "second")  # names of the two. No model is told


@dataclass(frozen=True)
class Judgement:
    """What a judge says of one pair."""

    problem: int  # index of the problem in its split
    greedy: bool  # whether the greedy rollouts were compared
    sample: int  # number of the sample
    judge: str  # name of the judge
    outcome: Outcome | None  # `"win"`, `"tie"` or `"loss"` of the first student, `None` where there is no verdict
    # Outcome, for the first student too, in each order in which a model was asked: its solution first, then second.
    # Empty where no model was asked
    orders: list[Outcome | None]
    failures: dict[str, int]  # how often each kind of failure happened, those that a retry cured included
    students: list[str]  # names of the two

    @property
    def key(self) -> tuple[int, bool, int]:
        """What pairs it with another judge's judgement."""
        return self.problem, self.greedy, self.sample

    def to_json(self) -> str:
        """The judgement on one line."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> "Judgement":
        """Read [`~Judgement.to_json`]'s line."""
        record = parse_json(line)
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
    """Read a judgements file."""
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
