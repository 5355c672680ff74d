"""The programmatic process judge: the equations that a solution writes must hold, and follow.

It judges the written reasoning, not the final answer: a wrong answer can be reached by equations that all hold (of the
wrong quantities), and a correct one without any.
"""

import itertools
import re
from bisect import bisect, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from ._equations import Side, normalise, read_chains, read_numbers, read_word_numbers
from .records import Judgement, Pair, judgement


MAX_CHARACTERS = 20_000  # of a completion; the rest is not read
MAX_EQUATIONS = 200  # likewise
_ROUNDING = Fraction(1, 10**9)  # relative: what binary floating point leaves in a decimal

# Numbers that need no source: one of something, a pair and its average.
FREE_CONSTANTS = (Fraction(1), Fraction(2), Fraction(1, 2))
# Numbers that need none where the problem names their unit.
UNIT_CONSTANTS = {
    r"%|percent|cents?\b|dollar|[$€£¥₹]|met(?:er|re)": (100,),
    r"second|minute|hour": (60, 3600),
    r"\bda(?:y|ily)|hour": (24,),
    r"\bda(?:y|ily)|week": (7,),
    r"week|month": (4,),
    r"week|year|annual": (52,),
    r"month|year|annual": (12,),
    r"\bda(?:y|ily)|month": (30,),
    r"\bda(?:y|ily)|year|annual": (365,),
    r"dozen|inch|f(?:oo|ee)t\b": (12,),
    r"yard|f(?:oo|ee)t\b": (3,),
    r"ounce|pound": (16,),
    r"kilo|milli|gram|lit(?:er|re)|met(?:er|re)|\b(?:kg|km|ml|mm)\b": (1000,),
    r"\bdecade|milli|centi": (10,),
}

_PERCENT_READINGS = (Fraction(1, 100), Fraction(1))
_FINAL_ANSWER = (re.compile(r"####\s*(.+)"), re.compile(r"\\boxed\s*\{([^{}]*)\}"))


@dataclass(frozen=True)
class ProcessVerdict:
    """What the process judge found in one solution."""

    num_equations: int  # equations that compute something, each link of a chain `2 + 3 = 5 * 2 = 10` by itself
    num_wrong: int  # those that do not hold
    num_unsupported: int  # those with an operand that is neither in the problem, nor an earlier result, nor a constant
    final_derived: bool  # whether the final answer is a value of one of the equations

    @property
    def valid(self) -> bool:
        """Whether there are equations, all hold and follow, and the final answer is one of their results."""
        return self.num_equations > 0 and self.num_wrong == self.num_unsupported == 0 and self.final_derived

    @property
    def order(self) -> tuple[bool, Fraction, Fraction, bool]:
        """
        What the better verdict has more of, first to last: some equation, a share of equations that hold, a share
        that follow, a final answer that is derived.
        """
        count = max(1, self.num_equations)
        return (
            self.num_equations > 0,
            1 - Fraction(self.num_wrong, count),
            1 - Fraction(self.num_unsupported, count),
            self.final_derived,
        )


class ProcessJudge:
    """
    Compares the written steps of two solutions: the better verdict wins, equal ones are a tie.

    Args:
        valid_steps (`Callable[[str, str], bool]`, *optional*):
            Judge of one solution, called with the problem and the solution: the `valid_steps` of an embedded task. If
            `None`, [`process_verdict`] judges, by the order of [`ProcessVerdict.order`].
    """

    name = "process"

    def __init__(self, valid_steps: Callable[[str, str], bool] | None = None):
        self._valid_steps = valid_steps

    def judge(self, pairs: Sequence[Pair]) -> Iterator[Judgement]:
        """A judgement of each pair, in their order."""
        for pair in pairs:
            mine, others = (self._order(pair.prompt, solution) for solution in (pair.solution, pair.other))
            yield judgement(pair, self.name, "tie" if mine == others else "win" if mine > others else "loss")

    def _order(self, problem: str, solution: str) -> tuple[bool | Fraction, ...]:
        if self._valid_steps is not None:
            return (self._valid_steps(problem, solution),)
        return process_verdict(problem, solution).order


def process_verdict(problem: str, completion: str) -> ProcessVerdict:
    """Judges the written equations of one solution to a word problem."""
    completion = completion[:MAX_CHARACTERS]
    known = sorted(_given(problem))  # sorted, so that a number is looked up and not searched for
    derived: set[Fraction] = set()
    num_equations = num_wrong = num_unsupported = 0
    links = (link for sides in read_chains(normalise(completion)) for link in _links(sides))
    for left, right in itertools.islice(links, MAX_EQUATIONS):
        num_equations += 1
        num_wrong += not _holds(left, right)
        supported = _supported(left, known)
        _learn(known, values := _values(left))
        num_unsupported += not (supported and (right.bare or _supported(right, known)))
        _learn(known, more := _values(right))
        derived |= values | more
    answer = _final_answer(completion)
    return ProcessVerdict(
        num_equations,
        num_wrong,
        num_unsupported,
        any(_close(value, answer) for value in derived if answer is not None),
    )


def valid_steps(problem: str, completion: str) -> bool:
    """Whether [`process_verdict`] finds nothing wrong with a solution: the check of steps for word problems."""
    return process_verdict(problem, completion).valid


def _given(problem: str) -> Iterator[Fraction]:
    """Numbers that an equation may use at the start."""
    text = normalise(problem)
    yield from FREE_CONSTANTS
    for unit, constants in UNIT_CONSTANTS.items():
        if re.search(unit, problem, re.IGNORECASE):
            yield from map(Fraction, constants)
    yield from read_word_numbers(text)
    cents = re.search(r"\bcents?\b|¢", problem) is not None
    percents, rounded = "percent" in text, "round" in text
    for number in read_numbers(text):
        value = number.value
        yield value
        if rounded:  # "rounds all prices to the nearest dollar"
            yield Fraction(int(value + Fraction(1, 2)))
        if number.percent or percents:
            for share in (value / 100, 1 - value / 100, 1 + value / 100):
                yield from (share, 100 * share)
        if cents:
            yield value / 100
    for numerator, denominator in re.findall(r"(?<![0-9./])([0-9]{1,6})/([0-9]{1,6})(?![0-9./])", text):
        if int(denominator):
            value = Fraction(int(numerator), int(denominator))
            yield from (value, 1 - value)


def _links(sides: list[Side]) -> Iterator[tuple[Side, Side]]:
    """Neighbouring sides of a chain that are to be equal."""
    for i, (left, right) in enumerate(itertools.pairwise(sides)):
        if not (left.readable and right.readable):
            continue  # a name, or an equation in a variable
        if left.bare and right.bare and (i == 0 or left.unit != right.unit):
            continue  # "1 hour = 60 minutes"
        if i == 0 and left.bare:
            continue  # "Cost of 3 shirts = 3 * 15": what is before the first sign is its name
        yield left, right


def _holds(left: Side, right: Side) -> bool:
    """Whether a link holds, with `%` read as 1/100 throughout or as a unit throughout."""
    for percent in _PERCENT_READINGS:
        a, b = left.value(percent), right.value(percent)
        if a is None or b is None:  # such as a division by zero
            continue
        if not right.bare and right.tokens[0].kind == "number" and _close(a, right.tokens[0].value):
            return True  # "2 + 3 = 5 * 2 = 10", written on: the next equation starts with the result
        tolerance = _ROUNDING * max(abs(a), abs(b))
        for side in (left, right):
            if side.bare:
                number = next(token for token in side.tokens if token.kind == "number")
                # "2 / 3 = 0.67" is rounded to what is written; an integer is only after ≈.
                if number.decimals or right.approximate:
                    step = Fraction(1, 10**number.decimals) * (percent if number.percent else 1)
                    tolerance = max(tolerance, step / 2)
        if abs(a - b) <= tolerance:
            return True
    return False


def _learn(known: list[Fraction], values: set[Fraction]) -> None:
    for value in values:
        insort(known, value)


def _supported(side: Side, known: list[Fraction]) -> bool:
    """Whether each number has a source. Numerator and denominator have one where their quotient has."""
    tokens = side.tokens
    parts_of_fractions = {
        i + offset
        for i, (a, operator, b) in enumerate(zip(tokens, tokens[1:], tokens[2:], strict=False))
        if a.kind == b.kind == "number" and operator.text == "/" and b.value and _is_known(a.value / b.value, 0, known)
        for offset in (0, 2)
    }
    return all(
        i in parts_of_fractions
        or _is_known(token.value, token.decimals, known)
        or (token.percent and _is_known(token.value / 100, token.decimals + 2, known))
        for i, token in enumerate(tokens)
        if token.kind == "number"
    )


def _is_known(value: Fraction, decimals: int, known: list[Fraction]) -> bool:
    tolerance = Fraction(1, 2 * 10**decimals) if decimals else Fraction(0)
    index = bisect(known, value)
    nearest = known[max(0, index - 1) : index + 1]
    return any(abs(value - other) <= max(tolerance, _ROUNDING * abs(other)) for other in nearest)


def _values(side: Side) -> set[Fraction]:
    values = (side.value(percent) for percent in _PERCENT_READINGS)
    return {abs(value) for value in values if value is not None}


def _final_answer(completion: str) -> Fraction | None:
    """The marked final answer, `#### 12` or `\\boxed{12}`, else the last number."""
    for pattern in _FINAL_ANSWER:
        if marked := pattern.findall(completion):
            completion = marked[-1]
            break
    numbers = list(read_numbers(normalise(completion)))
    return numbers[-1].value if numbers else None


def _close(a: Fraction, b: Fraction) -> bool:
    return abs(a - b) <= _ROUNDING * max(abs(a), abs(b))
