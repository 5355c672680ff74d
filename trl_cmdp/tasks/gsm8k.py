r"""GSM8K (arXiv 2110.14168): grade-school word problems with worked solutions, `openai/gsm8k` on the Hub."""

import re
from typing import Literal

from datasets import Dataset

from ._verify import final_answer_reward
from .table import check_columns, check_text, draw, open_split


__all__ = ["INSTRUCTION", "MAX_COMPLETION_LENGTH", "final_answer_reward", "load_problems"]

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
# A problem and its answer, for `trl-cmdp tasks`.
SAMPLE_PROBLEM = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips did "
    "Natalia sell altogether in April and May?",
    "72",
)
MAX_COMPLETION_LENGTH = 512
_PATH = "openai/gsm8k"
_ANNOTATION = re.compile(r"<<[^<>]*>>")


def load_problems(
    n: int | None,
    split: Literal["train", "test"],
    seed: int,
    *,
    conversational: bool = False,
    path: str | None = None,
) -> Dataset:
    r"""
    Loads problems of one split: 7,473 train and 1,319 test problems.

    Args:
        n (`int` or `None`):
            Number of problems, at least 1, or `None` for the whole split.
        split (`str`):
            Either `"train"` or `"test"`.
        seed (`int`):
            Seed of the order. The problems of a smaller `n` are the first ones of a larger `n` at the same seed.
        conversational (`bool`, *optional*, defaults to `False`):
            Prompts as messages. As text they are `"Question: ...\nAnswer:"`, with the instruction after the question
            in both.
        path (`str`, *optional*):
            Local folder or file of the same columns (`question`, `answer`), in place of the Hub.

    Returns:
        `datasets.Dataset`: Dataset with the columns `prompt`, `answer`, `difficulty` (number of steps: the lines of
        the solution before its last, `#### ` and the answer) and `solution` (without calculator annotations).

    Raises:
        ValueError: If there is no such split or column, `n` is larger than the split, or a row has no
            question.
    """
    path = path or _PATH
    rows = open_split(path, split, "main" if path == _PATH else None)
    check_columns(rows, ["question", "answer"], path)
    check_text(rows, "question", path)
    problems = []
    for row in draw(rows, n, seed):
        solution = _ANNOTATION.sub("", row["answer"] or "").strip()
        steps, mark, answer = solution.rpartition("####")
        if not mark or not answer.strip():
            raise ValueError(f"A solution of {path!r} has no '####' with an answer after it: {solution[-80:]!r}.")
        problems.append(
            {
                "prompt": _prompt(row["question"], conversational),
                "answer": answer.strip(),
                "difficulty": str(sum(bool(line.strip()) for line in steps.splitlines())),
                "solution": solution,
            }
        )
    return Dataset.from_list(problems)


def _prompt(question: str, conversational: bool) -> str | list[dict[str, str]]:
    if conversational:
        return [{"role": "user", "content": f"{question}\n{INSTRUCTION}"}]
    return f"Question: {question}\n{INSTRUCTION}\nAnswer:"
