"""Evaluating a student: rollouts batch by batch, each batch recorded before the next."""

import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from filelock import FileLock
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from .._prompts import (
    Prompt,
    check_chat_template,
    check_prompts,
    check_prompts_of_teacher,
    images_of,
    parts_of,
    with_images,
)
from ..teachers import Teacher, check_images, check_room, encode_teacher_prompts, end_ids
from ._lines import read_text
from .divergence import AnyTeacher, as_teacher, score_rollouts
from .images import AnyProcessor, previews, tokenizer_of
from .rollout_records import EvaluationSettings, RolloutRecord, read_rollout_records
from .rollouts import Rollout, eos_ids, sample_rollouts
from .summary import check_cost_scope


_Key = tuple[int, bool, int]  # problem, greedy, sample
# The commit is where the evaluation began. What it may change shows in the versions and the weights' fingerprint.
_MAY_DIFFER = {"git_commit"}


def evaluate(
    student: PreTrainedModel,
    tokenizer: AnyProcessor,
    problems: Dataset,
    reward: Callable[..., Sequence[float | None]],
    *,
    settings: EvaluationSettings,
    records_path: Path | None = None,
    teacher: AnyTeacher | None = None,
    engine: Any = None,
    scoring_batch_size: int = 32,
    progress: Callable[[int, int], Any] | None = None,
) -> list[RolloutRecord]:
    """
    Roll a student out on problems, and record final answers and costs.

    Every batch has a seed of its own and is written before the next begins, so an evaluation that was stopped can be
    resumed, and ends with the records that it would have had.

    Args:
        student ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Student, on its device.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Its tokenizer, or for problems with images its processor.
        problems ([`~datasets.Dataset`]):
            As many problems as the settings say, with the columns `prompt` and `answer`, and `difficulty` where there
            are strata. Images are as in training: in a column `images` or `image`, or in the messages. With a column
            `teacher_prompt` costs are of a teacher that reads it in the place of `prompt`.
        reward (`Callable`):
            Reward function as TRL calls it, with prompts, completions and all columns. A final answer is correct
            where it gives 1.
        settings ([`EvaluationSettings`]):
            What to do. `student`, `teacher`, `task` and `split` only name what is passed to this function.
        records_path (`Path`, *optional*):
            Records file, written or resumed. Nothing is written if `None`.
        teacher (`str`, [`~transformers.PreTrainedModel`], [`~peft.PeftModel`], [`~teachers.AdapterTeacher`] or [`~teachers.RemoteTeacher`], *optional*):
            Teacher of [`score_rollouts`]. Costs are not measured without one.
        engine (`vllm.LLM`, *optional*):
            What generates if `settings.backend` is `"vllm"`, with the student's weights. The student scores.
        scoring_batch_size (`int`, *optional*, defaults to `32`):
            Rollouts scored at a time.
        progress (`Callable[[int, int], Any]`, *optional*):
            Called with (rollouts done, total), at first with what is recorded already. See [`show_progress`].

    Returns:
        `list[RolloutRecord]`: Every record, those of an earlier call included: the samples of each problem, in the
        problems' order, and then the greedy rollouts.

    Raises:
        ValueError: If the arguments do not fit the settings, a prompt is neither text nor messages that the chat
            template renders, a `teacher_prompt` leaves no room for the completion in the teacher's positions or stands
            beside images, or the file is of an evaluation with other settings.
        filelock.Timeout: If another evaluation is writing to the file.
    """
    processing_class, tokenizer = tokenizer, tokenizer_of(tokenizer)
    rows = [dict(row) for row in problems]
    _check_arguments(rows, settings, teacher, engine)
    has_images = _check_prompts(problems, rows, processing_class, settings)
    generate: Callable[..., list[Rollout]] = sample_rollouts
    if settings.backend == "vllm":
        from .vllm import sample_rollouts_vllm  # an optional dependency

        generate = sample_rollouts_vllm
    stops = eos_ids(student, tokenizer)
    ends = end_ids(tokenizer, stops, settings.teacher_eos_token)
    if teacher is not None:
        teacher = as_teacher(teacher, student.device)
        if has_images:
            check_images(teacher, processing_class, student.device)
    own_prompts = None if teacher is None else _teacher_prompt_ids(problems, teacher, tokenizer, settings)
    batches = _batches(settings)
    total = sum(map(len, batches))
    with _records_file(records_path, settings, batches) as (records, append):
        num_recorded, end = len(records), 0
        if progress is not None:
            progress(num_recorded, total)
        for number, batch in enumerate(batches):
            end += len(batch)
            if end <= num_recorded:
                continue
            batch_rows = [rows[problem] for problem, _, _ in batch]
            rollouts = generate(
                student if engine is None else engine,
                processing_class,
                [with_images(row) if has_images else row["prompt"] for row in batch_rows],
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                greedy=batch[0][1],
                batch_size=len(batch),
                chat_template=settings.chat_template,
                chat_template_kwargs=settings.chat_template_kwargs,
                seed=_batch_seed(settings.seed, number),
            )
            if own_prompts is not None:
                rollouts = [
                    replace(rollout, teacher_prompt_ids=own_prompts[problem])
                    for rollout, (problem, _, _) in zip(rollouts, batch, strict=True)
                ]
            costs: Sequence[torch.Tensor | None] = [None] * len(batch)
            if teacher is not None:
                costs = score_rollouts(
                    rollouts,
                    student,
                    teacher,
                    temperature=settings.temperature,
                    beta=settings.teacher_beta,
                    batch_size=scoring_batch_size,
                    ends=ends,
                )
            correct = [value == 1.0 for value in call_reward(reward, batch_rows, rollouts)]
            new = [
                make_record(key, row, rollout, is_correct, cost, tokenizer, settings.max_new_tokens, stops)
                for key, row, rollout, cost, is_correct in zip(
                    batch, batch_rows, rollouts, costs, correct, strict=True
                )
            ]
            append(new)
            records.extend(new)
            if progress is not None:
                progress(len(records), total)
        return records


def make_record(
    key: tuple[int, bool, int],
    row: Mapping[str, Any],
    rollout: Rollout,
    is_correct: bool,
    costs: torch.Tensor | None,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    stops: Sequence[int],
) -> RolloutRecord:
    """The record of one rollout of a row of the problems, with its costs (L,). The key is the record's."""
    ids = rollout.completion_ids
    return RolloutRecord(
        *key,
        prompt=_recorded(rollout.prompt),
        answer=str(row["answer"]),
        difficulty=None if row.get("difficulty") is None else str(row["difficulty"]),
        completion=rollout.completion,
        completion_ids=ids,
        tokens=[str(tokenizer.decode([token])) for token in ids],
        truncated=len(ids) >= max_new_tokens and ids[-1] not in stops,
        right=is_correct,
        # A cost of 0 comes as a number around it: no "-0.0".
        costs=None if costs is None else [round(value, 6) + 0.0 for value in costs.tolist()],
        teacher_prompt=None if rollout.teacher_prompt_ids is None else _recorded(row["teacher_prompt"]),
        images=previews(rollout.prompt),
    )


def _check_arguments(
    rows: list[dict[str, Any]],
    settings: EvaluationSettings,
    teacher: AnyTeacher | None,
    engine: Any,
) -> None:
    if len(rows) != settings.num_problems:
        raise ValueError(f"The settings say {settings.num_problems} problems, and `problems` holds {len(rows)}.")
    if rows and "answer" not in rows[0]:
        raise ValueError(f"The problems have no column 'answer', they have {', '.join(map(repr, rows[0]))}.")
    if settings.num_problems < 1 or settings.num_samples + settings.greedy < 1 or settings.num_samples < 0:
        raise ValueError(
            "There is nothing to evaluate: ask for a problem, and for a sample of each or a greedy rollout."
        )
    for name in ("batch_size", "max_new_tokens", "temperature", "cost_limit"):
        if not 0 < getattr(settings, name) < math.inf:
            raise ValueError(f"`{name}` must be positive and finite, got {getattr(settings, name)}.")
    if not 0 <= settings.teacher_beta <= 1:
        raise ValueError(f"`teacher_beta` must lie in [0, 1], got {settings.teacher_beta}.")
    check_cost_scope(settings.cost_scope)
    if (settings.teacher is None) != (teacher is None):
        raise ValueError("`settings.teacher` names the teacher that is passed as `teacher`: give both or neither.")
    if settings.backend not in ("transformers", "vllm"):
        raise ValueError(f"`backend` must be 'transformers' or 'vllm', got {settings.backend!r}.")
    if (settings.backend == "vllm") != (engine is not None):
        raise ValueError("Give an `engine`, a `vllm.LLM`, with the backend 'vllm', and with no other.")


def _check_prompts(
    problems: Dataset, rows: list[dict[str, Any]], processing_class: AnyProcessor, settings: EvaluationSettings
) -> bool:
    """Whether there are images among the prompts, which are checked."""
    name = "the dataset of problems"
    if settings.teacher is not None and "teacher_prompt" in problems.column_names:
        check_prompts_of_teacher(problems, name)
    prompt = check_prompts(problems, name)
    if isinstance(prompt, str):
        if any(map(images_of, rows)):
            raise ValueError(f"Prompts with images are messages, and those of {name} are text: make messages of them.")
        return False
    check_chat_template(processing_class, prompt, name, settings.chat_template, settings.chat_template_kwargs)
    sees = isinstance(processing_class, ProcessorMixin)
    for index, row in enumerate(rows):
        kinds = {part["type"] for part in parts_of(row["prompt"])} | ({"image"} if images_of(row) else set())
        if other := sorted(kinds - ({"text", "image"} if sees else {"text"})):
            hint = (
                "" if other != ["image"] else " Give the student's processor in the tokenizer's place, if it has one."
            )
            raise ValueError(
                f"Row {index} of {name}: its prompt has content that is not evaluated ({', '.join(other)}).{hint}"
            )
    has_images = any(map(images_of, rows))
    if has_images and settings.backend == "vllm":
        raise ValueError("Prompts with images are evaluated with the backend 'transformers' alone.")
    return has_images


def _teacher_prompt_ids(
    problems: Dataset, teacher: Teacher, tokenizer: PreTrainedTokenizerBase, settings: EvaluationSettings
) -> list[list[int]] | None:
    """Tokens of the teacher's own prompt of each problem, `None` where they have none."""
    if "teacher_prompt" not in problems.column_names:
        return None
    encoded = encode_teacher_prompts(
        problems["teacher_prompt"], teacher, tokenizer, settings.chat_template, settings.chat_template_kwargs
    )
    for index, ids in enumerate(encoded):
        check_room(teacher, len(ids), settings.max_new_tokens, f"Row {index} of the dataset of problems")
    return encoded


def _recorded(prompt: Prompt) -> str | list[dict[str, str]]:
    """A prompt as records have it: of each message what is text."""
    if isinstance(prompt, str):
        return prompt
    texts = [{name: value for name, value in message.items() if isinstance(value, str)} for message in prompt]
    contents = [message["content"] or "" for message in prompt]
    return [
        {
            **text,
            "content": content if isinstance(content, str) else "".join(part.get("text") or "" for part in content),
        }
        for text, content in zip(texts, contents, strict=True)
    ]


def _batches(settings: EvaluationSettings) -> list[list[_Key]]:
    """What each batch rolls out. Greedy and sampled rollouts never share one."""
    problems = range(settings.num_problems)
    sampled = [(problem, False, sample) for problem in problems for sample in range(settings.num_samples)]
    greedy = [(problem, True, 0) for problem in problems if settings.greedy]
    size = settings.batch_size
    return [keys[start : start + size] for keys in (sampled, greedy) for start in range(0, len(keys), size)]


def _batch_seed(seed: int, number: int) -> int:
    return random.Random(f"{seed}/{number}").getrandbits(31)  # far from the seeds of other batches and evaluations


def call_reward(
    reward: Callable[..., Sequence[float | None]], rows: Sequence[dict[str, Any]], rollouts: Sequence[Rollout]
) -> Sequence[float | None]:
    """The rewards of rollouts of the problems in `rows`, by a function that is called as TRL calls it."""
    prompts = [row["prompt"] for row in rows]
    columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ("prompt", "completion")}
    completions = [
        rollout.completion
        if isinstance(rollout.prompt, str)
        else [{"role": "assistant", "content": rollout.completion}]
        for rollout in rollouts
    ]
    completion_ids = [rollout.completion_ids for rollout in rollouts]
    rewards = reward(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
    if len(rewards) != len(rollouts):
        raise ValueError(f"The reward function gave {len(rewards)} rewards for {len(rollouts)} completions.")
    return rewards


@contextmanager
def _records_file(
    path: Path | None, settings: EvaluationSettings, batches: Sequence[Sequence[_Key]]
) -> Iterator[tuple[list[RolloutRecord], Callable[[Sequence[RolloutRecord]], None]]]:
    """The records of whole batches that the file holds, and a function that appends those of another batch to it."""
    if path is None:
        yield [], lambda new: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock"), timeout=0):  # released however this process ends
        records = _resume(path, settings, batches)
        with path.open("a", encoding="utf-8", newline="\n") as file:

            def append(new: Sequence[RolloutRecord]) -> None:
                file.write("".join(f"{record.to_json()}\n" for record in new))
                file.flush()
                os.fsync(file.fileno())

            yield records, append


def _resume(path: Path, settings: EvaluationSettings, batches: Sequence[Sequence[_Key]]) -> list[RolloutRecord]:
    """The records of whole batches that the file holds. What follows them is cut off; a missing file is created."""
    try:
        text = read_text(path) if path.exists() else ""
        if "\n" not in text:  # not even the settings were written to their end
            path.write_text(f"{settings.to_json()}\n", encoding="utf-8", newline="\n")
            return []
        found, records = read_rollout_records(text)
    except ValueError as error:
        raise ValueError(f"{path} cannot be resumed: {error}") from error
    for field in fields(EvaluationSettings):
        before, now = getattr(found, field.name), getattr(settings, field.name)
        if before != now and field.name not in _MAY_DIFFER:
            raise ValueError(
                f"{path} is of an evaluation with another `{field.name}`: {before!r}, now {now!r}. Choose another "
                "path, or delete the file."
            )
    keys = [key for batch in batches for key in batch]
    if [record.key for record in records] != keys[: len(records)]:
        raise ValueError(f"{path} has lost a line, or its lines are in another order: it cannot be resumed.")
    # A batch is generated as a whole, so one that was cut while it was written is generated again.
    whole = max((end for end in accumulate(map(len, batches)) if end <= len(records)), default=0)
    kept = "".join(f"{line}\n" for line in text.split("\n")[: 1 + whole])
    os.truncate(path, len(kept.encode()))
    return records[:whole]
