"""
The core's functions of two heads under their own names: by TRL's kernels where they are the device's
(`core/kernels/choice.py`) and cover what is asked, and otherwise the core's.
"""

import torch

from .. import core
from ..core import Comparison, Head, Scores
from ..core.kernels.choice import kernel_of


# TRL's tiles: at each of their entries logits of both models in float32, and their gradient in half precision.
_TRL_ROWS, _TRL_TOKENS, _TRL_BYTES = 4_096, 32_768, 4 + 4 + 2


def chunked_divergence(
    student_hidden: torch.Tensor,
    student_head: Head,
    teacher_hidden: torch.Tensor,
    teacher_head: Head,
    weights: torch.Tensor,
    *,
    memory_mb: float | None = None,
    **comparison: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`~core.chunked_divergence`]."""
    models = student_hidden, student_head, teacher_hidden, teacher_head
    if not _trl_covers(*models, compared := Comparison(**comparison), memory_mb):
        return core.chunked_divergence(*models, weights, **comparison, memory_mb=memory_mb)
    weighted, costs = weights != 0, torch.empty_like(weights, dtype=torch.float32)
    differentiable = _trl_costs(
        student_hidden[weighted], student_head, teacher_hidden[weighted], teacher_head, compared
    )
    # In a backward over all rows, one of weight 0 that is not finite would reach the gradient of the head.
    with torch.no_grad():
        costs[weighted] = differentiable
        costs[~weighted] = _trl_costs(
            student_hidden[~weighted], student_head, teacher_hidden[~weighted], teacher_head, compared
        )
    return (weights[weighted].detach() * differentiable).sum(), costs


def chunked_policy_divergence(
    student_hidden: torch.Tensor,
    student_head: Head,
    teacher_hidden: torch.Tensor,
    teacher_head: Head,
    comparison: Comparison,
    token_ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    memory_mb: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    [`~core.chunked_policy_divergence`]. By TRL's kernels the log-probabilities are those of its `GRPOTrainer`, whose
    logits are rounded to the dtype of the product.
    """
    models = student_hidden, student_head, teacher_hidden, teacher_head
    if not _trl_covers(*models, comparison, memory_mb):
        return core.chunked_policy_divergence(*models, comparison, token_ids, weights, memory_mb=memory_mb)
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    log_probs, entropy, *_ = ChunkedLogProbFunction.apply(
        student_hidden,
        student_head.weight,
        student_head.bias,
        token_ids,
        comparison.temperature,
        _TRL_TOKENS,
        student_head.softcap,
        student_head.logit_scale,
        ("entropy",),
    )
    rows = weights.nonzero().squeeze(-1)  # (M,)
    costs = _trl_costs(student_hidden[rows], student_head, teacher_hidden, teacher_head, comparison)
    return log_probs, entropy, (weights[rows].detach() * costs).sum(), costs.detach()


@torch.no_grad()
def chunked_scores(
    student_hidden: torch.Tensor,
    student_head: Head,
    teacher_hidden: torch.Tensor,
    teacher_head: Head,
    comparison: Comparison,
    token_ids: torch.Tensor | None = None,
    *,
    memory_mb: float | None = None,
) -> Scores:
    """[`~core.chunked_scores`]. Log-probabilities are the core's: TRL's would have rounded logits."""
    models = student_hidden, student_head, teacher_hidden, teacher_head
    if token_ids is None and _trl_covers(*models, comparison, memory_mb):
        return Scores(_trl_costs(*models, comparison))
    return core.chunked_scores(*models, comparison, token_ids, memory_mb=memory_mb)


def _trl_covers(
    student_hidden: torch.Tensor,
    student_head: Head,
    teacher_hidden: torch.Tensor,
    teacher_head: Head,
    comparison: Comparison,
    memory_mb: float | None,
) -> bool:
    """
    Whether TRL's kernels are the device's and give what is asked: not a floor, a cross-entropy, sums in float64, a bias
    of −∞ (an impossible token, which they make NaN) or tiles of less memory.
    """
    taken_mb = min(len(student_hidden), _TRL_ROWS) * _TRL_TOKENS * _TRL_BYTES / 2**20
    return (
        kernel_of(student_hidden.device) == "trl"
        and torch.float64 not in (student_hidden.dtype, teacher_hidden.dtype)
        and comparison.teacher_prob_floor == 0.0
        and not comparison.cross_entropy
        and (memory_mb is None or memory_mb >= taken_mb)
        and all(head.bias is None or bool(head.bias.isfinite().all()) for head in (student_head, teacher_head))
    )


def _trl_costs(
    student_hidden: torch.Tensor,
    student_head: Head,
    teacher_hidden: torch.Tensor,
    teacher_head: Head,
    comparison: Comparison,
) -> torch.Tensor:
    """Costs (N,) over the tokens that both heads have, differentiable."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    shared = min(student_head.vocab_size, teacher_head.vocab_size)
    student, teacher = student_head.first(shared), teacher_head.first(shared)
    costs, _ = ChunkedDivergenceFunction.apply(
        student_hidden,
        student.weight,
        student.bias,
        teacher_hidden,
        teacher.weight,
        teacher.bias,
        comparison.beta,
        comparison.temperature,
        student.logit_scale,
        student.softcap,
        teacher.logit_scale,
        teacher.softcap,
    )
    return costs
