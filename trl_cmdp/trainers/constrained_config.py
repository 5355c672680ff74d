"""Configuration of the constrained method."""

import json
from dataclasses import dataclass, field

from ._config import DistillConfig


@dataclass
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
        cost_limit_schedule (`str`, *optional*, defaults to `"constant"`):
            `"constant"`, or `"linear"` or `"cosine"` from `cost_limit_start` to `cost_limit`.
        cost_limit_start (`float`, *optional*):
            Limit that a schedule starts from.
        cost_limit_schedule_steps (`int`, *optional*):
            Optimizer steps until `cost_limit` is reached, the whole run if `None`.
        cost (`str`, *optional*, defaults to `"divergence"`):
            Cost of a token: `"divergence"` from the teacher over the full vocabulary; `"log_ratio"`, log π − log μ of
            the sampled token, a one-sample estimate of reverse KL that can be negative; or `"teacher_nll"`, −log μ of
            the sampled token (2610.00332, there with `cost_scope="worst_prefix"`).
        violation_penalty (`float`, *optional*, defaults to `20.0`):
            Penalty n of a violation. Must exceed the largest absolute task reward.
        violation_distill_coef (`float`, *optional*, defaults to `1.0`):
            Coefficient of the differentiated part on violating rollouts. 0 turns it off.
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
    cost_limit: float | str | None = field(
        default=0.35,
        kw_only=True,
        metadata={
            "help": "Limit on the cost of a rollout, in nats (per token, or per rollout for cost_scope 'sum'), or "
            "'auto' to take it from what a short imitation phase reaches, or JSON with one for each teacher."
        },
    )
    auto_limit_steps: int = field(
        default=50, kw_only=True, metadata={"help": "Optimizer steps of the imitation phase of cost_limit 'auto'."}
    )
    auto_limit_quantile: float = field(
        default=0.9, kw_only=True, metadata={"help": "Quantile of the costs that imitation reaches."}
    )
    auto_limit_margin: float = field(default=2.0, kw_only=True, metadata={"help": "Factor on that quantile."})
    cost_limit_schedule: str = field(
        default="constant",
        kw_only=True,
        metadata={
            "help": "'constant', or 'linear' or 'cosine' from cost_limit_start to cost_limit.",
            "choices": ["constant", "linear", "cosine"],
        },
    )
    cost_limit_start: float | None = field(
        default=None, kw_only=True, metadata={"help": "Limit that a schedule starts from."}
    )
    cost_limit_schedule_steps: int | None = field(
        default=None, kw_only=True, metadata={"help": "Optimizer steps of the schedule, the whole run by default."}
    )
    cost: str = field(
        default="divergence",
        kw_only=True,
        metadata={
            "help": "Cost of a token: 'divergence' over the full vocabulary, 'log_ratio' or 'teacher_nll' of the "
            "sampled token.",
            "choices": ["divergence", "log_ratio", "teacher_nll"],
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
        metadata={"help": "Coefficient of the differentiated part on violating rollouts. 0 turns it off."},
    )
    violation_distill_loss: str = field(
        default="divergence",
        kw_only=True,
        metadata={
            "help": "What is differentiated on violating rollouts: the 'divergence', or 'teacher_nll', the teacher's "
            "expected negative log-likelihood.",
            "choices": ["divergence", "teacher_nll"],
        },
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
        self._check_positive("violation_penalty", "auto_limit_steps", "auto_limit_margin")
        if self.violation_distill_coef < 0:
            raise ValueError(f"`violation_distill_coef` must not be negative, got {self.violation_distill_coef}.")
        if not 0 < self.auto_limit_quantile <= 1:
            raise ValueError(f"`auto_limit_quantile` must lie in (0, 1], got {self.auto_limit_quantile}.")
        self._check_choices(
            cost=("divergence", "log_ratio", "teacher_nll"),
            cost_limit_schedule=("constant", "linear", "cosine"),
            violation_distill_loss=("divergence", "teacher_nll"),
            credit_assignment=("trajectory", "token"),
            constraint_aggregation=("lexicographic", "sum_then_normalize"),
        )
        self._check_schedule()

    def _check_cost_limit(self) -> None:
        if self.cost_limit == "auto":
            return
        if isinstance(self.cost_limit, str) and self.cost_limit.lstrip().startswith("{"):
            self.cost_limit = json.loads(self.cost_limit)
        limits = self.cost_limit.values() if isinstance(self.cost_limit, dict) else [self.cost_limit]
        try:
            numbers = [float(limit) for limit in limits]
        except (TypeError, ValueError):
            raise ValueError(
                f"`cost_limit` must be a number, 'auto', or a number for each teacher, got {self.cost_limit!r}."
            ) from None
        if not numbers or not all(number > 0 for number in numbers):
            raise ValueError(f"`cost_limit` must be positive, got {self.cost_limit!r}.")
        if isinstance(self.cost_limit, dict):
            self.cost_limit = dict(zip(self.cost_limit, numbers, strict=True))
        else:
            (self.cost_limit,) = numbers

    def _check_schedule(self) -> None:
        if self.cost_limit_schedule == "constant":
            if self.cost_limit_start is not None or self.cost_limit_schedule_steps is not None:
                raise ValueError(
                    "`cost_limit_start` and `cost_limit_schedule_steps` belong to a schedule: set "
                    "`cost_limit_schedule` to 'linear' or 'cosine'."
                )
            return
        if self.cost_limit_start is None:
            raise ValueError(f"`cost_limit_schedule={self.cost_limit_schedule!r}` needs `cost_limit_start`.")
        self._check_positive("cost_limit_start")
        if self.cost_limit_schedule_steps is not None:
            self._check_positive("cost_limit_schedule_steps")
