"""What a method is made of: rollouts in, a signal out (docs/math.md, "A method is a signal")."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Rollouts:
    """
    What a signal is made from: one generation batch of all processes, whole groups after one another.

    Args:
        rewards (`torch.Tensor`):
            Weighted task rewards of shape `(B,)`, NaN where no reward function scored the rollout.
        costs (`torch.Tensor` or `None`):
            Per-token divergences of shape `(B, T)`, in nats, 0 where masked. `None` from a teacher that knows
            log-probabilities alone.
        mask (`torch.Tensor`):
            Mask of shape `(B, T)` of the completion tokens that count.
        num_generations (`int`):
            Rollouts per prompt, G.
        horizon (`int`):
            `max_completion_length`, H.
        teacher_index (`torch.Tensor`):
            Index of each rollout's teacher, of shape `(B,)`.
        student_logps (`torch.Tensor`, *optional*):
            Student's log-probabilities of the sampled tokens, of shape `(B, T)`, for a method that needs them.
        teacher_logps (`torch.Tensor`, *optional*):
            Teacher's, of shape `(B, T)`.
        divergence_lower_bound (`torch.Tensor`, *optional*):
            Lower bound of each divergence from the teacher's likeliest tokens, of shape `(B, T)`. Never a cost.
        grpo_advantages (`torch.Tensor`, *optional*):
            GRPO's own advantages of shape `(B,)`, as TRL has computed them of all rewards.
        rewards_per_func (`torch.Tensor`, *optional*):
            Rewards of shape `(B, F)`, before they are weighted, NaN where a function did not score the rollout.
    """

    rewards: torch.Tensor
    costs: torch.Tensor | None
    mask: torch.Tensor
    num_generations: int
    horizon: int
    teacher_index: torch.Tensor
    student_logps: torch.Tensor | None = None
    teacher_logps: torch.Tensor | None = None
    divergence_lower_bound: torch.Tensor | None = None
    grpo_advantages: torch.Tensor | None = None
    rewards_per_func: torch.Tensor | None = None


@dataclass
class Signal:
    """
    What a method makes of the rollouts.

    Args:
        advantages (`torch.Tensor`):
            Advantages of shape `(B,)` or `(B, T)`, for TRL's policy loss.
        divergence_weights (`torch.Tensor` or `None`):
            Weights w_t of shape `(B, T)` of the differentiated divergence; `None` if the method has none.
        columns (`dict[str, list]`):
            Columns added to the completions table, `B` values each.
    """

    advantages: torch.Tensor
    divergence_weights: torch.Tensor | None
    columns: dict[str, list[Any]]
