"""Configuration of the constrained method."""

from dataclasses import dataclass
from typing import Literal

from .._defaults import AUTO, COST_LIMIT, VIOLATION_PENALTY, check_auto_limit, parse_cost_limit
from .engine.config import DistillConfig, help_from_docstring
from .engine.limit import LimitPlan


@help_from_docstring
@dataclass(kw_only=True)
class ConstrainedDistillConfig(DistillConfig):
    """
    Configuration of [`ConstrainedDistillTrainer`]. Every field of [`~trl.GRPOConfig`] keeps its name, position and
    default; the fields below are keyword-only.

    Parameters:
        cost_limit (`str`, `float` or `dict[str, float]`, *optional*, defaults to `0.35`):
            Limit d on the cost of a rollout, in nats: per token for `cost_scope` `"mean"` and `"worst_prefix"`, per
            rollout for `"sum"`. `"auto"`: imitate the teacher for `auto_limit_steps` optimizer steps, and take the
            limit from the costs that imitation reaches. A `dict` (JSON on the command line): one for each of several
            teachers, by name.
        auto_limit_steps (`int`, *optional*, defaults to `50`):
            Optimizer steps of the imitation phase of `cost_limit="auto"`, out of those of the run.
        auto_limit_quantile (`float`, *optional*, defaults to `0.9`):
            Quantile of the costs of the rollouts in the last quarter of the imitation phase.
        auto_limit_margin (`float`, *optional*, defaults to `2.0`):
            Factor on that quantile.
        cost_limit_schedule (`str`, *optional*, defaults to `"linear"`):
            `"linear"` or `"cosine"` from `cost_limit_start` to `cost_limit`, or `"constant"`: `cost_limit` from the
            first step on, as in arXiv 2509.22921.
        cost_limit_start (`float`, *optional*):
            Limit that a schedule starts from. `None`: the 0.9-quantile of the costs of the run's first rollouts, or
            `cost_limit` if that is larger.
        cost_limit_schedule_steps (`float`, *optional*, defaults to `0.3`):
            Optimizer steps until `cost_limit` is reached; below 1 a share of the run's; the whole run if `None`.
        cost (`str`, *optional*, defaults to `"divergence"`):
            Cost of a token: `"divergence"` from the teacher over the full vocabulary; `"log_ratio"`, log π − log μ of
            the sampled token, a one-sample estimate of reverse KL that can be negative; or `"teacher_nll"`, −log μ of
            the sampled token (2610.00332, there with `cost_scope="worst_prefix"`).
        violation_penalty (`float`, *optional*, defaults to `20.0`):
            Penalty n of a violation. With `constraint_aggregation="sum_then_normalize"` it must exceed the largest
            absolute task reward.
        violation_distill_coef (`float`, *optional*, defaults to `0.1`):
            Coefficient of the differentiated part on violating rollouts. 0 turns it off.
        unrewarded_distill_coef (`float`, *optional*, defaults to `1.0`):
            Coefficient of the differentiated divergence for what the reward does not say: times 1 less the mean
            success of the rollout's group, but at least 0.3, which is also the factor of a feasible rollout that did
            better than its group; and times d/C where the cost C exceeds the limit d. At 0 the student is trained by
            its reward alone inside the limit, as in arXiv 2509.22921, and with a limit that nothing exceeds it is
            GRPO, bit for bit.
        violation_distill_loss (`str`, *optional*, defaults to `"divergence"`):
            What is differentiated there: `"divergence"`, or `"teacher_nll"`, the expectation of −log μ under the
            student over the full vocabulary (the single-step gradient of 2610.00332).
        credit_assignment (`str`, *optional*, defaults to `"trajectory"`):
            `"trajectory"`: one advantage per rollout. `"token"`: returns-to-go of the per-step modified reward.
        constraint_aggregation (`str`, *optional*, defaults to `"lexicographic"`):
            `"lexicographic"`: feasibility first, then reward, at a bounded size. `"sum_then_normalize"`: the modified
            reward standardised as it is, as arXiv 2509.22921 reads.

    And those shared by every trainer: `cost_scope`, `teacher_model_init_kwargs`, `teacher_model_revision`,
    `teacher_beta`, `teacher_prob_floor`, `divergence_memory_mb` (see [`DistillConfig`]).
    """

    # Of `float | str` TRL's parser would make float. Of this it makes text, which `_check_cost_limit` turns into what
    # is meant; `None` is refused there.
    cost_limit: float | str | None = COST_LIMIT
    auto_limit_steps: int = 50
    auto_limit_quantile: float = 0.9
    auto_limit_margin: float = 2.0
    cost_limit_schedule: Literal["constant", "linear", "cosine"] = "linear"
    cost_limit_start: float | None = None
    cost_limit_schedule_steps: float | None = 0.3
    cost: Literal["divergence", "log_ratio", "teacher_nll"] = "divergence"
    violation_penalty: float = VIOLATION_PENALTY
    violation_distill_coef: float = 0.1
    unrewarded_distill_coef: float = 1.0
    violation_distill_loss: Literal["divergence", "teacher_nll"] = "divergence"
    credit_assignment: Literal["trajectory", "token"] = "trajectory"
    constraint_aggregation: Literal["lexicographic", "sum_then_normalize"] = "lexicographic"

    def __post_init__(self):
        super().__post_init__()
        given = [name for name in ("cost_limit_start", "cost_limit_schedule_steps") if getattr(self, name) is not None]
        self._check_positive("violation_penalty", "auto_limit_steps", "auto_limit_margin", *given)
        self._check_not_negative("violation_distill_coef", "unrewarded_distill_coef")
        if self.constraint_aggregation == "sum_then_normalize" and (
            self.multi_objective_aggregation == "normalize_then_sum"
        ):
            raise ValueError(
                "`constraint_aggregation='sum_then_normalize'` needs one reward for each rollout, and "
                "`multi_objective_aggregation='normalize_then_sum'` leaves several. Use "
                "`constraint_aggregation='lexicographic'`, or `multi_objective_aggregation='sum_then_normalize'` with "
                "`reward_weights`."
            )
        self.limit_plan  # noqa: B018  # refuses what cannot be planned
        if self.cost_limit == AUTO:
            check_auto_limit(self.max_steps, self.auto_limit_steps)

    @property
    def limit_plan(self) -> LimitPlan:
        """What the fields of the limit say, as one record."""
        return LimitPlan(
            target=self.cost_limit,
            imitation_steps=self.auto_limit_steps,
            quantile=self.auto_limit_quantile,
            margin=self.auto_limit_margin,
            schedule=self.cost_limit_schedule,
            start=self.cost_limit_start,
            schedule_steps=self.cost_limit_schedule_steps,
        )

    def _check_cost_limit(self) -> None:
        self.cost_limit = parse_cost_limit(self.cost_limit)
