"""The mathematics, on plain tensors: torch and the standard library only."""

from .advantages import constrained_advantages, group_advantages, minillm_advantages
from .budget import (
    AutoLimit,
    infeasible_steps,
    prefix_cost,
    rollout_cost,
    scheduled_limit,
    violation_weights,
)
from .divergence import chunked_divergence, chunked_log_probs, token_divergence
from .intervals import (
    bootstrap_interval,
    clopper_pearson_interval,
    two_level_bootstrap_interval,
    wilson_interval,
)
from .multipliers import DualMultiplier, FixedMultiplier, PIDMultiplier
from .rewards import modified_reward, returns_to_go, token_modified_rewards


__all__ = [
    "AutoLimit",
    "DualMultiplier",
    "FixedMultiplier",
    "PIDMultiplier",
    "bootstrap_interval",
    "chunked_divergence",
    "chunked_log_probs",
    "clopper_pearson_interval",
    "constrained_advantages",
    "group_advantages",
    "infeasible_steps",
    "minillm_advantages",
    "modified_reward",
    "prefix_cost",
    "returns_to_go",
    "rollout_cost",
    "scheduled_limit",
    "token_divergence",
    "token_modified_rewards",
    "two_level_bootstrap_interval",
    "violation_weights",
    "wilson_interval",
]
