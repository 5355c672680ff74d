"""The mathematics, on plain tensors: torch, the standard library, and scipy for statistics."""

from .advantages import constrained_advantages, group_advantages, minillm_advantages
from .budget import (
    AutoLimit,
    LimitRange,
    candidate_limits,
    cost_quantiles,
    infeasible_steps,
    prefix_cost,
    rollout_cost,
    scheduled_limit,
    suggested_limit_range,
)
from .comparison import Comparison
from .divergence import (
    Scores,
    chunked_divergence,
    chunked_log_probs,
    chunked_policy_divergence,
    chunked_scores,
    token_divergence,
)
from .divergence_weights import RewardRange, unrewarded_weights, violation_weights
from .head import Head
from .intervals import (
    bootstrap_interval,
    clopper_pearson_interval,
    clustered_rate_interval,
    two_level_bootstrap_interval,
    wilson_interval,
)
from .kernels.memory import default_memory_mb
from .lower_bound import top_k_divergence_lower_bound
from .multipliers import DualMultiplier, FixedMultiplier, PIDMultiplier
from .rewards import modified_reward, returns_to_go, token_modified_rewards


__all__ = [
    "AutoLimit",
    "Comparison",
    "DualMultiplier",
    "FixedMultiplier",
    "Head",
    "LimitRange",
    "PIDMultiplier",
    "RewardRange",
    "Scores",
    "bootstrap_interval",
    "candidate_limits",
    "chunked_divergence",
    "chunked_log_probs",
    "chunked_policy_divergence",
    "chunked_scores",
    "clopper_pearson_interval",
    "clustered_rate_interval",
    "constrained_advantages",
    "cost_quantiles",
    "default_memory_mb",
    "group_advantages",
    "infeasible_steps",
    "minillm_advantages",
    "modified_reward",
    "prefix_cost",
    "returns_to_go",
    "rollout_cost",
    "scheduled_limit",
    "suggested_limit_range",
    "token_divergence",
    "token_modified_rewards",
    "top_k_divergence_lower_bound",
    "two_level_bootstrap_interval",
    "unrewarded_weights",
    "violation_weights",
    "wilson_interval",
]
