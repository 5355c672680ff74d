"""Per-token divergences between student and teacher: dense, and from hidden states and heads in bounded memory."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .comparison import Comparison
from .head import Head, as_head
from .kernels.autograd import fused_heads
from .kernels.measures import with_prob_floor
from .kernels.memory import Workspace, default_memory_mb, slices
from .kernels.projection import Projection, accumulation_dtype, compute_dtype
from .kernels.softmax import OnlineSoftmax
from .kernels.tiles import make_pair
from .kernels.triton_heads import triton_scores


class Scores(NamedTuple):
    """
    What [`chunked_scores`] says of N positions, `(N,)` each, in nats.

    Args:
        costs (`torch.Tensor`):
            Divergences.
        student_logps (`torch.Tensor`, *optional*):
            Student's log-probabilities of the tokens, if there were any.
        teacher_logps (`torch.Tensor`, *optional*):
            Teacher's, its probability floor included.
    """

    costs: torch.Tensor
    student_logps: torch.Tensor | None = None
    teacher_logps: torch.Tensor | None = None


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
        beta, temperature, teacher_prob_floor:
            As in [`Comparison`].

    Returns:
        `torch.Tensor`: Divergence of shape `(...)`, in float32 (float64 if an input is float64).
    """
    Comparison(beta, temperature, teacher_prob_floor)  # checks them
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
    student_head: Head | torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: Head | torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    beta: float = 1.0,
    temperature: float = 1.0,
    teacher_prob_floor: float = 0.0,
    cross_entropy: bool = False,
    memory_mb: float | None = None,
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
        student_head ([`Head`] or `torch.Tensor`):
            Student's head, or its weight of shape `(V, H_s)` alone.
        teacher_hidden (`torch.Tensor`):
            Teacher hidden states of shape `(N, H_t)`.
        teacher_head ([`Head`] or `torch.Tensor`):
            Teacher's head, or its weight of shape `(V, H_t)` alone. Of two [`Head`]s the longer one may pad its
            vocabulary: the tokens that both have are compared.
        weights (`torch.Tensor`, *optional*):
            Weight of each position in the loss, of shape `(N,)`. 1 if `None`. Treated as a constant. A position of
            weight 0 contributes nothing to the loss and its gradient, also where its values are not finite.
        beta, temperature, teacher_prob_floor, cross_entropy:
            As in [`Comparison`].
        memory_mb (`float`, *optional*):
            Bound in MiB on what is vocabulary-sized beyond inputs and returned gradients. 256 if `None`, and on a CUDA
            device a share of the memory that is free. At least one row is processed at a time, and no more than are of
            use.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The loss Σ weights·costs, a scalar with gradient to the student's hidden
        states, head weight and head bias; and the costs of shape `(N,)`, in nats, without gradient. Both in float32
        (float64 if the hidden states are), accumulated in that precision also for half-precision inputs.

    Raises:
        ValueError: If shapes do not fit, a value lies outside its range, or a plain weight has another number of tokens
            than the other head.
    """
    comparison = Comparison(beta, temperature, teacher_prob_floor, cross_entropy)
    student, teacher = _on_shared_tokens(student_head, teacher_head)
    _check_same_positions(student_hidden, teacher_hidden)
    if weights is None:
        weights = torch.ones(student_hidden.shape[0], device=student_hidden.device)
    _check_one_per_position(student_hidden, weights=weights)
    pair = make_pair(student_hidden, student, teacher_hidden, teacher, comparison, memory_mb)
    rows = torch.arange(student_hidden.shape[0], device=student_hidden.device)
    _, _, loss, costs = fused_heads(pair, student_hidden, teacher_hidden, rows, weights)
    return loss, costs


def chunked_policy_divergence(
    student_hidden: torch.Tensor,
    student_head: Head | torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: Head | torch.Tensor,
    comparison: Comparison,
    token_ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    memory_mb: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Log-probabilities of sampled tokens and entropies, and the weighted exact divergence from the teacher, from one
    projection of the student.

    The divergence's loss is known here, and its gradient is formed while a tile is there, as in [`chunked_divergence`].
    The policy loss is a function of the log-probabilities that is computed afterwards, outside: in backward the student
    is projected once more on the rows whose log-probability or entropy has a derivative.

    The gradient is handed over: a second backward is an error, also on a retained graph. Under `torch.no_grad()`
    values alone are computed.

    Args:
        student_hidden (`torch.Tensor`):
            Student hidden states of shape `(N, H_s)`.
        student_head ([`Head`] or `torch.Tensor`):
            Student's head, or its weight of shape `(V_s, H_s)` alone.
        teacher_hidden (`torch.Tensor`):
            Teacher hidden states of shape `(M, H_t)`, of the M positions of weight other than 0, in order.
        teacher_head ([`Head`] or `torch.Tensor`):
            Teacher's head, or its weight of shape `(V_t, H_t)` alone. The divergence is over the tokens that both heads
            have, on which both distributions are renormalised; log-probabilities and entropies are over all V_s.
        comparison ([`Comparison`]):
            Divergence and temperature.
        token_ids (`torch.Tensor`):
            Sampled tokens of shape `(N,)`, each below V_s.
        weights (`torch.Tensor`):
            Weight of each position's divergence in the loss, of shape `(N,)`. Treated as a constant. A position of
            weight 0 is never compared with the teacher. The Triton kernel, which waits for no value, does not check
            that there are M others.
        memory_mb (`float`, *optional*):
            As in [`chunked_divergence`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]`: Log-probabilities of shape `(N,)` and entropies
        of shape `(N,)`; the loss Σ weights·costs, a scalar; all three with gradient to the student's hidden states,
        head weight and head bias; and the costs of shape `(M,)`, without. In nats, float32 (float64 if a hidden state
        is), accumulated in that precision also for half-precision inputs.

    Raises:
        ValueError: As [`chunked_divergence`].
    """
    student, teacher = _as_heads(student_head, teacher_head)
    _check_one_per_position(student_hidden, token_ids=token_ids, weights=weights)
    pair = make_pair(student_hidden, student, teacher_hidden, teacher, comparison, memory_mb)
    if pair.triton:  # which waits for no value
        rows = (weights != 0).int().argsort(descending=True, stable=True)[: len(teacher_hidden)]
    else:
        rows = weights.nonzero().squeeze(-1)  # (M,)
        if len(rows) != len(teacher_hidden):
            raise ValueError(
                f"{len(rows)} positions have a weight other than 0, but there are {len(teacher_hidden)} teacher "
                "positions."
            )
    return fused_heads(pair, student_hidden, teacher_hidden, rows, weights, token_ids)


@torch.no_grad()
def chunked_scores(
    student_hidden: torch.Tensor,
    student_head: Head | torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: Head | torch.Tensor,
    comparison: Comparison,
    token_ids: torch.Tensor | None = None,
    *,
    memory_mb: float | None = None,
) -> Scores:
    """
    Divergences, and both models' log-probabilities of sampled tokens, without gradient, from one projection of each.

    Args:
        student_hidden, student_head, teacher_hidden, teacher_head:
            As in [`chunked_divergence`]. All distributions are over the tokens that both heads have.
        comparison ([`Comparison`]):
            Divergence and temperature.
        token_ids (`torch.Tensor`, *optional*):
            Sampled tokens of shape `(N,)`, each below V.
        memory_mb (`float`, *optional*):
            As in [`chunked_divergence`].

    Returns:
        [`Scores`]: In float32 (float64 if the hidden states are).

    Raises:
        ValueError: As [`chunked_divergence`].
    """
    student, teacher = _on_shared_tokens(student_head, teacher_head)
    _check_same_positions(student_hidden, teacher_hidden)
    pair = make_pair(student_hidden, student, teacher_hidden, teacher, comparison, memory_mb)
    if pair.triton:
        of_rows = triton_scores(pair, student_hidden, teacher_hidden, token_ids)
        return Scores(of_rows.cost, *((of_rows.log_prob, of_rows.teacher_log_prob) if token_ids is not None else ()))
    num_rows = student_hidden.shape[0]
    workspace = pair.workspace(num_rows, keep_tiles=True)
    scores = student_hidden.new_empty((1 if token_ids is None else 3, num_rows), dtype=pair.student.dtype)
    with torch.autocast(student_hidden.device.type, enabled=False):
        for rows in slices(0, num_rows, workspace.num_rows):
            chosen = None if token_ids is None else token_ids[rows]
            statistics = pair.statistics(workspace, student_hidden[rows], teacher_hidden[rows], chosen)
            assert statistics.compared is not None
            values = (statistics.compared.costs, statistics.log_probs, statistics.compared.teacher_log_probs)
            for score, value in zip(scores, values, strict=False):
                score[rows] = value
    return Scores(*scores)


@torch.no_grad()
def chunked_log_probs(
    hidden: torch.Tensor,
    head: Head | torch.Tensor,
    token_ids: torch.Tensor,
    temperature: float = 1.0,
    *,
    prob_floor: float = 0.0,
    memory_mb: float | None = None,
) -> torch.Tensor:
    """
    Log-probabilities of given tokens from hidden states and a language-model head, in tiles and without gradient.

    Args:
        hidden (`torch.Tensor`):
            Hidden states of shape `(N, H)`.
        head ([`Head`] or `torch.Tensor`):
            Head, or its weight of shape `(V, H)` alone.
        token_ids (`torch.Tensor`):
            Tokens of shape `(N,)`, or `(N, k)` for several at each position, each below V.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature.
        prob_floor (`float`, *optional*, defaults to `0.0`):
            Mixture with the uniform distribution, as the teacher's in [`Comparison`].
        memory_mb (`float`, *optional*):
            As in [`chunked_divergence`].

    Returns:
        `torch.Tensor`: Log-probabilities of the shape of `token_ids`, in nats, float32 (float64 if the hidden states are).
    """
    head = as_head(head)
    dtype, num_rows, vocab_size = accumulation_dtype(hidden), hidden.shape[0], head.vocab_size
    if memory_mb is None:
        memory_mb = default_memory_mb(hidden.device)
    projection = Projection(head, temperature, compute_dtype(hidden), dtype, memory_mb)
    workspace = Workspace(num_rows, vocab_size, False, hidden.device, dtype, memory_mb)
    log_probs = torch.empty(token_ids.shape, device=hidden.device, dtype=dtype)  # (N,) or (N, k)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in slices(0, num_rows, workspace.num_rows):
            softmax = OnlineSoftmax(token_ids[rows].reshape(rows.stop - rows.start, -1).t())
            softmax.add_vocabulary(projection, projection.rows(hidden[rows]), workspace, 0, vocab_size)
            chosen = with_prob_floor(softmax.log_probs, prob_floor, vocab_size)  # (k, n)
            log_probs[rows] = chosen.t().reshape(token_ids[rows].shape)
    return log_probs


def _as_heads(student: Head | torch.Tensor, teacher: Head | torch.Tensor) -> tuple[Head, Head]:
    """Both heads. Of plain weights nothing says that what one has more is padding."""
    plain = isinstance(student, torch.Tensor) or isinstance(teacher, torch.Tensor)
    student, teacher = as_head(student), as_head(teacher)
    if plain and student.vocab_size != teacher.vocab_size:
        raise ValueError(
            f"The student's head has {student.vocab_size} tokens and the teacher's {teacher.vocab_size}. Slice both "
            "weights to the tokens that the two vocabularies share, or pass a `Head` for each, which are compared on "
            "their first tokens."
        )
    return student, teacher


def _on_shared_tokens(student: Head | torch.Tensor, teacher: Head | torch.Tensor) -> tuple[Head, Head]:
    student, teacher = _as_heads(student, teacher)
    vocab_size = min(student.vocab_size, teacher.vocab_size)
    return student.first(vocab_size), teacher.first(vocab_size)


def _check_same_positions(student_hidden: torch.Tensor, teacher_hidden: torch.Tensor) -> None:
    if student_hidden.shape[0] != teacher_hidden.shape[0]:
        raise ValueError(
            f"{student_hidden.shape[0]} student positions against {teacher_hidden.shape[0]} teacher positions: both "
            "must be the same tokens."
        )


def _check_one_per_position(student_hidden: torch.Tensor, **tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != student_hidden.shape[:1]:
            raise ValueError(
                f"`{name}` must have one entry for each of the {student_hidden.shape[0]} positions, got shape "
                f"{tuple(tensor.shape)}."
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
