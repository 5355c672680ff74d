"""What the embedded tasks share: splits by hash, draws, the reward, a tokenizer of characters, and their models."""

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ._verify import answer_text


ALPHABET = "0123456789+=,#"
_SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")


def is_test(prompt: str) -> bool:
    """Whether a problem is of the test split."""
    # Python's own hash of a string changes between processes, and the split must never change.
    return hashlib.sha256(prompt.encode()).digest()[0] % 5 == 0


def check_request(n: int, split: str, seed: int, splits: tuple[str, ...]) -> None:
    """Refuse a bad argument of `load_problems`."""
    if split not in splits:
        raise ValueError(f"`split` must be {' or '.join(map(repr, splits))}, got {split!r}.")
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"`n` must be an integer of at least 1, got {n!r}.")
    if not isinstance(seed, int):
        raise ValueError(f"`seed` must be an integer, got {seed!r}.")


def draw(problems: Sequence[str], n: int, seed: int) -> list[str]:
    """Problems in random order; a second pass begins only when all are drawn."""
    rng = random.Random(seed)
    prompts: list[str] = []
    while len(prompts) < n:
        prompts.extend(rng.sample(problems, len(problems)))
    return prompts[:n]


def final_answer_reward(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    """Reward function for TRL trainers: is the final answer correct, whatever the steps say?"""
    rewards = []
    for completion, expected in zip(completions, answer, strict=True):
        _, mark, stated = completion.rpartition("#")
        rewards.append(float(bool(mark) and stated == answer_text(expected)))
    return rewards


def make_tokenizer(alphabet: str = ALPHABET) -> PreTrainedTokenizerFast:
    """Builds the tokenizer of the task: one token per character, none added on its own."""
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


def embedded_model(folder: str, name: str) -> str:
    """Folder of an embedded model of a task."""
    if name not in ("teacher", "student"):
        raise ValueError(f"`name` must be 'teacher' or 'student', got {name!r}.")
    return str(Path(__file__).parent / folder / name)
