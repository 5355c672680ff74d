"""What is compared between two next-token distributions."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Comparison:
    """
    A divergence between student and teacher, and the distributions that it is taken of.

    Args:
        beta (`float`, *optional*, defaults to `1.0`):
            `1.0` is the reverse KL(π‖μ), `0.0` the forward KL(μ‖π), anything between the generalised JSD with mixture
            (1 − beta)·π + beta·μ. The convention of TRL's `DistillationConfig.beta`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature that the logits of both models are divided by.
        teacher_prob_floor (`float`, *optional*, defaults to `0.0`):
            ε of the mixture (1 − ε)·μ + ε/V that replaces the teacher. A positive value bounds the reverse KL by
            log(V/ε).
        cross_entropy (`bool`, *optional*, defaults to `False`):
            Take −Σ_a π(a|s)·log μ(a|s) in place of the divergence, whatever `beta`: the teacher's expected negative
            log-likelihood of the student's next token (2610.00332), reverse KL plus the student's entropy.

    Raises:
        ValueError: If a value lies outside its range.
    """

    beta: float = 1.0
    temperature: float = 1.0
    teacher_prob_floor: float = 0.0
    cross_entropy: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"`beta` must lie in [0, 1] (0 is forward KL, 1 reverse KL), got {self.beta}.")
        if not self.temperature > 0.0:
            raise ValueError(f"`temperature` must be positive, got {self.temperature}.")
        if not 0.0 <= self.teacher_prob_floor < 1.0:
            raise ValueError(f"`teacher_prob_floor` must lie in [0, 1), got {self.teacher_prob_floor}.")
