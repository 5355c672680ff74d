"""The constrained method."""

import logging
import textwrap
from dataclasses import asdict, replace
from typing import Any

import torch

from ..core import AutoLimit, constrained_advantages, rollout_cost, scheduled_limit, violation_weights
from ._base import DistillTrainer
from ._rewards import check_violation_penalty
from ._signal import Rollouts, Signal
from .constrained_config import ConstrainedDistillConfig


_logger = logging.getLogger(__name__)


class ConstrainedDistillTrainer(DistillTrainer):
    """
    Trainer for reward-aware distillation under a limit on the divergence from the teacher
    (https://huggingface.co/papers/2509.22921).

    A drop-in replacement for [`~trl.GRPOTrainer`]. The only change is the signal: the reward of a rollout whose cost
    (its divergence from the teacher) exceeds `args.cost_limit` is replaced by a penalty, and on such rollouts the
    divergence is also differentiated. Inside the limit the student is trained by its reward alone. With
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
            column; at the step where it appears, for a reward that reaches the penalty or a NaN from the teacher.
    """

    _config_class = ConstrainedDistillConfig
    _tag_names = ["trl", "trl-cmdp", "constrained-distillation"]
    _name = "Constrained Distillation"
    _paper = {
        "title": "Rethinking Large Language Model Distillation: A Constrained Markov Decision Process Perspective",
        "id": "2509.22921",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{zimmer2025rethinking,
                title        = {{Rethinking Large Language Model Distillation: A Constrained Markov Decision Process Perspective}},
                author       = {Matthieu Zimmer and Xiaotong Ji and Tu Nguyen and Haitham Bou Ammar},
                year         = 2025,
                eprint       = {arXiv:2509.22921},
            }"""),
    }

    @property
    def _needs_log_probs(self) -> bool:
        return self.args.cost != "divergence"

    @property
    def _distill_cross_entropy(self) -> bool:
        return self.args.violation_distill_loss == "teacher_nll"

    def _set_up_method(self) -> None:
        args = self.args
        self._auto_limit = AutoLimit(args.auto_limit_steps, args.auto_limit_quantile, args.auto_limit_margin)
        if args.cost_limit != "auto":
            self._auto_limit.limit = args.cost_limit

    def _signal(self, rollouts: Rollouts) -> Signal:
        args = self.args
        check_violation_penalty(rollouts.rewards, args.violation_penalty, self.state.global_step)
        if args.cost == "log_ratio":
            rollouts = replace(rollouts, costs=rollouts.student_logps - rollouts.teacher_logps)
        elif args.cost == "teacher_nll":
            rollouts = replace(rollouts, costs=-rollouts.teacher_logps)
        limit = self._current_limit()
        columns = self._log_constraint(rollouts, limit, args.cost_scope)
        costs, mask = rollouts.costs, rollouts.mask
        if limit is None:
            if self._mode == "train":
                self._imitate(rollouts)
            return Signal(torch.zeros_like(rollouts.rewards), mask.to(costs.dtype), columns)
        advantages = constrained_advantages(
            rollouts.rewards,
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
        )
        weights = None
        if args.violation_distill_coef > 0:
            weights = args.violation_distill_coef * violation_weights(
                costs, mask, limit, args.cost_scope, args.credit_assignment
            )
        return Signal(advantages, weights, columns)

    def _current_limit(self) -> float | None:
        """Limit of the rollouts at hand, `None` during imitation. Evaluation is against the limit that is meant."""
        args, step, auto = self.args, self.state.global_step, self._auto_limit
        first = args.auto_limit_steps if args.cost_limit == "auto" else 0
        if self._mode == "train" and auto.limit is None and step >= first:
            _logger.warning(f"`cost_limit='auto'` set the limit to {auto.settle():.4g} nats at step {step}.")
        if self._mode == "eval" or auto.limit is None or args.cost_limit_schedule == "constant":
            return auto.limit
        steps = args.cost_limit_schedule_steps or max(1, self.state.max_steps - first)
        return scheduled_limit(args.cost_limit_start, auto.limit, (step - first) / steps, args.cost_limit_schedule)

    def _imitate(self, rollouts: Rollouts) -> None:
        """Check that something follows the imitation phase, and keep what it costs."""
        if self.state.max_steps <= self.args.auto_limit_steps:
            raise ValueError(
                f"The imitation phase of `cost_limit='auto'` ({self.args.auto_limit_steps} steps) would be the whole run "
                f"of {self.state.max_steps} steps. Train longer or lower `auto_limit_steps`."
            )
        costs = rollout_cost(rollouts.costs, rollouts.mask, self.args.cost_scope)
        self._auto_limit.record(self.state.global_step, costs[rollouts.mask.any(1)].tolist())

    def _method_state(self) -> dict[str, Any]:
        return asdict(self._auto_limit) if self.args.cost_limit == "auto" else {}

    def _load_method_state(self, state: dict[str, Any]) -> None:
        for name in ("limit", "costs", "last_step"):  # what was learnt; what was chosen comes from the arguments
            setattr(self._auto_limit, name, state[name])
