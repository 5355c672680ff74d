"""What the divergence needs of a model, teacher or student: its last hidden states and its head."""

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..core import chunked_divergence, chunked_log_probs


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
    hidden = model.base_model(**model_inputs, use_cache=False).last_hidden_state
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
    beta: float = 1.0,
    temperature: float = 1.0,
    memory_mb: float = 256,
    teacher_prob_floor: float = 0.0,
    cross_entropy: bool = False,
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
        beta (`float`, *optional*, defaults to `1.0`):
            Divergence: 1 reverse KL, 0 forward KL, generalised JSD between.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of both models.
        memory_mb (`float`, *optional*, defaults to `256`):
            Memory of the vocabulary-sized tiles, in MiB.
        teacher_prob_floor (`float`, *optional*, defaults to `0.0`):
            Mixture of the teacher with the uniform distribution.
        cross_entropy (`bool`, *optional*, defaults to `False`):
            Take the teacher's expected negative log-likelihood in place of the divergence.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Loss Σ weights·costs, and costs of shape `(N,)` in nats.
    """
    shared = slice(min(len(student_head.weight), len(teacher_head.weight)))
    return chunked_divergence(
        student_hidden,
        student_head.weight[shared],
        teacher_hidden,
        teacher_head.weight[shared],
        weights,
        beta=beta,
        temperature=temperature,
        student_bias=None if student_head.bias is None else student_head.bias[shared],
        teacher_bias=None if teacher_head.bias is None else teacher_head.bias[shared],
        memory_mb=memory_mb,
        student_logit_scale=student_head.logit_scale,
        teacher_logit_scale=teacher_head.logit_scale,
        student_final_logit_softcapping=student_head.final_logit_softcapping,
        teacher_final_logit_softcapping=teacher_head.final_logit_softcapping,
        teacher_prob_floor=teacher_prob_floor,
        cross_entropy=cross_entropy,
    )


def head_log_probs(
    hidden: torch.Tensor,
    head: LMHead,
    token_ids: torch.Tensor,
    vocab_size: int,
    temperature: float = 1.0,
    memory_mb: float = 256,
    prob_floor: float = 0.0,
) -> torch.Tensor:
    """
    [`~core.chunked_log_probs`] of a head, on the first `vocab_size` tokens.

    Args:
        hidden (`torch.Tensor`):
            Hidden states of shape `(N, H)`.
        head ([`LMHead`]):
            Head.
        token_ids (`torch.Tensor`):
            Tokens of shape `(N,)`.
        vocab_size (`int`):
            Number of tokens that student and teacher share.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature.
        memory_mb (`float`, *optional*, defaults to `256`):
            Memory of the vocabulary-sized tiles, in MiB.
        prob_floor (`float`, *optional*, defaults to `0.0`):
            Mixture with the uniform distribution.

    Returns:
        `torch.Tensor`: Log-probabilities of shape `(N,)`, in nats.
    """
    return chunked_log_probs(
        hidden,
        head.weight[:vocab_size],
        token_ids,
        temperature,
        None if head.bias is None else head.bias[:vocab_size],
        memory_mb,
        logit_scale=head.logit_scale,
        final_logit_softcapping=head.final_logit_softcapping,
        prob_floor=prob_floor,
    )
