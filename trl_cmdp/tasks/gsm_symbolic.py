"""GSM-Symbolic (arXiv 2410.05229): grade-school word problems made from templates, with worked solutions.

`reasoning-gym` generates them (`pip install "trl-cmdp[math]"`), so there are as many as needed, without the hub.
Templates are held out whole: no template of the split `"test"` is in `"train"`. Problems of `"validation"` are made from
the templates of `"train"`, with other names and numbers. The hub's own 100 x 50 problems (`apple/GSM-Symbolic`) are
[`load_hub_problems`].
"""

import hashlib
import re
from collections.abc import Collection, Iterator
from typing import Any, Literal

from datasets import Dataset, load_dataset

from ._verify import final_answer_reward


__all__ = [
    "MAX_COMPLETION_LENGTH",
    "final_answer_reward",
    "load_hub_problems",
    "load_problems",
    "template_split",
]

# A problem and its answer, for `trl-cmdp tasks`.
SAMPLE_PROBLEM = (
    "Emma buys 18 shares of a stock for $72 each. The stock price increases 25% the first year Emma holds it, then "
    "decreases 25% in the second year. What is the final value of all Emma's shares?",
    "1215",
)
MAX_COMPLETION_LENGTH = 256
INSTRUCTION = "Solve the problem step by step. End with a line '#### ' and the answer as a number."
_SUFFIX = " Give the result as your final answer. Do not include units."  # of reasoning-gym, on every question
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
_MOST_TRIED = 500  # generated problems for each that is asked for
_SPLITS = ("train", "validation", "test")


def _digest(text: str) -> int:
    # Python's own hash of a string changes between processes, and the split must never change.
    return hashlib.sha256(text.encode()).digest()[0]


def template_split(template: int) -> Literal["train", "test"]:
    """Split of a template: about one in five is a test template."""
    return "test" if _digest(f"gsm_symbolic {template}") % 5 == 0 else "train"


def load_problems(
    n: int,
    split: Literal["train", "validation", "test"],
    seed: int,
    *,
    conversational: bool = False,
    max_steps: int | None = None,
    max_number: float | None = None,
    templates: Collection[int] | None = None,
) -> Dataset:
    """
    Generates different problems of one split.

    Of the problems that a train template can make, a hash of the text gives about one in eight to `"validation"`, so
    the splits never meet, whatever the seed.

    Args:
        n (`int`):
            Number of problems, at least 1.
        split (`str`):
            `"train"`, `"validation"` (new problems of train templates) or `"test"` (templates never trained on).
        seed (`int`):
            Seed of the draw. The problems of a smaller `n` are the first ones of a larger `n` at the same seed.
        conversational (`bool`, *optional*, defaults to `False`):
            Prompts as messages, with an instruction that states the form of the answer. As text they are
            `"Question: ...\\nAnswer:"`.
        max_steps (`int`, *optional*):
            Leave out problems whose worked solution has more steps.
        max_number (`float`, *optional*):
            Leave out problems with a larger number in question or solution. Small models calculate with small ones.
        templates (`Collection[int]`, *optional*):
            Only problems of these templates, by their numbers from 0 to 99. All must be templates of the split.

    Returns:
        `datasets.Dataset`: Dataset with the columns `prompt`, `answer`, `solution` (worked, its last line is `#### `
        and the answer), `difficulty` (number of steps of the solution) and `template`.

    Raises:
        ImportError: If reasoning-gym is not installed.
        ValueError: If an argument is out of range.
    """
    if split not in _SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(map(repr, _SPLITS))}, got {split!r}.")
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"`n` must be an integer of at least 1, got {n!r}.")
    if max_steps is not None and max_steps < 2:
        raise ValueError(f"`max_steps` must be at least 2, the fewest of any template, got {max_steps}.")
    if max_number is not None and max_number < 50:
        raise ValueError(f"`max_number` must be at least 50, or hardly any problem is left, got {max_number}.")
    if templates is not None:
        _check_templates(templates, split)
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for tried, (question, solution, template) in enumerate(_generate(seed, templates)):
        if tried > _MOST_TRIED * n + 10_000:
            raise ValueError(
                f"Only {len(rows)} different problems of {n} were found: ask for fewer, or a wider range."
            )
        if split != _split(question, template) or question in seen:
            continue
        row = _row(question, solution, template, conversational)
        if max_steps is not None and int(row["difficulty"]) > max_steps:
            continue
        if max_number is not None and _largest_number(question + solution) > max_number:
            continue
        seen.add(question)
        rows.append(row)
        if len(rows) == n:
            break
    return Dataset.from_list(rows)


def load_hub_problems(
    name: Literal["main", "p1", "p2"] = "main", *, path: str = "apple/GSM-Symbolic", conversational: bool = False
) -> Dataset:
    """Loads Apple's own problems from the hub: 50 of each of 100 templates, to evaluate on."""
    problems = load_dataset(path, name, split="test")
    return Dataset.from_list([_row(row["question"], row["answer"], row["id"], conversational) for row in problems])


def _check_templates(templates: Collection[int], split: str) -> None:
    of_split = [template for template in range(100) if (template_split(template) == "test") == (split == "test")]
    others = sorted(set(templates) - set(of_split))
    if others or not templates:
        raise ValueError(
            f"`templates` must be templates of the split {split!r}, some of {of_split}; got {others or templates!r}."
        )


def _generate(seed: int, templates: Collection[int] | None) -> Iterator[tuple[str, str, int]]:
    """Question, worked solution and template of one problem after the other, without end."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError('GSM-Symbolic problems are made by reasoning-gym: pip install "trl-cmdp[math]"') from error
    # The library gives problem i of seed s the random state s + i, so neighbouring seeds would share their problems.
    start = int.from_bytes(hashlib.sha256(f"gsm_symbolic {seed}".encode()).digest()[:6], "big")
    size = 2**20  # of a lazy dataset; no problem is made before it is asked for
    while True:
        problems = reasoning_gym.create_dataset("gsm_symbolic", seed=start, size=size)
        for index in range(size):
            if templates is not None and problems.task_indices[index] not in templates:
                continue  # before it is made, which takes longer than the draw of its template
            problem = problems[index]
            question = problem["question"].removesuffix(_SUFFIX)
            yield question, problem["metadata"]["answer_cot"], problems.task_indices[index]
        start += size


def _largest_number(text: str) -> float:
    return max(float(number.replace(",", "")) for number in _NUMBER.findall(text))


def _split(question: str, template: int) -> str:
    if template_split(template) == "test":
        return "test"
    return "validation" if _digest(question) % 8 == 0 else "train"


def _row(question: str, solution: str, template: Any, conversational: bool) -> dict[str, Any]:
    *steps, last = solution.splitlines()
    message = {"role": "user", "content": f"{question}\n{INSTRUCTION}"}
    return {
        "prompt": [message] if conversational else f"Question: {question}\nAnswer:",
        "answer": last.removeprefix("####").strip(),
        "solution": solution,
        "difficulty": str(len(steps)),
        "template": template,
    }
