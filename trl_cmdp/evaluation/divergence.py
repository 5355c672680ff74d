"""Exact divergence of rollouts from the teacher, token by token."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from ..teachers import (
    EXACT_SERVER_COMMAND,
    AdapterTeacher,
    LMHead,
    RemoteTeacher,
    allow_fast_kernel,
    base_model,
    head_divergence,
    keep_differentiable,
    last_hidden_state,
    lm_head,
)
from .rollouts import Rollout


Teacher = PreTrainedModel | AdapterTeacher | RemoteTeacher


def score_rollouts(
    rollouts: Sequence[Rollout],
    student: PreTrainedModel,
    teacher: Teacher,
    *,
    temperature: float = 1.0,
    beta: float = 1.0,
    batch_size: int = 64,
    memory_mb: float = 256,
) -> list[torch.Tensor]:
    """
    Costs c_t = D(π(.|s_t), μ(.|s_t)) of every completion token, over the full vocabulary.

    Args:
        rollouts (`Sequence[Rollout]`):
            Rollouts, usually the student's own.
        student ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Student. Put in eval mode for the call.
        teacher ([`~transformers.PreTrainedModel`], [`~teachers.AdapterTeacher`] or [`~teachers.RemoteTeacher`]):
            Teacher, of the student's tokenizer: a model in memory (quantised or not), the student's own base, or an
            exact server.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of both models.
        beta (`float`, *optional*, defaults to `1.0`):
            Divergence: 1 reverse KL, 0 forward KL, generalised JSD between.
        batch_size (`int`, *optional*, defaults to `64`):
            Rollouts scored at a time. Does not change the result.
        memory_mb (`float`, *optional*, defaults to `256`):
            Memory of the vocabulary-sized tiles, in MiB.

    Returns:
        `list[torch.Tensor]`: Costs of shape `(L,)` for each rollout, in nats, on the CPU.

    Raises:
        ValueError: If a cost is not finite.
    """
    student_model = base_model(student)
    keep_differentiable(student)  # it may be trained afterwards
    training = student.training
    student.eval()
    if isinstance(teacher, PreTrainedModel):
        allow_fast_kernel(teacher)
        teacher.eval()
    teacher_head = _teacher_head(teacher, student.device)
    costs: list[torch.Tensor] = []
    with torch.no_grad():
        for start in range(0, len(rollouts), batch_size):
            batch = rollouts[start : start + batch_size]
            inputs, rows = _collate(batch, student.device)
            _, batch_costs = head_divergence(
                last_hidden_state(student_model, rows.size(1), **inputs)[rows],
                lm_head(student_model),
                _teacher_hidden(teacher, batch, inputs, rows),
                teacher_head,
                beta=beta,
                temperature=temperature,
                memory_mb=memory_mb,
            )
            costs.extend(batch_costs.cpu().split([len(rollout.completion_ids) for rollout in batch]))
    student.train(training)
    if not all(bool(cost.isfinite().all()) for cost in costs):
        raise ValueError("The divergence of a rollout is not finite: check student and teacher for NaN weights.")
    return costs


def _teacher_head(teacher: Teacher, device: torch.device) -> LMHead:
    if isinstance(teacher, AdapterTeacher):
        return teacher.head()
    if not isinstance(teacher, RemoteTeacher):
        return lm_head(base_model(teacher))
    if teacher.head is None:
        raise ValueError(
            f"The teacher server at {teacher.url} returns log-probabilities only, and the exact divergence needs hidden "
            f"states. Start it with: {EXACT_SERVER_COMMAND}"
        )
    bias = None if teacher.head.bias is None else teacher.head.bias.to(device)
    return replace(teacher.head, weight=teacher.head.weight.to(device), bias=bias)


def _teacher_hidden(
    teacher: Teacher, batch: Sequence[Rollout], inputs: dict[str, torch.Tensor], rows: torch.Tensor
) -> torch.Tensor:
    """The teacher's hidden states (N, H) at the completion tokens."""
    if isinstance(teacher, AdapterTeacher):
        return teacher.hidden_states(**inputs, rows=rows)
    if isinstance(teacher, RemoteTeacher):
        sequences = [rollout.prompt_ids + rollout.completion_ids for rollout in batch]
        hidden = teacher.hidden_states(sequences, [len(rollout.completion_ids) for rollout in batch])
        return torch.cat(hidden).to(rows.device)
    return last_hidden_state(base_model(teacher), rows.size(1), **inputs)[rows]


def _collate(batch: Sequence[Rollout], device: torch.device) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Model inputs (B, P + T), prompts padded on the left and completions on the right, and the rows (B, T)."""
    prompt_length = max(len(rollout.prompt_ids) for rollout in batch)
    completion_length = max(len(rollout.completion_ids) for rollout in batch)
    input_ids = torch.zeros(len(batch), prompt_length + completion_length, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, rollout in enumerate(batch):
        tokens = slice(prompt_length - len(rollout.prompt_ids), prompt_length + len(rollout.completion_ids))
        input_ids[row, tokens] = torch.tensor(rollout.prompt_ids + rollout.completion_ids)
        attention_mask[row, tokens] = 1
    inputs = {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}
    return inputs, inputs["attention_mask"][:, prompt_length:].bool()
