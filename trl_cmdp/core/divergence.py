"""Per-token divergences between student and teacher: dense, and from hidden states in tiles of bounded memory."""

import math

import torch
import torch.nn.functional as F

from ._fused import FusedHeads
from ._head import Head, OnlineSoftmax, Workspace, accumulation_dtype, compute_dtype
from ._measures import check_divergence, with_prob_floor
from ._tiles import Tile, make_heads


def token_divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    beta: float = 1.0,
    temperature: float = 1.0,
    *,
    teacher_prob_floor: float = 0.0,
) -> torch.Tensor:
    """
    Exact divergence c_t = D(π(.|s_t), μ(.|s_t)) between two next-token distributions, in nats (2509.22921, eq. for
    the per-step cost; the generalised Jensen-Shannon divergence is 2306.13649, eq. 3).

    Differentiable with respect to both logits. Entries of −inf are impossible tokens: they contribute nothing where
    the first distribution is 0 (or below what its precision can hold), and make a KL infinite where only the second is.

    Args:
        student_logits (`torch.Tensor`):
            Student logits of shape `(..., V)`.
        teacher_logits (`torch.Tensor`):
            Teacher logits of shape `(..., V)`.
        beta (`float`, *optional*, defaults to `1.0`):
            `1.0` is the reverse KL(π‖μ), `0.0` the forward KL(μ‖π), anything between the generalised JSD with mixture
            (1 − beta)·π + beta·μ. The convention of TRL's `DistillationConfig.beta`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature that both logits are divided by.
        teacher_prob_floor (`float`, *optional*, defaults to `0.0`):
            ε of the mixture (1 − ε)·μ + ε/V that replaces the teacher. A positive value bounds the reverse KL by
            log(V/ε).

    Returns:
        `torch.Tensor`: Divergence of shape `(...)`, in float32 (float64 if an input is float64).
    """
    check_divergence(beta, temperature, teacher_prob_floor)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"Student logits of shape {tuple(student_logits.shape)} and teacher logits of shape "
            f"{tuple(teacher_logits.shape)} differ. Slice both to the tokens that the two vocabularies share."
        )
    dtype = accumulation_dtype(student_logits, teacher_logits)
    student_logps = F.log_softmax(student_logits.to(dtype) / temperature, dim=-1)  # (..., V)
    teacher_logps = F.log_softmax(teacher_logits.to(dtype) / temperature, dim=-1)  # (..., V)
    teacher_logps = with_prob_floor(teacher_logps, teacher_prob_floor, teacher_logps.shape[-1])
    if beta == 1.0:
        return _kl(student_logps, teacher_logps)
    if beta == 0.0:
        return _kl(teacher_logps, student_logps)
    # Where both are −inf, `logaddexp` has a NaN derivative: a finite log of 0 takes its place.
    finite_logps = student_logps.clamp(min=torch.finfo(dtype).min)
    mixture_logps = torch.logaddexp(finite_logps + math.log1p(-beta), teacher_logps + math.log(beta))
    return beta * _kl(teacher_logps, mixture_logps) + (1 - beta) * _kl(student_logps, mixture_logps)


def chunked_divergence(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    weights: torch.Tensor | None = None,
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Weighted exact divergence from hidden states and language-model heads, without either model's full logits.

    Rows are processed in tiles of at most `memory_mb`. As the weights are known beforehand, the gradient is formed
    in the same pass as the value, and neither model is projected again in backward, which hands the gradient over: a
    second backward is an error, also on a retained graph. A head that needs no gradient costs none. Under
    `torch.no_grad()` only the costs are computed.

    Args:
        student_hidden (`torch.Tensor`):
            Student hidden states of shape `(N, H_s)`: the positions that count, and no others.
        student_weight (`torch.Tensor`):
            Weight of the student's head, of shape `(V, H_s)`.
        teacher_hidden (`torch.Tensor`):
            Teacher hidden states of shape `(N, H_t)`.
        teacher_weight (`torch.Tensor`):
            Weight of the teacher's head, of shape `(V, H_t)`.
        weights (`torch.Tensor`, *optional*):
            Weight of each position in the loss, of shape `(N,)`. 1 if `None`. Treated as a constant. A position of
            weight 0 contributes nothing to the loss and its gradient, also where its values are not finite.
        beta (`float`, *optional*, defaults to `1.0`):
            Divergence, as in [`token_divergence`].
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of both models.
        student_bias (`torch.Tensor`, *optional*):
            Bias of the student's head, of shape `(V,)`.
        teacher_bias (`torch.Tensor`, *optional*):
            Bias of the teacher's head, of shape `(V,)`.
        memory_mb (`float`, *optional*, defaults to `256`):
            Bound in MiB on what is vocabulary-sized beyond inputs and returned gradients. At least one row is processed
            at a time, and on a CPU no more than are of use.
        student_logit_scale (`float`, *optional*, defaults to `1.0`):
            Factor on the student's logits (Cohere, Granite, Falcon-H1).
        teacher_logit_scale (`float`, *optional*, defaults to `1.0`):
            Factor on the teacher's logits.
        student_final_logit_softcapping (`float`, *optional*):
            Soft cap c of c·tanh(logits/c), applied to the student's logits after the scale (Gemma).
        teacher_final_logit_softcapping (`float`, *optional*):
            Soft cap of the teacher's logits.
        teacher_prob_floor (`float`, *optional*, defaults to `0.0`):
            Mixture of the teacher with the uniform distribution, as in [`token_divergence`].
        cross_entropy (`bool`, *optional*, defaults to `False`):
            Take −Σ_a π(a|s)·log μ(a|s) in place of the divergence, whatever `beta`: the teacher's expected negative
            log-likelihood of the student's next token (2610.00332), reverse KL plus the student's entropy.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The loss Σ weights·costs, a scalar with gradient to the student's hidden
        states, head weight and head bias; and the costs of shape `(N,)`, in nats, without gradient. Both in float32
        (float64 if the hidden states are), accumulated in that precision also for half-precision inputs.
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
    _check_same_tokens(student_hidden, student_weight, teacher_hidden, teacher_weight)
    if weights is None:
        weights = torch.ones(student_hidden.shape[0], device=student_hidden.device)
    elif weights.shape != student_hidden.shape[:1]:
        raise ValueError(
            f"`weights` must have one entry for each of the {student_hidden.shape[0]} positions, got shape "
            f"{tuple(weights.shape)}."
        )
    _, _, loss, costs = FusedHeads.apply(  # type: ignore[no-untyped-call]
        student_hidden,
        student_weight,
        student_bias,
        teacher_hidden,
        torch.arange(student_hidden.shape[0], device=student_hidden.device),
        weights.detach(),
        None,
        None,
        heads,
    )
    return loss, costs


@torch.no_grad()
def chunked_scores(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    token_ids: torch.Tensor,
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Divergence and both models' log-probabilities of sampled tokens, without gradient, from one projection of each.

    Args:
        token_ids (`torch.Tensor`):
            Sampled tokens of shape `(N,)`, each below V.
        student_hidden, student_weight, teacher_hidden, teacher_weight, beta, temperature, student_bias, teacher_bias:
            As in [`chunked_divergence`].
        memory_mb, student_logit_scale, teacher_logit_scale, student_final_logit_softcapping:
            As in [`chunked_divergence`].
        teacher_final_logit_softcapping, teacher_prob_floor, cross_entropy:
            As in [`chunked_divergence`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: Costs, the student's log-probabilities and the teacher's,
        its probability floor included, of shape `(N,)` each, in nats, float32 (float64 if the hidden states are).
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
    _check_same_tokens(student_hidden, student_weight, teacher_hidden, teacher_weight)
    num_rows = student_hidden.shape[0]
    scores = torch.empty((3, num_rows), device=student_hidden.device, dtype=heads.student.accumulation)
    workspace = heads.workspace(num_rows, 2)
    with torch.autocast(student_hidden.device.type, enabled=False):
        for rows in workspace.batches(num_rows):
            tile = Tile(heads, workspace, student_hidden[rows], teacher_hidden[rows], token_ids[rows])
            teacher_logps = with_prob_floor(tile.teacher.log_probs[0], teacher_prob_floor, heads.vocab_size)
            scores[:, rows] = torch.stack((tile.costs(), tile.student.log_probs[0], teacher_logps))
    costs, student_logps, teacher_logps = scores
    return costs, student_logps, teacher_logps


@torch.no_grad()
def chunked_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    temperature: float = 1.0,
    bias: torch.Tensor | None = None,
    memory_mb: float = 256,
    *,
    logit_scale: float = 1.0,
    final_logit_softcapping: float | None = None,
    prob_floor: float = 0.0,
) -> torch.Tensor:
    """
    Log-probabilities of given tokens from hidden states and a language-model head, in tiles and without gradient.

    Args:
        hidden (`torch.Tensor`):
            Hidden states of shape `(N, H)`.
        weight (`torch.Tensor`):
            Weight of the head, of shape `(V, H)`.
        token_ids (`torch.Tensor`):
            Tokens of shape `(N,)`, or `(N, k)` for several at each position, each below V.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature.
        bias (`torch.Tensor`, *optional*):
            Bias of the head, of shape `(V,)`.
        memory_mb (`float`, *optional*, defaults to `256`):
            Bound on what is vocabulary-sized, in MiB, as in [`chunked_divergence`].
        logit_scale (`float`, *optional*, defaults to `1.0`):
            Factor on the logits.
        final_logit_softcapping (`float`, *optional*):
            Soft cap of the logits.
        prob_floor (`float`, *optional*, defaults to `0.0`):
            Mixture with the uniform distribution, as in [`token_divergence`].

    Returns:
        `torch.Tensor`: Log-probabilities of the shape of `token_ids`, in nats, float32 (float64 if the hidden states are).
    """
    dtype, num_rows, vocab_size = accumulation_dtype(hidden), hidden.shape[0], weight.shape[0]
    head = Head(
        weight, bias, logit_scale, final_logit_softcapping, temperature, compute_dtype(hidden), dtype, memory_mb
    )
    workspace = Workspace(num_rows, vocab_size, 0, hidden.device, dtype, memory_mb)
    log_probs = torch.empty(token_ids.shape, device=hidden.device, dtype=dtype)  # (N,) or (N, k)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in workspace.batches(num_rows):
            softmax = OnlineSoftmax(token_ids[rows].reshape(rows.stop - rows.start, -1).t())
            softmax.add_vocabulary(head, head.rows(hidden[rows]), workspace, 0, vocab_size)
            chosen = with_prob_floor(softmax.log_probs, prob_floor, vocab_size)  # (k, n)
            log_probs[rows] = chosen.t().reshape(token_ids[rows].shape)
    return log_probs


def _check_same_tokens(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
) -> None:
    if student_weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            f"The student's head has {student_weight.shape[0]} tokens and the teacher's {teacher_weight.shape[0]}. "
            "Slice both heads to the tokens that the two vocabularies share."
        )
    if student_hidden.shape[0] != teacher_hidden.shape[0]:
        raise ValueError(
            f"{student_hidden.shape[0]} student positions against {teacher_hidden.shape[0]} teacher positions: both "
            "must be the same tokens."
        )


def _kl(logps: torch.Tensor, reference_logps: torch.Tensor) -> torch.Tensor:
    """
    KL(p‖q) as Σ (p·log(p/q) + q − p). The last two add up to 0; with them a rounding error in either normaliser has no
    effect in first order, which in float32 would dominate the KL of two close distributions.
    """
    probs = logps.exp()
    # Where p is 0, in fact or by underflow, it has no weight: 0·∞ and −inf − (−inf) would be NaN.
    gap = (logps - reference_logps).masked_fill_(probs == 0, 0.0)
    return (probs * gap + (reference_logps.exp() - probs)).sum(-1)
