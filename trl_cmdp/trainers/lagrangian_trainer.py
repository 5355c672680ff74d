"""The Lagrangian baselines: fixed, dual and PID multipliers."""

import textwrap
from dataclasses import asdict
from typing import Any

import torch

from ..core import DualMultiplier, FixedMultiplier, PIDMultiplier, rollout_cost
from ..core.signal import Rollouts, Signal
from .engine.distill_trainer import DistillTrainer
from .engine.policy_loss import loss_mask
from .lagrangian_config import LagrangianDistillConfig


class LagrangianDistillTrainer(DistillTrainer):
    """
    Trainer for the weighted sum of reward and divergence, R − λ·KL (GKD's on-policy reward variant,
    https://huggingface.co/papers/2306.13649, section 3.1), with λ fixed, ascending the dual, or under PID control
    (https://huggingface.co/papers/2007.03964).

    The only change w.r.t. [`~trl.GRPOTrainer`] is the signal: GRPO's own advantages, and the divergence on every token
    with weight λ. λ is updated once per optimizer step from the cost of the rollouts of that step, over all processes.
    With `multiplier_init=0` and a fixed multiplier it is GRPO.

    Args:
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*, keyword-only):
            Teacher: path, hub id or instance, of the student's tokenizer.

    All other arguments are [`~trl.GRPOTrainer`]'s, in its order; `args` is a [`LagrangianDistillConfig`].
    """

    _config_class = LagrangianDistillConfig
    _tag_names = ["trl", "trl-cmdp", "lagrangian-distillation"]
    _name = "Lagrangian Distillation"
    _paper = {
        "title": "Responsive Safety in Reinforcement Learning by PID Lagrangian Methods",
        "id": "2007.03964",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{stooke2020responsive,
                title     = {{Responsive Safety in Reinforcement Learning by PID Lagrangian Methods}},
                author    = {Adam Stooke and Joshua Achiam and Pieter Abbeel},
                year      = 2020,
                booktitle = {ICML},
            }"""),
    }

    def _set_up_method(self) -> None:
        args = self.args
        if args.multiplier == "fixed":
            self._multiplier = FixedMultiplier(args.multiplier_init)
        elif args.multiplier == "dual":
            self._multiplier = DualMultiplier(args.multiplier_init, args.multiplier_lr, args.multiplier_max)
        else:
            gains = (args.pid_kp, args.pid_ki, args.pid_kd, args.pid_cost_ema)
            self._multiplier = PIDMultiplier(args.multiplier_init, *gains, args.multiplier_max)
        # Of the accumulation window: cost, rollouts.
        self._window = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)

    @property
    def _keeps_limit(self) -> bool:
        return self.args.multiplier != "fixed"

    @property
    def _divergence_coefficient(self) -> float:
        return self._multiplier.value

    def _signal(self, rollouts: Rollouts) -> Signal:
        columns = self._log_constraint(rollouts, self.args.cost_limit, self.args.cost_scope)
        return Signal(rollouts.grpo_advantages, rollouts.mask.to(rollouts.costs.dtype), columns)

    def _after_micro_step(self, inputs: dict[str, Any]) -> None:
        mask = loss_mask(inputs)
        cost = rollout_cost(inputs["costs"], mask, self.args.cost_scope).double()  # (b,)
        has_tokens = mask.bool().any(1)
        self._window += torch.stack([cost.sum(), has_tokens.sum()])
        if not self.accelerator.sync_gradients:
            return
        self._count("lagrange_multiplier", self._multiplier.value, 1)
        cost_sum, count = self.accelerator.reduce(self._window, reduction="sum").tolist()
        self._window.zero_()
        if count == 0:
            return
        self._multiplier.update(cost_sum / count - self.args.cost_limit)

    def _method_state(self) -> dict[str, float | None]:
        return asdict(self._multiplier)

    def _load_method_state(self, state: dict[str, float | None]) -> None:
        # What was learnt comes from the checkpoint, what was chosen from the arguments.
        for name in {"value", "integral", "smoothed"} & state.keys():
            setattr(self._multiplier, name, state[name])
