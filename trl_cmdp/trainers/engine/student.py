"""What must hold of a student before it trains beside a teacher: that the loss is of its own distribution."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel
from trl import GRPOTrainer

from ...teachers import LocalTeacher, base_model, check_reading, check_sampling, differ, is_plain_linear, probe_rows
from ...teachers.readable import HALF_ROUNDING, computes_in_half
from .forward import score_without_left_padding


_ROUNDING = 1e-3  # of log-probabilities in float32


def prepare_student(trainer: GRPOTrainer) -> None:
    """
    Check that the loss reads the student as it generates, and have rows scored without the padding on their left where
    that padding changes what the model says of them (learned positions).

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            Trainer, whose student TRL has given its fused head.

    Raises:
        ValueError: If the student, or its adapter, is not read as it is called.
    """
    accelerator = trainer.accelerator
    model = accelerator.unwrap_model(trainer.model)
    student = base_model(model)
    _check_head(student.get_output_embeddings())
    if trainer.is_deepspeed_enabled or student.device != accelerator.device:
        return  # a sharded model cannot be asked before training
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), accelerator.autocast(), _adapter_with_effect(model):
            check_reading("student", model, LocalTeacher(model, accelerator))
            check_sampling("student", model)
            own, fused, padded, rounding = _probe(model, trainer.temperature)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise ValueError(f"{_refusal(student)} ({type(error).__name__}: {error}).") from error
    finally:
        model.train(training)
    if differ(fused, own, HALF_ROUNDING):
        raise ValueError(f"{_refusal(student)}, which are not what the model generates from.")
    if differ(padded, fused, rounding):
        score_without_left_padding(student)
        if trainer.ref_model is not None:
            score_without_left_padding(base_model(accelerator.unwrap_model(trainer.ref_model)))


def _refusal(student: PreTrainedModel) -> str:
    return (
        f"The student, {type(student).__name__}, or its adapter cannot be trained beside a teacher. Use another one: TRL's "
        "loss takes log-probabilities from the backbone's hidden states and the head's weight"
    )


@contextmanager
def _adapter_with_effect(model: torch.nn.Module) -> Iterator[None]:
    """A new adapter has no effect that could be seen. Inside it has one."""
    if isinstance(model, PreTrainedModel):
        yield
        return
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    values = [parameter.clone() for parameter in trained]
    generator = torch.Generator().manual_seed(0)
    for parameter in trained:
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    try:
        yield
    finally:
        for parameter, value in zip(trained, values, strict=True):
            parameter.copy_(value)


def _check_head(head: torch.nn.Module) -> None:
    """Refuse a head with trained parameters that are no part of the weight and bias that the losses read."""
    trained = {name: parameter for name, parameter in head.named_parameters() if parameter.requires_grad}
    if is_plain_linear(head) or not trained:
        return
    read = [values for values in (head.weight, head.bias) if values is not None and values.requires_grad]
    unused = [None] * len(trained)
    if read:
        unused = torch.autograd.grad([values.sum() for values in read], list(trained.values()), allow_unused=True)
    ignored = [name for name, gradient in zip(trained, unused, strict=True) if gradient is None]
    if ignored:
        raise ValueError(
            f"The student's adapter is on its head ({', '.join(ignored)}), which TRL's loss reads without it: the adapter "
            "would be ignored there. Leave the head (and, where it is tied, the embeddings) out of the adapter's "
            "`target_modules`, or train a copy of it with `modules_to_save=['lm_head']`."
        )


def _probe(model: torch.nn.Module, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Log-probabilities (1, 4) of a row by the model's own logits, by TRL, and by TRL beside a longer row; rounding."""
    input_ids, attention_mask, row = probe_rows(model)
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    logits = model(input_ids=row, attention_mask=torch.ones_like(row)).logits[:, -row.size(1) : -1]
    own = (logits.float() / temperature).log_softmax(-1).gather(-1, row[:, 1:, None])[..., 0]
    alone = model(input_ids=row, attention_mask=torch.ones_like(row), labels=row, fused_lm_head=True)
    beside = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True)
    fused, padded = (outputs.log_probs[:1, 1 - row.size(1) :] for outputs in (alone, beside))
    return own, fused, padded, HALF_ROUNDING if computes_in_half(model, logits) else _ROUNDING
