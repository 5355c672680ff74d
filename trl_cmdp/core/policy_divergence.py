"""The policy's log-probabilities and its divergence from the teacher, from one projection of the student."""

import torch

from ._fused import FusedHeads
from ._tiles import make_heads


def chunked_policy_divergence(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    token_ids: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    weights: torch.Tensor,
    log_prob_grad: torch.Tensor | None = None,
    beta: float = 1.0,
    temperature: float = 1.0,
    student_bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    memory_mb: float = 256,
    *,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    teacher_prob_floor: float = 0.0,
    cross_entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Log-probabilities of sampled tokens and entropies, and the weighted exact divergence from the teacher, from one
    projection of the student.

    The policy loss is a function of the log-probabilities that is computed afterwards, outside; the divergence's loss
    is known here. The forward pass forms, while a tile is there, the gradient of

        loss + Σ log_prob_grad·log_probs,

    where `log_prob_grad` is what the derivative of the whole loss by each log-probability is *expected* to be, for a
    divergence loss that enters with factor 1. On policy it is known beforehand: −advantage × weight of the token. The
    backward pass is given the actual derivatives u of the log-probabilities, g of the entropies and s of the loss. It
    takes s times the gradient that is there and adds what is missing: rows where u is not s·log_prob_grad, up to
    rounding, or where g is not 0 are projected once more, by the student alone. So the gradient is exact whatever was
    expected, and a right expectation saves a projection and a second product for the head's gradient.

    The gradient is handed over: a second backward is an error, also on a retained graph. Under `torch.no_grad()`
    values alone are computed.

    Args:
        student_hidden (`torch.Tensor`):
            Student hidden states of shape `(N, H_s)`.
        student_weight (`torch.Tensor`):
            Weight of the student's head, of shape `(V_s, H_s)`.
        token_ids (`torch.Tensor`):
            Sampled tokens of shape `(N,)`, each below V_s.
        teacher_hidden (`torch.Tensor`):
            Teacher hidden states of shape `(M, H_t)`, of the M positions of weight other than 0, in order.
        teacher_weight (`torch.Tensor`):
            Weight of the teacher's head, of shape `(V_t, H_t)`. The divergence is over the first V = min(V_s, V_t)
            tokens, on which both distributions are renormalised; log-probabilities and entropies are over all V_s.
        weights (`torch.Tensor`):
            Weight of each position's divergence in the loss, of shape `(N,)`. Treated as a constant. A position of
            weight 0 is never compared with the teacher.
        log_prob_grad (`torch.Tensor`, *optional*):
            Expected derivative by each log-probability, of shape `(N,)`. 0 if `None`. Treated as a constant.
        beta, temperature, memory_mb, teacher_prob_floor, cross_entropy:
            As in [`chunked_divergence`].
        student_bias (`torch.Tensor`, *optional*):
            Bias of the student's head, of shape `(V_s,)`.
        teacher_bias (`torch.Tensor`, *optional*):
            Bias of the teacher's head, of shape `(V_t,)`.
        student_logit_scale, student_final_logit_softcapping:
            As in [`chunked_divergence`].
        teacher_logit_scale, teacher_final_logit_softcapping:
            As in [`chunked_divergence`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]`: Log-probabilities of shape `(N,)` and entropies
        of shape `(N,)`; the loss Σ weights·costs, a scalar; all three with gradient to the student's hidden states,
        head weight and head bias; and the costs of shape `(M,)`, without. In nats, float32 (float64 if a hidden state
        is), accumulated in that precision also for half-precision inputs.
    """
    heads = make_heads(
        student_hidden,
        student_weight,
        student_bias,
        student_logit_scale,
        student_final_logit_softcapping,
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        teacher_logit_scale,
        teacher_final_logit_softcapping,
        beta,
        temperature,
        teacher_prob_floor,
        cross_entropy,
        memory_mb,
    )
    for name, tensor in (("token_ids", token_ids), ("weights", weights), ("log_prob_grad", log_prob_grad)):
        if tensor is not None and tensor.shape != student_hidden.shape[:1]:
            raise ValueError(
                f"`{name}` must have one entry for each of the {student_hidden.shape[0]} positions, got shape "
                f"{tuple(tensor.shape)}."
            )
    teacher_rows = weights.nonzero().squeeze(-1)  # (M,)
    if len(teacher_rows) != len(teacher_hidden):
        raise ValueError(
            f"{len(teacher_rows)} positions have a weight other than 0, but there are {len(teacher_hidden)} teacher "
            "positions."
        )
    log_probs, entropy, loss, costs = FusedHeads.apply(  # type: ignore[no-untyped-call]
        student_hidden,
        student_weight,
        student_bias,
        teacher_hidden,
        teacher_rows,
        weights.detach(),
        token_ids,
        None if log_prob_grad is None else log_prob_grad.detach(),
        heads,
    )
    return log_probs, entropy, loss, costs
