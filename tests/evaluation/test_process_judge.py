"""The programmatic process judge: equations that hold and follow, read from prose of many forms."""

import json
import re
import sys
from pathlib import Path

import pytest

from trl_cmdp.evaluation import judges
from trl_cmdp.evaluation.judges import Pair, ProcessJudge, process_verdict
from trl_cmdp.evaluation.judges.process import FREE_CONSTANTS, MAX_CHARACTERS, MAX_EQUATIONS, UNIT_CONSTANTS
from trl_cmdp.tasks.arithmetic import valid_steps


ROOT = Path(__file__).parents[2]

PROBLEM = (
    "Mia buys 3 shirts for $1,250 each and a half-price pair of shoes that cost $80. She pays 20% tax on the shirts. "
    "How much does she spend?"
)
SOLUTION = """The shirts cost 3 x $1,250 = $3,750.
The tax is 20% of 3750 = $750, or $3,750 * 20/100 = $750.
The shoes are $80 / 2 = $40.
In total, $3,750 + $750 + $40 = $4,540.
#### 4540"""


def counts(problem, completion):
    verdict = process_verdict(problem, completion)
    return verdict.num_equations, verdict.num_wrong, verdict.num_unsupported, verdict.final_derived


def test_a_correct_solution():
    assert counts(PROBLEM, SOLUTION) == (5, 0, 0, True)
    assert process_verdict(PROBLEM, SOLUTION).valid
    assert judges.valid_steps(PROBLEM, SOLUTION)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("= $3,750.", "= $3,760."), ("3 x $1,250", "5 x $750"), ("#### 4540", "#### 4550"), (SOLUTION, "")],
)
def test_steps_are_valid_only_if_they_hold_and_follow_to_the_answer(right, wrong):
    assert not judges.valid_steps(PROBLEM, SOLUTION.replace(right, wrong))


# The numbers 2 to 9, 15, 20 and 50 and a share are given; what is written must be read as so many equations that hold.
@pytest.mark.parametrize(
    ("written", "num_equations"),
    [
        ("5 * 3 = 15", 1),
        ("$5 * 3 = $15.", 1),
        ("$5*3=15$", 1),
        ("5 × 3 = 15 and 5 · 3 = 15", 2),
        ("5 x 3 = 15", 1),
        ("5 times 3 = 15, 15 divided by 3 = 5, 5 plus 3 = 8, 5 minus 3 = 2", 4),
        ("2+3=5*2=10", 2),
        ("3/4 * 20 = 15", 1),
        ("3/4 of 20 = 15 and half of 20 = 10", 2),
        ("half * 20 apples = 10", 1),
        ("20% of 50 = 10", 1),
        ("0.2 * 50 = 10.0", 1),
        ("50 * 20% = 10 and 2/4*100% = 50% and 50% * 20% = 10%", 3),
        ("2 / 3 = 0.67 and 2 / 3 = 0.667", 2),
        ("2 / 3 ≈ 1", 1),
        ("20 - -5 = 25 and 3 - 5 = -2", 2),
        ("2(3+4) = 14 and (2)(7) = 14 and 2*(3 + (9 - 5)) = 14", 3),
        ("2^3 = 8 and 3**2 = 9 and 3² = 9", 3),
        ("20 ÷ 5/2 = 8", 1),
        ("1 1/2 * 4 = 6", 1),
        ("½ × 20 = 10", 1),
        ("**5 * 3 = 15**", 1),
        ("5 * 3 = <<5*3=15>>15", 1),
        (r"\[ 5 \times 3 = 15 \] and \(\frac{20}{5} = \text{4 apples}\) and $\boxed{5 \cdot 3 = 15}$", 3),
        ("6 days/week * 2 weeks/month = 12 days/month", 1),
        ("9 skeins per shawl + 4 skeins per hat = 13 skeins of wool.", 1),
        ("Out of the 6 liters, 6 x 0.5 = 3.0 liters are water.", 1),
        ("In 15 minutes she does 5 - 3 = 2 tasks, and then 20 more = 20.", 1),
        ("1. Start:\n   - So 20 apples - 5 eaten = 15 apples\n2) 15 / 3 = 5", 2),
        ("the 2 friends (with 5 apples), that is 5 * 2 = 10 (in total)", 1),
        ("(5 * 3 = 15)", 1),
        ("a 5-minute show * 3 = 15 minutes", 1),
        ("The 3rd day: 5 + 3 = 8", 1),
        ("Cost of 3 shirts = 3 * 5 = 15", 1),
        ("Total = 15", 0),
        ("2x + 5 = 15, y = x + 3, so 2x = 10, 140 + T = 196", 0),
        ("1 hour = 60 minutes", 0),
        ("5 * 12 inches = 60 inches = 5 feet", 1),
        ("5 >= 3 and 5 != 3 and 5 => 3", 0),
    ],
)
def test_forms_of_an_equation(written, num_equations):
    problem = "2 3 4 5 6 7 8 9 10 15 20 50 days, 20%, 12 inches, 0.2, 13, 0.667"
    verdict = process_verdict(problem, written)
    assert (verdict.num_equations, verdict.num_wrong, verdict.num_unsupported) == (num_equations, 0, 0)


@pytest.mark.parametrize(
    "written",
    [
        "5 * 3 = 16",
        "2+3=5*2=11",
        "2+3=6*2=12",
        "2+3=5=6",
        "2 / 3 = 0.66",
        "7 / 2 = 3",
        "7 / 2 = 4",
        "20% of 50 = 11",
        "5 / (3 - 3) = 0",
        "5 * 3 = 1,5",
        "2(3+4) = 10",
        "20 - 5 - 3 = 18",
        "2 + 3 * 4 = 20",
    ],
)
def test_wrong_equations(written):
    assert process_verdict("2 3 4 5 6 7 20 50 20%", written).num_wrong == 1


@pytest.mark.parametrize(
    "written",
    [
        "9**9**9 = 5",
        "\n".join(f"{i} + {i + 1} = {2 * i + 1}" for i in range(400)),
        "\n".join(" + ".join(map(str, range(i, i + 100))) + " = 5" for i in range(20)),
        "9^9999999 * 2 = 5",
        "9" * 3000 + " * 9 = 5",
        "(" * 3000 + "5 * 3" + ")" * 3000 + " = 15",
        "2 * " * 1000 + "2 = 5",
        "(1)" * 1500 + " = 1",
        "-" * 2000 + "5 = 5",
        "=" * 6000,
        "1/" * 2000 + " = 1",
        "5 + ".join(["<<(½ of \\frac{"] * 600) + "=",
        "__import__('os').abort() = 5 * 1",
        "\ud800 5 * 3 = 15 \x00 ٣ * ٣ = ٩",
    ],
)
def test_hostile_text_is_bounded(written):
    calls = 0
    process_verdict("9 apples", "")  # the regular expressions are compiled once

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        process_verdict("9 apples", written)
    finally:
        sys.setprofile(None)
    assert calls < 1000 + 20 * len(written)  # arithmetic with fractions is calls too


def test_what_is_read_is_bounded():
    def read(written):
        return process_verdict("1 2", written).num_equations

    assert read("1 + 1 = 2\n" * (MAX_EQUATIONS + 50)) == MAX_EQUATIONS
    assert read(" " * MAX_CHARACTERS + "1 + 1 = 2") == 0
    # Values as well: what is too large does not hold, whatever is written after it.
    assert [process_verdict("2", f"2^{power} = {2**power}").num_wrong for power in (16, 17)] == [0, 1]
    large = " * ".join(["2^16"] * 40)
    assert process_verdict("2", f"{large} = {large}").num_wrong == 1


@pytest.mark.parametrize(
    ("problem", "written"),
    [
        ("She has twenty-five and three hundred.", "25 + 300 = 325"),
        ("Half of a dozen", "1/2 * 12 = 6"),
        ("A third of 30", "30 * 1/3 = 10 and 30 / 3 = 10"),
        ("two thirds of 30", "30 * 2/3 = 20"),
        ("30% of 200", "0.3 * 200 = 60 and 30/100 * 200 = 60 and 0.7 * 200 = 140"),
        ("30 percent of 200", "0.3 * 200 = 60"),
        ("1/4 of 200", "0.25 * 200 = 50 and 3/4 * 200 = 150"),
        ("It costs 95 cents", "2 * 0.95 = 1.9"),
        ("Each of 4 weeks", "4 * 7 = 28"),
        ("$2.69, rounded to the nearest dollar, for 15", "15 * 3 = 45"),
        ("1,200 people and 5 more", "1200 + 5 = 1205 and 1205 - 5 = 1200"),
        ("5 and 8", "5 / 8 = 0.625 and 8 * 0.63 = 5.04"),
    ],
)
def test_what_an_operand_may_be(problem, written):
    verdict = process_verdict(problem, written)
    assert verdict.num_equations == written.count("=")
    assert (verdict.num_wrong, verdict.num_unsupported) == (0, 0)


@pytest.mark.parametrize(
    ("problem", "written"),
    [
        ("5 apples and 3 pears", "5 * 4 = 20"),
        ("5 apples and 3 pears", "5 + 9 = 14 and 14 + 3 = 17"),
        ("5 apples and 3 pears", "8 - 3 = 5"),  # an earlier result only when it is earlier
        ("5 apples", "5 * 7 = 35"),  # days of a week, in a problem without any
    ],
)
def test_an_operand_from_nowhere(problem, written):
    assert process_verdict(problem, written).num_unsupported == 1


def test_the_final_answer_must_be_derived():
    assert not process_verdict(PROBLEM, SOLUTION.replace("#### 4540", "#### 4541")).valid
    assert process_verdict(PROBLEM, SOLUTION.replace("#### 4540", r"\boxed{\$4,540}")).final_derived
    assert process_verdict(PROBLEM, SOLUTION.replace("#### 4540", "She spends $4,540.00.")).final_derived
    assert not process_verdict(PROBLEM, SOLUTION.replace("#### 4540", "Some 7 things.")).final_derived
    assert counts(PROBLEM, "#### 4540") == (0, 0, 0, False)
    assert counts(PROBLEM, "") == (0, 0, 0, False)


def outcome(solution, other, **kwargs):
    (judgement,) = ProcessJudge(**kwargs).judge([Pair(0, True, 0, PROBLEM, solution, other)])
    return judgement.outcome


def test_the_better_verdict_wins():
    wrong, none = SOLUTION.replace("$4,540.", "$4,541."), "#### 4540"
    unsupported = SOLUTION.replace("$80 / 2", "$90 - 50")
    underived = SOLUTION.replace("#### 4540", "#### 4")
    # Best to worst; the final answer of `none` is correct, and its reasoning still loses.
    ranked = [SOLUTION, underived, unsupported, wrong, none]
    for i, better in enumerate(ranked):
        assert outcome(better, better + " ") == "tie"
        for worse in ranked[i + 1 :]:
            assert outcome(better, worse) == "win"
            assert outcome(worse, better) == "loss"


def test_a_task_brings_its_own_judge():
    (judgement,) = ProcessJudge(valid_steps).judge([Pair(0, True, 0, "7+5=", "7+5=12#12", "#12")])
    assert judgement.outcome == "win"
    assert judgement.orders == []


def test_documented_constants_and_rates_are_those_of_the_code_and_the_benchmark():
    page = (ROOT / "docs" / "judges.md").read_text()
    constants = re.search(r"^Constants: .*$", page, re.MULTILINE)[0]
    numbers = {str(number) for numbers in (FREE_CONSTANTS, *UNIT_CONSTANTS.values()) for number in numbers}
    assert set(re.findall(r"\d+(?:/\d+)?", constants)) == numbers
    rates = json.loads((ROOT / "benchmarks" / "results" / "process_judge.json").read_text())["accepted"]
    assert len(rates) == 4
    for rate in rates.values():
        share = "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * value for value in (rate["rate"], *rate["interval"])))
        assert f"| {rate['k']} / {rate['n']} | {share} |" in page
