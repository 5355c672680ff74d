"""Exact divergence of rollouts from the teacher, token by token."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..teachers import base_model, head_divergence, last_hidden_state, lm_head
from .rollouts import Rollout


def score_rollouts(
    rollouts: Sequence[Rollout],
    student: PreTrainedModel,
    teacher: PreTrainedModel,
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
        teacher ([`~transformers.PreTrainedModel`]):
            Teacher, of the student's tokenizer.
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
    student_model, teacher_model = base_model(student), base_model(teacher)
    training = student.training
    student.eval()
    teacher.eval()
    costs: list[torch.Tensor] = []
    with torch.no_grad():
        for start in range(0, len(rollouts), batch_size):
            batch = rollouts[start : start + batch_size]
            inputs, rows = _collate(batch, student.device)
            hidden = [
                last_hidden_state(model, rows.size(1), **inputs)[rows] for model in (student_model, teacher_model)
            ]
            _, batch_costs = head_divergence(
                hidden[0],
                lm_head(student_model),
                hidden[1],
                lm_head(teacher_model),
                beta=beta,
                temperature=temperature,
                memory_mb=memory_mb,
            )
            costs.extend(batch_costs.cpu().split([len(rollout.completion_ids) for rollout in batch]))
    student.train(training)
    if not all(bool(cost.isfinite().all()) for cost in costs):
        raise ValueError("The divergence of a rollout is not finite: check student and teacher for NaN weights.")
    return costs


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
