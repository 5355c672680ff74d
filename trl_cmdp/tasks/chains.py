"""Chained sums whose test problems are longer than the train problems.

Problems, worked answers and their verification are those of [`trl_cmdp.tasks.arithmetic`], but the chains to train on
have 3 to 5 operands and the chains to test on 6 to 8: what is learned on short chains has to carry over to long ones.
"""

import random
from typing import Literal

from datasets import Dataset

from ._embedded import check_request, embedded_model, final_answer_reward, is_test, make_tokenizer
from .arithmetic import operands, valid_steps, worked_solution


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
SAMPLE_PROBLEM = ("7+5+9+3+8+2+4=", "38")
# The longest correct completion has 57 tokens and its EOS; the rest lets a wrong one come to its end.
MAX_COMPLETION_LENGTH = 64
_NUM_OPERANDS = {"train": range(3, 6), "test": range(6, 9), "pretrain": range(3, 9)}


def load_problems(n: int, split: Literal["train", "test", "pretrain"], seed: int) -> Dataset:
    """
    Draws problems of one split.

    Of the long chains, a hash of the text makes about one in five a test problem; the others are for pretraining,
    together with the short ones, so a model may have learned to write long chains without having seen a test problem.
    Every number of operands has a like share, but no problem comes twice before all those with as many operands have
    come, so the shortest chains get rarer in a large draw.

    Args:
        n (`int`):
            Number of problems, at least 1.
        split (`str`):
            `"train"` (3 to 5 operands), `"test"` (6 to 8) or `"pretrain"` (3 to 8, never a test problem).
        seed (`int`):
            Seed of the draw. The problems of a smaller `n` are the first ones of a larger `n` at the same seed.

    Returns:
        `datasets.Dataset`: Dataset with the string columns `prompt` and `answer`.
    """
    check_request(n, split, seed, splits=tuple(_NUM_OPERANDS))
    rng = random.Random(seed)
    # There are too many long chains to enumerate them.
    drawn: dict[int, set[str]] = {length: set() for length in _NUM_OPERANDS[split]}
    prompts: list[str] = []
    while len(prompts) < n:
        length = rng.choice(_NUM_OPERANDS[split])
        prompt = "+".join(rng.choices("123456789", k=length)) + "="
        in_test = length in _NUM_OPERANDS["test"] and is_test(prompt)
        if in_test != (split == "test") or prompt in drawn[length]:
            continue
        prompts.append(prompt)
        drawn[length].add(prompt)
        if len(drawn[length]) == 9**length:
            drawn[length].clear()
    return Dataset.from_dict({"prompt": prompts, "answer": [str(sum(operands(prompt))) for prompt in prompts]})


def demo_model_path(name: Literal["teacher", "student"]) -> str:
    """
    Folder of an embedded demo model, trained by `examples/scripts/make_demo_models.py chains` on the pretrain split only.

    `"teacher"` works its answers out and slips now and then; `"student"` often reaches the correct answer through wrong
    steps or none.
    """
    return embedded_model("chains_models", name)
