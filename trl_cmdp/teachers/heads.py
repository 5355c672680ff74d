"""What the divergence needs of a model, teacher or student: its last hidden states and its head."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..core import chunked_divergence, chunked_log_probs, chunked_policy_divergence, chunked_scores


@dataclass(frozen=True)
class LMHead:
    """
    What turns hidden states into logits: `softcap · tanh(scale · (h Wᵀ + b) / softcap)`.

    Args:
        weight (`torch.Tensor`):
            Weight of shape `(V, H)`.
        bias (`torch.Tensor` or `None`):
            Bias of shape `(V,)`.
        logit_scale (`float`):
            Factor on the logits.
        final_logit_softcapping (`float` or `None`):
            Soft cap on the scaled logits.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    logit_scale: float
    final_logit_softcapping: float | None


def last_hidden_state(model: PreTrainedModel, num_positions: int, **model_inputs: torch.Tensor) -> torch.Tensor:
    """
    Hidden states that predict the last tokens of a batch.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        num_positions (`int`):
            Number T of tokens at the end of each sequence, the completion's.
        model_inputs:
            Inputs of the model, `input_ids` of shape `(B, P + T)` among them.

    Returns:
        `torch.Tensor`: Hidden states of shape `(B, T, H)`; those at t predict completion token t.
    """
    # The text part of some vision-language models (Mllama, Llama 4) has a `base_model_prefix` that only the whole has.
    backbone = model.model if model.base_model is model else model.base_model
    hidden = backbone(**model_inputs, use_cache=False).last_hidden_state
    return hidden[:, -(num_positions + 1) : -1]


def lm_head(model: PreTrainedModel) -> LMHead:
    """
    Head of a causal language model, gathered where FSDP2 shards it, with what the architecture does to its logits.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.

    Returns:
        [`LMHead`]: The head.
    """
    head = model.get_output_embeddings()
    weight, bias = head.weight, head.bias
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()
        bias = bias.full_tensor() if bias is not None else None
    # Architectures name their logit scale differently; the names are those that TRL's fused head knows.
    config = model.config.get_text_config().to_dict()
    scale = next(
        (
            config[key]
            for key in ("logit_scale", "output_multiplier", "lm_head_multiplier")
            if config.get(key) is not None
        ),
        None,
    )
    divisor = config.get("logits_scaling")
    if scale is None and divisor is not None:
        scale = divisor if config["model_type"] == "hyperclovax" else 1 / divisor
    return LMHead(weight, bias, 1.0 if scale is None else scale, config.get("final_logit_softcapping"))


def base_model(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model itself: of a [`~peft.PeftModel`] the one that it adapts, adapter included."""
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()


def head_divergence(
    student_hidden: torch.Tensor,
    student_head: LMHead,
    teacher_hidden: torch.Tensor,
    teacher_head: LMHead,
    weights: torch.Tensor | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    [`~core.chunked_divergence`] between two heads, on the tokens that their vocabularies share: the longer one only
    pads (see [`check_vocabulary`]).

    Args:
        student_hidden (`torch.Tensor`):
            Student hidden states of shape `(N, H_s)`.
        student_head ([`LMHead`]):
            Student's head.
        teacher_hidden (`torch.Tensor`):
            Teacher hidden states of shape `(N, H_t)`.
        teacher_head ([`LMHead`]):
            Teacher's head.
        weights (`torch.Tensor`, *optional*):
            Weights of shape `(N,)`.
        settings:
            `beta`, `temperature`, `memory_mb`, `teacher_prob_floor` and `cross_entropy` of that function.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Loss Σ weights·costs, and costs of shape `(N,)` in nats.
    """
    vocab_size = min(len(student_head.weight), len(teacher_head.weight))
    student, teacher = _first_tokens(student_head, vocab_size), _first_tokens(teacher_head, vocab_size)
    return chunked_divergence(
        student_hidden,
        student.weight,
        teacher_hidden,
        teacher.weight,
        weights,
        student_bias=student.bias,
        teacher_bias=teacher.bias,
        **_logit_transforms(student, teacher),
        **settings,
    )


def head_policy_divergence(
    student_hidden: torch.Tensor,
    student_head: LMHead,
    token_ids: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: LMHead,
    weights: torch.Tensor,
    log_prob_grad: torch.Tensor | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    [`~core.chunked_policy_divergence`] between two heads.

    Args:
        student_hidden (`torch.Tensor`):
            Student hidden states of shape `(N, H_s)`.
        student_head ([`LMHead`]):
            Student's head.
        token_ids (`torch.Tensor`):
            Sampled tokens of shape `(N,)`.
        teacher_hidden (`torch.Tensor`):
            Teacher hidden states of shape `(M, H_t)`, of the positions of weight other than 0.
        teacher_head ([`LMHead`]):
            Teacher's head.
        weights (`torch.Tensor`):
            Weights of shape `(N,)`.
        log_prob_grad (`torch.Tensor`, *optional*):
            Expected derivative by each log-probability, of shape `(N,)`.
        settings:
            `beta`, `temperature`, `memory_mb`, `teacher_prob_floor` and `cross_entropy` of that function.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]`: Log-probabilities and entropies of shape
        `(N,)`, the loss Σ weights·costs, and costs of shape `(M,)`, in nats.
    """
    return chunked_policy_divergence(
        student_hidden,
        student_head.weight,
        token_ids,
        teacher_hidden,
        teacher_head.weight,
        weights,
        log_prob_grad,
        student_bias=student_head.bias,
        teacher_bias=teacher_head.bias,
        **_logit_transforms(student_head, teacher_head),
        **settings,
    )


def head_scores(
    student_hidden: torch.Tensor,
    student_head: LMHead,
    teacher_hidden: torch.Tensor,
    teacher_head: LMHead,
    token_ids: torch.Tensor,
    **settings: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    [`~core.chunked_scores`] of two heads, on the tokens that their vocabularies share.

    Args:
        student_hidden (`torch.Tensor`):
            Student hidden states of shape `(N, H_s)`.
        student_head ([`LMHead`]):
            Student's head.
        teacher_hidden (`torch.Tensor`):
            Teacher hidden states of shape `(N, H_t)`.
        teacher_head ([`LMHead`]):
            Teacher's head.
        token_ids (`torch.Tensor`):
            Sampled tokens of shape `(N,)`.
        settings:
            `beta`, `temperature`, `memory_mb` and `teacher_prob_floor` of that function.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: Costs, the student's log-probabilities and the teacher's, of
        shape `(N,)` each, in nats.
    """
    vocab_size = min(len(student_head.weight), len(teacher_head.weight))
    student, teacher = _first_tokens(student_head, vocab_size), _first_tokens(teacher_head, vocab_size)
    return chunked_scores(
        student_hidden,
        student.weight,
        teacher_hidden,
        teacher.weight,
        token_ids,
        student_bias=student.bias,
        teacher_bias=teacher.bias,
        **_logit_transforms(student, teacher),
        **settings,
    )


def head_log_probs(
    hidden: torch.Tensor, head: LMHead, token_ids: torch.Tensor, temperature: float = 1.0, memory_mb: float = 256
) -> torch.Tensor:
    """
    [`~core.chunked_log_probs`] of a head.

    Args:
        hidden (`torch.Tensor`):
            Hidden states of shape `(N, H)`.
        head ([`LMHead`]):
            Head.
        token_ids (`torch.Tensor`):
            Tokens of shape `(N,)` or `(N, k)`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature.
        memory_mb (`float`, *optional*, defaults to `256`):
            Memory of the vocabulary-sized tiles, in MiB.

    Returns:
        `torch.Tensor`: Log-probabilities of the shape of `token_ids`, in nats.
    """
    return chunked_log_probs(
        hidden,
        head.weight,
        token_ids,
        temperature,
        head.bias,
        memory_mb,
        logit_scale=head.logit_scale,
        final_logit_softcapping=head.final_logit_softcapping,
    )


def _first_tokens(head: LMHead, vocab_size: int) -> LMHead:
    if vocab_size == len(head.weight):  # a slice of everything would cost its backward a copy of the gradient
        return head
    return replace(head, weight=head.weight[:vocab_size], bias=None if head.bias is None else head.bias[:vocab_size])


def _logit_transforms(student: LMHead, teacher: LMHead) -> dict[str, float | None]:
    return {
        "student_logit_scale": student.logit_scale,
        "teacher_logit_scale": teacher.logit_scale,
        "student_final_logit_softcapping": student.final_logit_softcapping,
        "teacher_final_logit_softcapping": teacher.final_logit_softcapping,
    }
