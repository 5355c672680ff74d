"""What the most likely tokens alone prove about a divergence: a lower bound, for teachers that show no more."""

import math

import torch


def top_k_divergence_lower_bound(student_top_k_logps: torch.Tensor, teacher_top_k_logps: torch.Tensor) -> torch.Tensor:
    """
    Reverse KL between two distributions that are known on k tokens, everything else counted as one rest token.

    Merging tokens can only lower a KL, so this is a lower bound on the divergence over the full vocabulary, for any
    choice of the k tokens: a rollout that it finds outside a limit is outside, one that it finds inside may not be.
    With k = V it is the divergence itself. Computed in float64, as the rest is a difference of nearly equal numbers;
    teacher probabilities too small for that are rounded up, which keeps the bound and makes it finite.

    Args:
        student_top_k_logps (`torch.Tensor`):
            Student's log-probabilities of the k tokens, of shape `(..., k)`, normalised over the full vocabulary.
        teacher_top_k_logps (`torch.Tensor`):
            Teacher's log-probabilities of the same tokens, of shape `(..., k)`, at the same temperature.

    Returns:
        `torch.Tensor`: Lower bound of shape `(...)` in nats, at least 0, in the student's dtype and differentiable by
        the student's log-probabilities.

    Raises:
        ValueError: If the shapes differ.
    """
    if student_top_k_logps.shape != teacher_top_k_logps.shape:
        raise ValueError(
            "Student and teacher must give log-probabilities of the same tokens, got shapes "
            f"{tuple(student_top_k_logps.shape)} and {tuple(teacher_top_k_logps.shape)}."
        )
    limits = torch.finfo(torch.float64)
    student = student_top_k_logps.double().clamp(min=math.log(limits.tiny))
    teacher = teacher_top_k_logps.double().clamp(min=math.log(limits.tiny))
    # Rounding can bring the k tokens past a mass of 1; at `eps` and below the rest is rounding.
    student_rest, teacher_rest = ((1 - logps.exp().sum(-1)).clamp(min=limits.eps) for logps in (student, teacher))
    bound = (student.exp() * (student - teacher)).sum(-1) + student_rest * (student_rest.log() - teacher_rest.log())
    return bound.clamp(min=0).to(student_top_k_logps.dtype)
