r"""MATH (arXiv 2103.03874): competition problems in LaTeX, by level and subject, and its subset MATH-500.

The original repository is no longer on the Hub; `DigitalLearningGmbH/MATH-lighteval` is the copy that lm-eval and verl
point to, with the same 7,500 train and 5,000 test problems. MATH-500 (`HuggingFaceH4/MATH-500`) is 500 of these test
problems, so no train problem is among them.
"""

from typing import Literal

from datasets import Dataset

from ._verify import final_answer_reward, last_boxed
from .table import check_columns, check_text, draw, open_split


__all__ = ["INSTRUCTION", "MAX_COMPLETION_LENGTH", "final_answer_reward", "load_problems"]

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
# A problem and its answer, for `trl-cmdp tasks`.
SAMPLE_PROBLEM = (
    r"Convert the point $(0,3)$ in rectangular coordinates to polar coordinates. Enter your answer in the form "
    r"$(r,\theta),$ where $r > 0$ and $0 \le \theta < 2 \pi.$",
    r"\left( 3, \frac{\pi}{2} \right)",
)
MAX_COMPLETION_LENGTH = 1024
# Dataset on the Hub, its split, and its column of subjects.
_SOURCES = {
    "train": ("DigitalLearningGmbH/MATH-lighteval", "train", "type"),
    "test": ("DigitalLearningGmbH/MATH-lighteval", "test", "type"),
    "test500": ("HuggingFaceH4/MATH-500", "test", "subject"),
}


def load_problems(
    n: int | None,
    split: Literal["train", "test", "test500"],
    seed: int,
    *,
    conversational: bool = False,
    path: str | None = None,
) -> Dataset:
    r"""
    Loads problems of one split.

    Args:
        n (`int` or `None`):
            Number of problems, at least 1, or `None` for the whole split.
        split (`str`):
            `"train"` (7,500 problems), `"test"` (5,000) or `"test500"` (MATH-500).
        seed, conversational:
            As in [`trl_cmdp.tasks.gsm8k.load_problems`]. As text prompts are `"Problem: ...\nSolution:"`.
        path (`str`, *optional*):
            Local folder or file of the same columns (`problem`, `level`, `type`, `solution`, of MATH-500 `problem`,
            `level`, `subject`, `solution`), in place of the Hub. Of MATH-500 its split `"test"` is read.

    Returns:
        `datasets.Dataset`: Dataset with the columns `prompt`, `answer` (the last `\boxed{}` of the solution),
        `difficulty` (level, `"1"` to `"5"`, two problems have `"?"`), `subject` and `solution`.

    Raises:
        ValueError: If there is no such split or column, `n` is larger than the split, or a row has no
            problem.
    """
    if split not in _SOURCES:
        raise ValueError(f"`split` must be one of {', '.join(map(repr, _SOURCES))}, got {split!r}.")
    hub_path, source_split, subject = _SOURCES[split]
    path = path or hub_path
    rows = open_split(path, source_split)
    check_columns(rows, ["problem", "level", subject, "solution"], path)
    check_text(rows, "problem", path)
    problems = []
    for row in draw(rows, n, seed):
        solution = row["solution"] or ""
        answer = last_boxed(solution)
        if not answer:
            raise ValueError(f"A solution of {path!r} has no \\boxed{{}} with an answer: {solution[-80:]!r}.")
        problems.append(
            {
                "prompt": _prompt(row["problem"], conversational),
                "answer": answer,
                "difficulty": str(row["level"]).removeprefix("Level").strip(),  # "Level 3", in MATH-500 the number 3
                "subject": row[subject],
                "solution": row["solution"],
            }
        )
    return Dataset.from_list(problems)


def _prompt(problem: str, conversational: bool) -> str | list[dict[str, str]]:
    if conversational:
        return [{"role": "user", "content": f"{problem}\n{INSTRUCTION}"}]
    return f"Problem: {problem}\n{INSTRUCTION}\nSolution:"
