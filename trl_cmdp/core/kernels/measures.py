"""The divergences and their gradients, on blocks of log-probabilities of a tile."""

import math

import torch

from ..comparison import Comparison


# Beyond this the smaller of two probabilities has no weight against the larger in either precision's sums.
_LARGEST_LOG_RATIO = 80.0


def block_costs(
    comparison: Comparison,
    logps: torch.Tensor,
    teacher_logps: torch.Tensor,
    gap: torch.Tensor,
    spare: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    A block's part of the cost, and of the centre that the gradient is taken about. All four blocks are consumed.

    Every KL is summed as Σ (p·log(p/q) + q − p). The last two add up to 0; with them a rounding error in either
    normaliser has no effect in first order, which in float32 would dominate the KL of two close distributions. The
    JSD, whose mixture is of the same p and q, needs no such terms.
    """
    beta = comparison.beta
    if comparison.cross_entropy:
        cost = zero_where_impossible_(teacher_logps.mul_(logps.exp_())).sum(0).neg_()
        return cost, cost
    if beta == 0.0:  # KL(μ‖π)
        torch.sub(teacher_logps, logps, out=gap)
        teacher_probs, probs = teacher_logps.exp_(), logps.exp_()
        cost = zero_where_impossible_(gap.mul_(teacher_probs)).sum(0)
        cost += probs.sub_(teacher_probs).sum(0)
        return cost, cost
    torch.sub(logps, teacher_logps, out=gap)
    probs, teacher_probs = logps.exp_(), teacher_logps.exp_()
    if beta == 1.0:  # KL(π‖μ)
        centre = zero_where_impossible_(gap.mul_(probs)).sum(0)
        return centre + teacher_probs.sub_(probs).sum(0), centre
    mixture_gap = _mixture_gap(gap, beta, spare)  # log π − log m
    teacher_gap = torch.sub(mixture_gap, gap, out=gap)  # log μ − log m
    cost = zero_where_impossible_(teacher_gap.mul_(teacher_probs)).sum(0)
    centre = zero_where_impossible_(mixture_gap.mul_(probs)).sum(0)  # KL(π‖m)
    return beta * cost + (1.0 - beta) * centre, centre


def gradient_factor(comparison: Comparison) -> float:
    """Factor that [`block_gradient`] leaves to its caller."""
    return 1.0 if comparison.cross_entropy or comparison.beta in (0.0, 1.0) else 1.0 - comparison.beta


def block_gradient(
    comparison: Comparison, logps: torch.Tensor, teacher_logps: torch.Tensor, centre: torch.Tensor
) -> torch.Tensor:
    """Gradient of the costs by the student's logits z over [`gradient_factor`], on a block. Both blocks are consumed."""
    if comparison.cross_entropy:  # π·(−log μ − H(π, μ))
        gap = teacher_logps.neg_()
    elif comparison.beta == 0.0:  # π − μ
        return torch.sub(logps.exp_(), teacher_logps.exp_(), out=teacher_logps)
    else:  # π·(log π − log m − KL(π‖m)), with m = μ or the mixture of the JSD
        gap = torch.sub(logps, teacher_logps, out=teacher_logps)
        if comparison.beta < 1.0:
            gap = _mixture_gap(gap, comparison.beta, gap)
    return zero_where_impossible_(gap.sub_(centre).mul_(logps.exp_()))


def with_prob_floor(
    logps: torch.Tensor, floor: float, vocab_size: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Log-probabilities of the mixture (1 − ε)·μ + ε/V with the uniform distribution."""
    if floor == 0.0:
        return logps
    return torch.logaddexp(logps + math.log1p(-floor), logps.new_tensor(math.log(floor / vocab_size)), out=out)


def zero_where_impossible_(products: torch.Tensor) -> torch.Tensor:
    """
    Probability times log-probability, in place: 0·∞ of an impossible token is 0, and ∞ stays. The caller marks the rows
    that have no distribution. On a CPU a mask would take ten times as long.
    """
    return products.nan_to_num_(0.0, math.inf, -math.inf)


def _mixture_gap(gap: torch.Tensor, beta: float, out: torch.Tensor) -> torch.Tensor:
    """log π − log m = −log(1 + β·(μ/π − 1)) from log π − log μ, which is left clamped; no cancellation near μ = π."""
    gap.clamp_(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    return torch.neg(gap, out=out).expm1_().mul_(beta).log1p_().neg_()
