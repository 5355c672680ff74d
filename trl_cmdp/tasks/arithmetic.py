"""Chained sums with worked steps: a task small enough to be trained on a CPU in minutes.

A problem is a sum of five digits, `7+5+9+3+8=`. A worked answer adds them one by one and then states the result,
`7+5=12,12+9=21,21+3=24,24+8=32#32`. An answer may also skip the steps, `#32`, or reach the correct result through
wrong steps: reward alone cannot tell these apart, [`valid_steps`] can.
"""

import itertools
import re
from functools import lru_cache
from typing import Literal

from datasets import Dataset

from ._embedded import check_request, draw, embedded_model, final_answer_reward, is_test, make_tokenizer


__all__ = [
    "MAX_COMPLETION_LENGTH",
    "demo_model_path",
    "final_answer_reward",
    "load_problems",
    "make_tokenizer",
    "valid_steps",
    "worked_solution",
]

NUM_OPERANDS = 5
# A problem and its answer, for `trl-cmdp tasks`.
SAMPLE_PROBLEM = ("7+5+9+3+8=", "32")
# The longest correct completion has 33 tokens and its EOS; the rest lets a wrong one come to its end.
MAX_COMPLETION_LENGTH = 40
_PROMPT = re.compile(r"[1-9](\+[1-9])+=")


@lru_cache(maxsize=2)
def _all_problems(split: str) -> tuple[str, ...]:
    prompts = ("+".join(digits) + "=" for digits in itertools.product("123456789", repeat=NUM_OPERANDS))
    return tuple(prompt for prompt in prompts if is_test(prompt) == (split == "test"))


def operands(prompt: str) -> list[int]:
    """The numbers that a problem adds."""
    if not _PROMPT.fullmatch(prompt):
        raise ValueError(f"Not a sum of the digits 1 to 9 such as '7+5+9+3+8=': {prompt!r}.")
    return [int(digit) for digit in prompt[:-1].split("+")]


def load_problems(n: int, split: Literal["train", "test"], seed: int) -> Dataset:
    """
    Draws problems of one split.

    Whether a problem belongs to the train or to the test split (about one in five) is decided by a hash of its text,
    so the two never meet, whatever the seed. Problems come in random order without replacement. Only when `n` is
    larger than the whole split does a second pass over it begin, in a new order.

    Args:
        n (`int`):
            Number of problems, at least 1.
        split (`str`):
            Either `"train"` or `"test"`.
        seed (`int`):
            Seed of the order. The problems of a smaller `n` are the first ones of a larger `n` at the same seed.

    Returns:
        `datasets.Dataset`: Dataset with the string columns `prompt` and `answer`.
    """
    check_request(n, split, seed, splits=("train", "test"))
    prompts = draw(_all_problems(split), n, seed)
    return Dataset.from_dict({"prompt": prompts, "answer": [str(sum(operands(prompt))) for prompt in prompts]})


def worked_solution(prompt: str) -> str:
    """Writes the one correct answer that shows every step."""
    total, *rest = operands(prompt)
    steps = []
    for operand in rest:
        steps.append(f"{total}+{operand}={total + operand}")
        total += operand
    return f"{','.join(steps)}#{total}"


def valid_steps(prompt: str, completion: str) -> bool:
    """
    Tells whether a completion writes every needed step, in order, without a mistake and with nothing else around it.
    """
    # The prompt fixes the order of the additions, hence every character of a valid answer.
    return completion == worked_solution(prompt)


def demo_model_path(name: Literal["teacher", "student"]) -> str:
    """
    Folder of an embedded demo model, trained by `examples/scripts/make_demo_models.py` on train problems only.

    `"teacher"` works its answers out and slips now and then; `"student"` often reaches the correct answer through wrong
    steps or none.
    """
    return embedded_model("arithmetic_models", name)
