"""The constrained method."""

from dataclasses import asdict, replace
from typing import Any

import torch

from ..core import RewardRange, constrained_advantages, unrewarded_weights, violation_weights
from ..core.signal import Rollouts, Signal
from .constrained_config import ConstrainedDistillConfig
from .engine.checks import check_violation_penalty
from .engine.distill_trainer import DistillTrainer
from .engine.limit import CostLimit
from .telemetry.card import CONSTRAINED_CITATION


class ConstrainedDistillTrainer(DistillTrainer):
    """
    Trainer for reward-aware distillation under a limit on the divergence from the teacher
    (https://huggingface.co/papers/2509.22921).

    A drop-in replacement for [`~trl.GRPOTrainer`]. The only change is the signal: the reward of a rollout whose cost
    (its divergence from the teacher) exceeds `args.cost_limit` is replaced by a penalty, and on such rollouts the
    divergence is also differentiated. Beyond the paper, inside the limit the student is trained by its reward and by
    the divergence, most where the reward is silent (`args.unrewarded_distill_coef=0` switches that off), and early in a
    run the limit comes down from where the student is (not with `args.cost_limit_schedule="constant"`). With
    `teacher_model=None` it is `GRPOTrainer`, bit for bit.

    Example:

    ```python
    >>> from trl_cmdp import ConstrainedDistillConfig, ConstrainedDistillTrainer
    >>> from trl.rewards import accuracy_reward
    >>> from datasets import load_dataset

    >>> trainer = ConstrainedDistillTrainer(
    ...     model="Qwen/Qwen2.5-Math-1.5B",
    ...     reward_funcs=accuracy_reward,
    ...     args=ConstrainedDistillConfig(output_dir="out", cost_limit=0.35),
    ...     train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    ...     teacher_model="Qwen/Qwen2.5-Math-7B-Instruct",
    ... )
    >>> trainer.train()
    ```

    Args:
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*, keyword-only):
            Teacher: path, hub id or instance, of the student's tokenizer. Frozen, in eval mode, in its own dtype.

    All other arguments are [`~trl.GRPOTrainer`]'s, in its order; `args` is a [`ConstrainedDistillConfig`]. With a
    teacher, `reward_funcs` may be `None` (reward 0).

    Raises:
        ValueError: Before training, for unequal tokenizers, a teacher that shares the student's parameters, a missing
            column; at the step where it appears, for an infinite reward or a NaN from the teacher.
    """

    _config_class = ConstrainedDistillConfig
    _tag_names = ["trl", "trl-cmdp", "constrained-distillation"]
    _name = "Constrained Distillation"
    _paper = {
        "title": "Rethinking Large Language Model Distillation: A Constrained Markov Decision Process Perspective",
        "id": "2509.22921",
        "citation": CONSTRAINED_CITATION,
    }

    _keeps_limit = True

    @property
    def _token_cost(self) -> str:
        return self.args.cost

    @property
    def _needs_divergence(self) -> bool:
        args = self.args
        distills = args.violation_distill_coef > 0 or args.unrewarded_distill_coef > 0
        return distills or args.cost == "divergence" or args.cost_limit == "auto"

    @property
    def _needs_log_probs(self) -> bool:
        return self.args.cost != "divergence"

    @property
    def _distill_cross_entropy(self) -> bool:
        return self.args.violation_distill_loss == "teacher_nll"

    def _set_up_method(self) -> None:
        self._cost_limit = CostLimit(self.args.limit_plan, list(self.teachers))
        self._reward_range = RewardRange()

    def _signal(self, rollouts: Rollouts) -> Signal:
        args, step, training = self.args, self.state.global_step, self._mode == "train"
        if args.constraint_aggregation == "sum_then_normalize":
            check_violation_penalty(rollouts.rewards, args.violation_penalty, step)
        if args.cost == "log_ratio":
            rollouts = replace(rollouts, costs=rollouts.student_logps - rollouts.teacher_logps)
        elif args.cost == "teacher_nll":
            rollouts = replace(rollouts, costs=-rollouts.teacher_logps)
        if training:
            self._cost_limit.end_imitation(step)
            if args.unrewarded_distill_coef > 0:
                self._reward_range.update(rollouts.rewards)
        if not self._cost_limit.known:
            return self._imitation_signal(rollouts, training)
        target = self._cost_limit.target_of(rollouts)  # what is logged is judged by it, whatever the schedule says
        columns = self._log_constraint(rollouts, target, args.cost_scope)
        limit = target
        if training and args.cost_limit_schedule != "constant":
            limit = self._cost_limit.scheduled(rollouts, args.cost_scope, step, self.state.max_steps)
            self._count("constraint/scheduled_limit", torch.as_tensor(limit).double().mean(), 1)
        costs, mask = rollouts.costs, rollouts.mask
        rewards, reward_weights = rollouts.rewards, None
        if args.multi_objective_aggregation == "normalize_then_sum":
            rewards, reward_weights = rollouts.rewards_per_func, self.reward_weights
        advantages = constrained_advantages(
            rewards,
            costs,
            mask,
            rollouts.num_generations,
            limit,
            args.violation_penalty,
            args.cost_scope,
            args.credit_assignment,
            args.constraint_aggregation,
            self.scale_rewards,
            rollouts.horizon,
            reward_weights,
        )
        weights = None
        if args.violation_distill_coef > 0:
            violating = violation_weights(costs, mask, limit, args.cost_scope, args.credit_assignment)
            weights = args.violation_distill_coef * violating
        if args.unrewarded_distill_coef > 0:
            success = self._reward_range.success(rollouts.rewards)
            # By the limit that is meant: under one that is still wide the student would be made a copy first.
            unrewarded = unrewarded_weights(success, costs, mask, rollouts.num_generations, target, args.cost_scope)
            unrewarded = args.unrewarded_distill_coef * unrewarded
            self._count("constraint/unrewarded_weight", unrewarded.sum(), mask.sum())
            weights = unrewarded if weights is None else weights + unrewarded
        return Signal(advantages, weights, columns)

    def _imitation_signal(self, rollouts: Rollouts, training: bool) -> Signal:
        """The phase in which `cost_limit="auto"` finds out what imitation reaches: the signal is GKD's."""
        if training:
            self._cost_limit.imitate(rollouts, self.args.cost_scope, self.state.global_step, self.state.max_steps)
        columns = self._log_constraint(rollouts, None, self.args.cost_scope)
        return Signal(torch.zeros_like(rollouts.rewards), rollouts.mask.to(rollouts.costs.dtype), columns)

    def _method_state(self) -> dict[str, Any]:
        seen = {"reward_range": asdict(self._reward_range)} if self.args.unrewarded_distill_coef > 0 else {}
        return self._cost_limit.state() | seen

    def _load_method_state(self, state: dict[str, Any]) -> None:
        self._cost_limit.load_state(state)
        self._reward_range = RewardRange(**state.get("reward_range", {}))
