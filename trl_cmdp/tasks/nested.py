"""Nested expressions with worked steps: a task where the steps have more than one correct order.

A problem joins four digits by `+` and `*`, every pair but the outermost one in parentheses, `(3+4)*(2+5)=`. It has at
least one `*`, and no value on the way to its result is above 99. A worked answer reduces one innermost pair after
another and then states the result, `3+4=7,2+5=7,7*7=49#49`. As with chained sums, reward alone cannot tell it from a
correct result behind wrong steps or none: [`valid_steps`] can.
"""

import re
from functools import lru_cache
from typing import Literal

from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from . import _embedded
from ._embedded import ALPHABET, check_request, draw, embedded_model, final_answer_reward, is_test


__all__ = [
    "MAX_COMPLETION_LENGTH",
    "demo_model_path",
    "final_answer_reward",
    "load_problems",
    "make_tokenizer",
    "valid_steps",
    "worked_solution",
]

# A problem and its answer, for `trl-cmdp tasks`.
SAMPLE_PROBLEM = ("(3+4)*(2+5)=", "49")
# The longest correct completion has 25 tokens and its EOS; the rest lets a wrong one come to its end.
MAX_COMPLETION_LENGTH = 32
_NUM_OPERANDS = 4
_MAX_VALUE = 99
_INNERMOST_PAIR = re.compile(r"\(([0-9]+)([+*])([0-9]+)\)")


def _apply(left: str, operator: str, right: str) -> int:
    return int(left) + int(right) if operator == "+" else int(left) * int(right)


@lru_cache(maxsize=_NUM_OPERANDS)
def _expressions(num_operands: int) -> dict[str, int]:
    """Every expression of so many operands, in parentheses all around, with its value."""
    if num_operands == 1:
        return {digit: int(digit) for digit in "123456789"}
    values = {}
    for num_left in range(1, num_operands):
        for left, left_value in _expressions(num_left).items():
            for right, right_value in _expressions(num_operands - num_left).items():
                for operator, value in (("+", left_value + right_value), ("*", left_value * right_value)):
                    if value <= _MAX_VALUE:
                        values[f"({left}{operator}{right})"] = value
    return values


@lru_cache(maxsize=2)
def _all_problems(split: str) -> dict[str, str]:
    answers = {f"{text[1:-1]}=": str(value) for text, value in _expressions(_NUM_OPERANDS).items() if "*" in text}
    return {prompt: answer for prompt, answer in answers.items() if is_test(prompt) == (split == "test")}


def _expression(prompt: str) -> str:
    # In parentheses, the outermost pair is reduced like all others.
    expression = shape = f"({prompt[:-1]})"
    while (reduced := re.sub(r"\([1-9][+*][1-9]\)", "1", shape)) != shape:
        shape = reduced
    if not prompt.endswith("=") or shape != "1":
        raise ValueError(f"Not a nested expression of the digits 1 to 9 such as '(3+4)*(2+5)=': {prompt!r}.")
    return expression


def load_problems(n: int, split: Literal["train", "test"], seed: int) -> Dataset:
    """Draws problems of one split, with the arguments and the columns of [`trl_cmdp.tasks.arithmetic.load_problems`]."""
    check_request(n, split, seed, splits=("train", "test"))
    answers = _all_problems(split)
    prompts = draw(tuple(answers), n, seed)
    return Dataset.from_dict({"prompt": prompts, "answer": [answers[prompt] for prompt in prompts]})


def worked_solution(prompt: str) -> str:
    """Writes the correct answer that shows every step and always reduces the leftmost innermost pair."""
    expression = _expression(prompt)
    steps = []
    while pair := _INNERMOST_PAIR.search(expression):
        result = str(_apply(*pair.groups()))
        steps.append(f"{pair[0][1:-1]}={result}")
        expression = expression[: pair.start()] + result + expression[pair.end() :]
    return f"{','.join(steps)}#{expression}"


def valid_steps(prompt: str, completion: str) -> bool:
    """
    Tells whether a completion writes every needed step without a mistake and with nothing else around it.

    Each step must reduce an innermost pair of what the steps before it have left. Pairs may be reduced in any order
    that this allows.
    """
    expression = _expression(prompt)
    steps, _, stated = completion.partition("#")
    for step in steps.split(","):
        written, _, result = step.partition("=")
        pair = _INNERMOST_PAIR.fullmatch(f"({written})")
        if pair is None or pair[0] not in expression or result != str(_apply(*pair.groups())):
            return False
        # Equal pairs have equal results, so it does not matter which of them a step means.
        expression = expression.replace(pair[0], result, 1)
    return expression == stated


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer of the task: one token per character, none added on its own."""
    return _embedded.make_tokenizer(f"{ALPHABET}*()")


def demo_model_path(name: Literal["teacher", "student"]) -> str:
    """
    Folder of an embedded demo model, trained by `examples/scripts/make_demo_models.py nested` on train problems only.

    `"teacher"` works its answers out and slips now and then; `"student"` often states a result at a glance behind wrong
    steps or none.
    """
    return embedded_model("nested_models", name)
