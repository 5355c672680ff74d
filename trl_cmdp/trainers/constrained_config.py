"""Configuration of the constrained method."""

from dataclasses import dataclass, field

from ._config import DistillConfig


@dataclass
class ConstrainedDistillConfig(DistillConfig):
    """
    Configuration of [`ConstrainedDistillTrainer`]. Every field of [`~trl.GRPOConfig`] keeps its name, position and
    default; the fields below are keyword-only.

    Parameters:
        cost_limit (`float`, *optional*, defaults to `0.35`):
            Limit d on the cost of a rollout, in nats: per token for `cost_scope` `"mean"` and `"worst_prefix"`, per
            rollout for `"sum"`.
        cost_scope (`str`, *optional*, defaults to `"mean"`):
            Cost C of a rollout: `"mean"` of its tokens' divergences, `"sum"`, or `"worst_prefix"` (largest running
            mean).
        violation_penalty (`float`, *optional*, defaults to `20.0`):
            Penalty n of a violation. Must exceed the largest absolute task reward.
        violation_distill_coef (`float`, *optional*, defaults to `1.0`):
            Coefficient of the differentiated divergence on violating rollouts. 0 turns it off.
        credit_assignment (`str`, *optional*, defaults to `"trajectory"`):
            `"trajectory"`: one advantage per rollout. `"token"`: returns-to-go of the per-step modified reward.
        constraint_aggregation (`str`, *optional*, defaults to `"lexicographic"`):
            `"lexicographic"`: feasibility first, then reward, at a bounded size. `"sum_then_normalize"`: the modified
            reward standardised as it is, as arXiv 2509.22921 reads.

    And the teacher's, shared by every trainer: `teacher_model_init_kwargs`, `teacher_model_revision`, `teacher_beta`,
    `teacher_prob_floor`, `divergence_memory_mb` (see [`DistillConfig`]).
    """

    cost_limit: float = field(
        default=0.35,
        kw_only=True,
        metadata={"help": "Limit on the cost of a rollout, in nats (per token, or per rollout for cost_scope 'sum')."},
    )
    cost_scope: str = field(
        default="mean",
        kw_only=True,
        metadata={
            "help": "Cost of a rollout: 'mean' of its tokens' divergences, 'sum', or 'worst_prefix' (largest running "
            "mean).",
            "choices": ["mean", "sum", "worst_prefix"],
        },
    )
    violation_penalty: float = field(
        default=20.0,
        kw_only=True,
        metadata={"help": "Penalty of a violation. Must exceed the largest absolute task reward."},
    )
    violation_distill_coef: float = field(
        default=1.0,
        kw_only=True,
        metadata={"help": "Coefficient of the differentiated divergence on violating rollouts. 0 turns it off."},
    )
    credit_assignment: str = field(
        default="trajectory",
        kw_only=True,
        metadata={
            "help": "'trajectory': one advantage per rollout. 'token': returns-to-go of the per-step modified reward.",
            "choices": ["trajectory", "token"],
        },
    )
    constraint_aggregation: str = field(
        default="lexicographic",
        kw_only=True,
        metadata={
            "help": "'lexicographic': feasibility first, then reward. 'sum_then_normalize': the modified reward "
            "standardised as it is.",
            "choices": ["lexicographic", "sum_then_normalize"],
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self._check_positive("cost_limit", "violation_penalty")
        if self.violation_distill_coef < 0:
            raise ValueError(f"`violation_distill_coef` must not be negative, got {self.violation_distill_coef}.")
        self._check_choices(
            cost_scope=("mean", "sum", "worst_prefix"),
            credit_assignment=("trajectory", "token"),
            constraint_aggregation=("lexicographic", "sum_then_normalize"),
        )
