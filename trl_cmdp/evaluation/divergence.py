"""Exact divergence of rollouts from the teacher, token by token."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._prompts import TEACHER_PROMPT_IMAGES, Prompt
from ..core import Comparison
from ..teachers import (
    AdapterTeacher,
    LocalTeacher,
    OneStopTeacher,
    RemoteTeacher,
    ServerTeacher,
    Teacher,
    allow_fast_kernel,
    check_reading,
    encode_teacher_prompts,
    keep_differentiable,
    load_teacher,
    misfit,
)
from ..teachers.kernels import chunked_scores
from .images import collate
from .rollouts import Rollout


AnyTeacher = str | torch.nn.Module | RemoteTeacher | Teacher


def score_rollouts(
    rollouts: Sequence[Rollout],
    student: PreTrainedModel,
    teacher: AnyTeacher,
    *,
    temperature: float = 1.0,
    beta: float = 1.0,
    batch_size: int = 64,
    memory_mb: float | None = None,
    ends: tuple[int, int] | None = None,
) -> list[torch.Tensor]:
    """
    Costs c_t = D(π(.|s_t), μ(.|s_t)) of every completion token, over the full vocabulary.

    Args:
        rollouts (`Sequence[Rollout]`):
            Rollouts, usually the student's own.
        student ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Student. Put in eval mode for the call.
        teacher (`str`, [`~transformers.PreTrainedModel`], [`~peft.PeftModel`], [`~teachers.AdapterTeacher`] or [`~teachers.RemoteTeacher`]):
            Teacher, of the student's tokenizer: a path or hub id, a model in memory (quantised or not), the student's own
            base, or an exact server.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of both models.
        beta (`float`, *optional*, defaults to `1.0`):
            Divergence: 1 reverse KL, 0 forward KL, generalised JSD between.
        batch_size (`int`, *optional*, defaults to `64`):
            Rollouts scored at a time. Does not change the result.
        memory_mb (`float`, *optional*):
            Memory of the vocabulary-sized tiles, in MiB, as in [`~core.chunked_divergence`].
        ends (`tuple[int, int]`, *optional*):
            Token ids with which student and teacher end a turn, where they differ and are to count as one stop action:
            the teacher's probabilities of the two are swapped.

    Returns:
        `list[torch.Tensor]`: Costs of shape `(L,)` for each rollout, in nats, on the CPU.

    Raises:
        ValueError: If a cost is not finite, the server returns log-probabilities only, a model cannot be scored exactly, or
            the teacher cannot read a rollout.
    """
    comparison = Comparison(beta, temperature)
    keep_differentiable(student)  # it may be trained afterwards
    training = student.training
    student.eval()
    try:
        models = _readers(student, teacher, ends)
        student_head, teacher_head = (model.head() for model in models)
        costs: list[torch.Tensor] = []
        for start in range(0, len(rollouts), batch_size):
            batch = rollouts[start : start + batch_size]
            student_inputs = teacher_inputs = _collate(batch, student.device)
            if any(rollout.teacher_prompt_ids is not None for rollout in batch):
                teacher_inputs = _collate(list(map(_as_the_teacher_reads, batch)), student.device)
            problem = misfit(models[1], teacher_inputs["input_ids"], teacher_inputs["attention_mask"])
            if problem is not None:
                raise ValueError(problem)
            inputs = (student_inputs, teacher_inputs)
            hidden = [model.hidden_states(**own) for model, own in zip(models, inputs, strict=True)]
            scores = chunked_scores(hidden[0], student_head, hidden[1], teacher_head, comparison, memory_mb=memory_mb)
            costs.extend(scores.costs.cpu().split([len(rollout.completion_ids) for rollout in batch]))
    finally:
        student.train(training)
    if not all(bool(cost.isfinite().all()) for cost in costs):
        raise ValueError("The divergence of a rollout is not finite: check student and teacher for NaN weights.")
    return costs


def with_teacher_prompts(
    rollouts: Sequence[Rollout],
    prompts: Sequence[Prompt],
    teacher: AnyTeacher,
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Rollout]:
    """
    Rollouts of which a teacher reads another prompt than the student did. [`score_rollouts`] then compares the two models
    on the same completions, each behind its own prompt.

    Args:
        rollouts (`Sequence[Rollout]`):
            Rollouts.
        prompts (`Sequence[str | list[dict[str, Any]]]`):
            The teacher's prompt of each: text, or messages for the chat template of the teacher's own tokenizer where that
            has another than the student's, otherwise for the student's.
        teacher (`str`, [`~transformers.PreTrainedModel`], [`~peft.PeftModel`], [`~teachers.AdapterTeacher`] or [`~teachers.RemoteTeacher`]):
            Teacher, as [`score_rollouts`] takes it.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Student's tokenizer.
        chat_template (`str`, *optional*):
            Chat template in place of the student's own.
        chat_template_kwargs (`Mapping[str, Any]`, *optional*):
            Further arguments of either chat template.

    Returns:
        `list[Rollout]`: The rollouts, with `teacher_prompt_ids`.

    Raises:
        ValueError: If a prompt is neither text nor messages, messages cannot be rendered, or the rollouts have images.
    """
    if any("pixel_values" in rollout.images for rollout in rollouts):
        raise ValueError(TEACHER_PROMPT_IMAGES)
    model = as_teacher(teacher, torch.device("cpu"))
    encoded = encode_teacher_prompts(prompts, model, tokenizer, chat_template, chat_template_kwargs)
    return [replace(rollout, teacher_prompt_ids=ids) for rollout, ids in zip(rollouts, encoded, strict=True)]


def as_teacher(teacher: AnyTeacher, device: torch.device) -> Teacher:
    """A teacher that can be asked, from whatever names or holds one."""
    if isinstance(teacher, dict):
        raise TypeError("Costs are measured from one teacher at a time: pass one of the `dict`'s values.")
    model = load_teacher(teacher).to(device) if isinstance(teacher, str) else teacher  # type: ignore[arg-type]
    if isinstance(model, torch.nn.Module):
        allow_fast_kernel(model)
        return LocalTeacher(model.eval())
    return ServerTeacher(model, device) if isinstance(model, RemoteTeacher) else model


def _readers(
    student: PreTrainedModel, teacher: AnyTeacher, ends: tuple[int, int] | None
) -> tuple[LocalTeacher, Teacher]:
    """Student and teacher, checked. A student is read as a teacher is."""
    reader, teacher = LocalTeacher(student), as_teacher(teacher, student.device)
    check_reading("student", student, reader)
    if isinstance(teacher, LocalTeacher):
        check_reading("teacher", teacher.module, teacher)
    elif isinstance(teacher, AdapterTeacher):
        with teacher.active():
            check_reading(f"adapter {teacher.adapter_name!r} as a teacher", teacher.model, teacher)
    return reader, teacher if ends is None else OneStopTeacher(teacher, ends)


def _as_the_teacher_reads(rollout: Rollout) -> Rollout:
    own = rollout.teacher_prompt_ids
    return rollout if own is None else replace(rollout, prompt_ids=own, images={})


def _collate(batch: Sequence[Rollout], device: torch.device) -> dict[str, torch.Tensor]:
    """
    Input ids and attention mask (B, P + T), prompts padded on the left and completions on the right; mask (B, T); images.
    """
    prompt_length = max(len(rollout.prompt_ids) for rollout in batch)
    completion_length = max(len(rollout.completion_ids) for rollout in batch)
    input_ids = torch.zeros(len(batch), prompt_length + completion_length, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, rollout in enumerate(batch):
        tokens = slice(prompt_length - len(rollout.prompt_ids), prompt_length + len(rollout.completion_ids))
        input_ids[row, tokens] = torch.tensor(rollout.prompt_ids + rollout.completion_ids)
        attention_mask[row, tokens] = 1
    starts = [prompt_length - len(rollout.prompt_ids) for rollout in batch]
    images = collate([rollout.images for rollout in batch], starts, input_ids.size(1), device)
    attention_mask = attention_mask.to(device)
    mask = attention_mask[:, prompt_length:].bool()
    return {"input_ids": input_ids.to(device), "attention_mask": attention_mask, "mask": mask, **images}
