"""Worked solutions of the embedded tasks, and the checks that tell valid steps from a correct answer alone."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_cmdp.tasks import arithmetic, chains, nested


SUM, WORKED_SUM = "7+5+9+3+8=", "7+5=12,12+9=21,21+3=24,24+8=32#32"
NESTED, WORKED_NESTED = "(3+4)*(2+5)=", "3+4=7,2+5=7,7*7=49#49"

digits = st.sampled_from("123456789")
sums = st.lists(digits, min_size=2, max_size=6).map(lambda digits: "+".join(digits) + "=")
expressions = st.recursive(
    st.tuples(digits, st.sampled_from("+*"), digits),
    lambda pairs: st.tuples(pairs | digits, st.sampled_from("+*"), pairs | digits),
    max_leaves=3,
)


def write(expression):
    """Text of nested tuples, every pair but the outermost one in parentheses."""
    sides = [f"({write(side)})" if isinstance(side, tuple) else side for side in (expression[0], expression[2])]
    return expression[1].join(sides)


problems = sums.map(lambda prompt: (arithmetic, prompt)) | expressions.map(
    lambda expression: (nested, write(expression) + "=")
)


def rejected(worked, **others):
    """What no task accepts around or in place of its worked solution, and more of one task, by name."""
    answer = worked[worked.index("#") :]
    shared = {
        "no steps": answer,
        "empty": "",
        "mark repeated": worked + answer,
        "answer first": answer + worked,
        "text after": worked + ",",
        "newline after": worked + "\n",
        "text before": " " + worked,
        "empty step": worked.replace("#", ",#"),
        "leading zero": worked.replace("=", "=0", 1),
        "foreign digit": worked.replace(worked[0], chr(ord(worked[0]) - ord("0") + ord("\N{FULLWIDTH DIGIT ZERO}"))),
        "no answer": worked.removesuffix(answer),
        "wrong answer": worked.replace("#", "#1"),
        "step repeated": worked[: worked.index(",") + 1] + worked,
    }
    return [pytest.param(completion, id=name) for name, completion in {**shared, **others}.items()]


@pytest.mark.parametrize(
    ("task", "prompt", "completion"),
    [
        (arithmetic, SUM, WORKED_SUM),
        (arithmetic, "1+9=", "1+9=10#10"),
        (chains, "7+5+9+3+8+6=", "7+5=12,12+9=21,21+3=24,24+8=32,32+6=38#38"),
        (nested, NESTED, WORKED_NESTED),
        (nested, "2*3=", "2*3=6#6"),
        (nested, "((3+4)*2)+5=", "3+4=7,7*2=14,14+5=19#19"),
        (nested, "(3+(4*2))+5=", "4*2=8,3+8=11,11+5=16#16"),
        (nested, "3*(4+(2*5))=", "2*5=10,4+10=14,3*14=42#42"),
        (nested, "(1+2)*(1+2)=", "1+2=3,1+2=3,3*3=9#9"),
    ],
)
def test_worked_solution(task, prompt, completion):
    assert task.worked_solution(prompt) == completion
    assert task.valid_steps(prompt, completion)


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        (NESTED, "2+5=7,3+4=7,7*7=49#49"),
        ("((1+2)*(3+4))+(5*6)=", "5*6=30,3+4=7,1+2=3,3*7=21,21+30=51#51"),
        ("((1+2)*(3+4))+(5*6)=", "3+4=7,1+2=3,3*7=21,5*6=30,21+30=51#51"),
    ],
)
def test_nested_pairs_may_be_reduced_in_any_possible_order(prompt, completion):
    assert completion != nested.worked_solution(prompt)
    assert nested.valid_steps(prompt, completion)


@pytest.mark.parametrize(
    "completion",
    rejected(
        WORKED_SUM,
        **{
            "corrupted result": "7+5=13,12+9=21,21+3=24,24+8=32#32",
            "corrupted operand": "7+5=12,12+8=20,21+3=24,24+8=32#32",
            "consistent from a wrong result": "7+5=13,13+9=22,22+3=25,25+8=33#32",
            "consistent up to a wrong answer": "7+5=13,13+9=22,22+3=25,25+8=33#33",
            "last step skipped": "7+5=12,12+9=21,21+3=24#32",
            "first step skipped": "12+9=21,21+3=24,24+8=32#32",
            "two steps in one": "7+5=12,12+12=24,24+8=32#32",
            "steps reordered": "12+9=21,7+5=12,21+3=24,24+8=32#32",
            "operands reordered": "7+9=16,16+5=21,21+3=24,24+8=32#32",
            "sides exchanged": "5+7=12,12+9=21,21+3=24,24+8=32#32",
            "extra step": "7+5=12,12+9=21,21+3=24,24+8=32,32+0=32#32",
            "prompt repeated": SUM + WORKED_SUM,
        },
    ),
)
def test_sums_reject(completion):
    assert not arithmetic.valid_steps(SUM, completion)


@pytest.mark.parametrize(
    "completion",
    rejected(
        WORKED_NESTED,
        **{
            "corrupted result": "3+4=8,2+5=7,7*7=49#49",
            "corrupted operand": "3+5=8,2+5=7,7*7=49#49",
            "corrupted operator": "3*4=7,2+5=7,7*7=49#49",
            "tens digit missing": "3+4=7,2+5=7,7*7=9#49",
            "consistent from a wrong result": "3+4=8,2+5=7,8*7=56#49",
            "consistent up to a wrong answer": "3+4=8,2+5=7,8*7=56#56",
            "last step skipped": "3+4=7,2+5=7#49",
            "first step skipped": "2+5=7,7*7=49#49",
            "one of two equal results skipped": "3+4=7,7*7=49#49",
            "unfinished expression stated": "3+4=7,2+5=7#7*7",
            "step before those it needs": "7*7=49,3+4=7,2+5=7#49",
            "pair across parentheses": "4*2=8,3+4=7,2+5=7,7*7=49#49",
            "parentheses written": "(3+4)=7,2+5=7,7*7=49#49",
            "two steps in one": "3+4=7,(7)*(2+5)=49#49",
            "sides exchanged": "4+3=7,2+5=7,7*7=49#49",
            "extra step": WORKED_NESTED.replace("#", ",49*1=49#"),
            "result repeated": WORKED_NESTED.replace("#", "=49#"),
            "prompt repeated": NESTED + WORKED_NESTED,
        },
    ),
)
def test_nested_rejects(completion):
    assert not nested.valid_steps(NESTED, completion)


@given(problems)
def test_a_worked_solution_is_always_valid_and_correct(problem):
    task, prompt = problem
    completion = task.worked_solution(prompt)
    assert task.valid_steps(prompt, completion)
    # Checked without the writer: each step holds, there is one for each operator, and the value is Python's.
    steps, stated = completion.split("#")
    for step in steps.split(","):
        pair, result = step.split("=")
        assert eval(pair) == int(result)
    assert len(steps.split(",")) == len(re.findall("[+*]", prompt))
    assert int(stated) == eval(prompt.removesuffix("="))
    assert task.final_answer_reward([completion], [stated]) == [1.0]


@given(problems, st.data())
def test_any_corrupted_digit_is_not_valid(problem, data):
    task, prompt = problem
    completion = task.worked_solution(prompt)
    position = data.draw(st.sampled_from([i for i, c in enumerate(completion) if c.isdigit()]))
    digit = data.draw(st.sampled_from([d for d in "0123456789" if d != completion[position]]))
    assert not task.valid_steps(prompt, completion[:position] + digit + completion[position + 1 :])


@pytest.mark.parametrize("prompt", ["", "7+5", "7=", "7+0=", "12+5=", "7+5=12", "7-5=", "7+5=\n"])
@pytest.mark.parametrize(("task", "message"), [(arithmetic, "Not a sum"), (nested, "Not a nested expression")])
def test_a_malformed_prompt_is_an_error(task, message, prompt):
    with pytest.raises(ValueError, match=message):
        task.worked_solution(prompt)


@pytest.mark.parametrize("prompt", ["=", "7+5+9=", "(7+5)=", "(7+5=", "7+(5)=", "(7+5)(3)="])
def test_a_malformed_nested_prompt_is_an_error(prompt):
    with pytest.raises(ValueError, match="Not a nested expression"):
        nested.valid_steps(prompt, WORKED_NESTED)


def test_nested_problems_are_of_every_shape_and_of_small_values():
    prompts = nested.load_problems(500, "test", seed=0)["prompt"]
    shapes = {re.sub("[+*]", ".", re.sub("[1-9]", "d", prompt)) for prompt in prompts}
    assert shapes == {"((d.d).d).d=", "(d.(d.d)).d=", "(d.d).(d.d)=", "d.((d.d).d)=", "d.(d.(d.d))="}
    for prompt in prompts:
        assert "*" in prompt
        assert all(int(result) <= 99 for result in re.findall("=([0-9]+)", nested.worked_solution(prompt)))


@pytest.mark.parametrize(
    ("task", "prompts"),
    [
        (arithmetic, ["9+9+9+9+9="]),
        (chains, ["9+9+9+9+9+9+9+9="]),
        (nested, nested.load_problems(28_015, "test", seed=0)["prompt"]),
    ],
    ids=["arithmetic", "chains", "nested"],
)
def test_correct_completions_fit_with_room_to_spare(task, prompts):
    assert max(len(task.worked_solution(prompt)) for prompt in prompts) + 1 < task.MAX_COMPLETION_LENGTH
