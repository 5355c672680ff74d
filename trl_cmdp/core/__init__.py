"""The mathematics, on plain tensors: torch and the standard library only."""

from .advantages import constrained_advantages, group_advantages
from .budget import infeasible_steps, prefix_cost, rollout_cost, violation_weights
from .divergence import chunked_divergence, token_divergence
from .intervals import bootstrap_interval, clopper_pearson_interval, wilson_interval
from .multipliers import DualMultiplier, FixedMultiplier, PIDMultiplier
from .rewards import modified_reward, returns_to_go, token_modified_rewards


__all__ = [
    "DualMultiplier",
    "FixedMultiplier",
    "PIDMultiplier",
    "bootstrap_interval",
    "chunked_divergence",
    "clopper_pearson_interval",
    "constrained_advantages",
    "group_advantages",
    "infeasible_steps",
    "modified_reward",
    "prefix_cost",
    "returns_to_go",
    "rollout_cost",
    "token_divergence",
    "token_modified_rewards",
    "violation_weights",
    "wilson_interval",
]
