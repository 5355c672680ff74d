"""Exact divergence of rollouts from the teacher, token by token."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..core import Comparison
from ..teachers import LocalTeacher, RemoteTeacher, ServerTeacher, Teacher, allow_fast_kernel, keep_differentiable
from ..teachers.kernels import chunked_scores
from .rollouts import Rollout


AnyTeacher = torch.nn.Module | RemoteTeacher | Teacher


def score_rollouts(
    rollouts: Sequence[Rollout],
    student: PreTrainedModel,
    teacher: AnyTeacher,
    *,
    temperature: float = 1.0,
    beta: float = 1.0,
    batch_size: int = 64,
    memory_mb: float | None = None,
) -> list[torch.Tensor]:
    """
    Costs c_t = D(π(.|s_t), μ(.|s_t)) of every completion token, over the full vocabulary.

    Args:
        rollouts (`Sequence[Rollout]`):
            Rollouts, usually the student's own.
        student ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Student. Put in eval mode for the call.
        teacher ([`~transformers.PreTrainedModel`], [`~peft.PeftModel`], [`~teachers.AdapterTeacher`] or [`~teachers.RemoteTeacher`]):
            Teacher, of the student's tokenizer: a model in memory (quantised or not), the student's own base, or an
            exact server.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of both models.
        beta (`float`, *optional*, defaults to `1.0`):
            Divergence: 1 reverse KL, 0 forward KL, generalised JSD between.
        batch_size (`int`, *optional*, defaults to `64`):
            Rollouts scored at a time. Does not change the result.
        memory_mb (`float`, *optional*):
            Memory of the vocabulary-sized tiles, in MiB, as in [`~core.chunked_divergence`].

    Returns:
        `list[torch.Tensor]`: Costs of shape `(L,)` for each rollout, in nats, on the CPU.

    Raises:
        ValueError: If a cost is not finite, or the server returns log-probabilities only.
    """
    comparison = Comparison(beta, temperature)
    keep_differentiable(student)  # it may be trained afterwards
    if isinstance(teacher, PreTrainedModel):
        allow_fast_kernel(teacher)
    training = student.training
    student.eval()
    models = LocalTeacher(student), _as_teacher(teacher, student.device)  # a student is read as a teacher is
    student_head, teacher_head = (model.head() for model in models)
    costs: list[torch.Tensor] = []
    for start in range(0, len(rollouts), batch_size):
        batch = rollouts[start : start + batch_size]
        input_ids, attention_mask, mask = _collate(batch, student.device)
        student_hidden, teacher_hidden = (model.hidden_states(input_ids, attention_mask, mask) for model in models)
        scores = chunked_scores(
            student_hidden, student_head, teacher_hidden, teacher_head, comparison, memory_mb=memory_mb
        )
        costs.extend(scores.costs.cpu().split([len(rollout.completion_ids) for rollout in batch]))
    student.train(training)
    if not all(bool(cost.isfinite().all()) for cost in costs):
        raise ValueError("The divergence of a rollout is not finite: check student and teacher for NaN weights.")
    return costs


def _as_teacher(teacher: AnyTeacher, device: torch.device) -> Teacher:
    if isinstance(teacher, torch.nn.Module):
        return LocalTeacher(teacher.eval())
    return ServerTeacher(teacher, device) if isinstance(teacher, RemoteTeacher) else teacher


def _collate(batch: Sequence[Rollout], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input ids and attention mask (B, P + T), prompts padded on the left and completions on the right; mask (B, T)."""
    prompt_length = max(len(rollout.prompt_ids) for rollout in batch)
    completion_length = max(len(rollout.completion_ids) for rollout in batch)
    input_ids = torch.zeros(len(batch), prompt_length + completion_length, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, rollout in enumerate(batch):
        tokens = slice(prompt_length - len(rollout.prompt_ids), prompt_length + len(rollout.completion_ids))
        input_ids[row, tokens] = torch.tensor(rollout.prompt_ids + rollout.completion_ids)
        attention_mask[row, tokens] = 1
    input_ids, attention_mask = input_ids.to(device), attention_mask.to(device)
    return input_ids, attention_mask, attention_mask[:, prompt_length:].bool()
