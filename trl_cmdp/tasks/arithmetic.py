"""Chained sums with worked steps: a task small enough to be trained on a CPU in minutes.

A problem is a sum of five digits, `7+5+9+3+8=`. A worked answer adds them one by one and then states the result,
`7+5=12,12+9=21,21+3=24,24+8=32#32`. An answer may also skip the steps, `#32`, or reach the right result through wrong
steps: reward alone cannot tell these apart, [`valid_steps`] can.
"""

import hashlib
import itertools
import random
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ._verify import answer_text


NUM_OPERANDS = 5
# The longest right completion has 33 tokens and its EOS; the rest lets a wrong one come to its end.
MAX_COMPLETION_LENGTH = 40
_PROMPT = re.compile(r"[1-9](\+[1-9])+=")
_SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")
_ALPHABET = "0123456789+=,#"


def _is_test(prompt: str) -> bool:
    # Python's own hash of a string changes between processes, and the split must never change.
    return hashlib.sha256(prompt.encode()).digest()[0] % 5 == 0


@lru_cache(maxsize=2)
def _all_problems(split: str) -> tuple[str, ...]:
    prompts = ("+".join(digits) + "=" for digits in itertools.product("123456789", repeat=NUM_OPERANDS))
    return tuple(prompt for prompt in prompts if _is_test(prompt) == (split == "test"))


def _operands(prompt: str) -> list[int]:
    if not _PROMPT.fullmatch(prompt):
        raise ValueError(f"Not a sum of the digits 1 to 9 such as '7+5+9+3+8=': {prompt!r}.")
    return [int(digit) for digit in prompt[:-1].split("+")]


def _check_request(n: int, split: str, seed: int, splits: tuple[str, ...]) -> None:
    if split not in splits:
        raise ValueError(f"`split` must be {' or '.join(map(repr, splits))}, got {split!r}.")
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"`n` must be an integer of at least 1, got {n!r}.")
    if not isinstance(seed, int):
        raise ValueError(f"`seed` must be an integer, got {seed!r}.")


def _draw(problems: Sequence[str], n: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    prompts: list[str] = []
    while len(prompts) < n:
        prompts.extend(rng.sample(problems, len(problems)))
    return prompts[:n]


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
    _check_request(n, split, seed, splits=("train", "test"))
    prompts = _draw(_all_problems(split), n, seed)
    return Dataset.from_dict({"prompt": prompts, "answer": [str(sum(_operands(prompt))) for prompt in prompts]})


def worked_solution(prompt: str) -> str:
    """
    Writes the one right answer that shows every step.

    Args:
        prompt (`str`):
            Problem, for example `"7+5+9+3+8="`.

    Returns:
        `str`: The completion, for example `"7+5=12,12+9=21,21+3=24,24+8=32#32"`.
    """
    total, *rest = _operands(prompt)
    steps = []
    for operand in rest:
        steps.append(f"{total}+{operand}={total + operand}")
        total += operand
    return f"{','.join(steps)}#{total}"


def valid_steps(prompt: str, completion: str) -> bool:
    """
    Tells whether a completion writes every needed step, in order, without a mistake and with nothing else around it.

    Args:
        prompt (`str`):
            Problem, for example `"7+5+9+3+8="`.
        completion (`str`):
            Answer without special tokens.

    Returns:
        `bool`: `True` if all steps and the final answer are there and right. An answer without steps is not valid.
    """
    # The prompt fixes the order of the additions, hence every character of a valid answer.
    return completion == worked_solution(prompt)


def final_answer_reward(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    """
    Reward function for TRL trainers: is the final answer right, whatever the steps say?

    Args:
        completions (`list[str]`):
            Completions without special tokens.
        answer (`list[str]`):
            Right answers, the `answer` column of [`load_problems`].
        **kwargs:
            The other columns and arguments that TRL passes, unused.

    Returns:
        `list[float]`: 1.0 where the text after the last `#` is exactly the answer, else 0.0.
    """
    rewards = []
    for completion, expected in zip(completions, answer, strict=True):
        _, mark, stated = completion.rpartition("#")
        rewards.append(float(bool(mark) and stated == answer_text(expected)))
    return rewards


def make_tokenizer(alphabet: str = _ALPHABET) -> PreTrainedTokenizerFast:
    """
    Builds the tokenizer of the task: one token per character, none added on its own.

    Args:
        alphabet (`str`, *optional*, defaults to the characters of chained sums):
            Characters that are tokens, each once.

    Returns:
        `transformers.PreTrainedTokenizerFast`: Tokenizer that pads on the left.
    """
    vocab = {token: index for index, token in enumerate((*_SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=128,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def _embedded_model(folder: str, name: str) -> str:
    if name not in ("teacher", "student"):
        raise ValueError(f"`name` must be 'teacher' or 'student', got {name!r}.")
    return str(Path(__file__).parent / folder / name)


def demo_model_path(name: Literal["teacher", "student"]) -> str:
    """
    Finds an embedded demo model, trained by `examples/scripts/make_demo_models.py` on train problems only.

    Args:
        name (`str`):
            `"teacher"` works its answers out and slips now and then; `"student"` often reaches the right answer
            through wrong steps or none.

    Returns:
        `str`: Folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load.
    """
    return _embedded_model("arithmetic_models", name)
