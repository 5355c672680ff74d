"""Generalised knowledge distillation."""

import textwrap

import torch
from accelerate.utils import broadcast
from datasets import Dataset

from ..core.signal import Rollouts, Signal
from .engine.distill_trainer import DistillTrainer
from .gkd_config import GKDDistillConfig


class GKDDistillTrainer(DistillTrainer):
    """
    Trainer for generalised knowledge distillation (https://huggingface.co/papers/2306.13649, algorithm 1).

    The only change w.r.t. [`~trl.GRPOTrainer`] is the signal: no advantages, and the divergence from the teacher on
    every token. A share `1 - lmbda` of the generation batches, drawn at random, holds no rollouts but the completions
    of the dataset, or of the teacher (`seq_kd`). Rewards are only logged.

    Args:
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*, keyword-only):
            Teacher: path, hub id or instance, of the student's tokenizer.

    All other arguments are [`~trl.GRPOTrainer`]'s, in its order; `args` is a [`GKDDistillConfig`].

    Raises:
        ValueError: Before training, if `lmbda` is below 1 without `seq_kd` and the dataset has no `completion` column.
    """

    _config_class = GKDDistillConfig
    _tag_names = ["trl", "trl-cmdp", "gkd-distillation"]
    _name = "GKD Distillation"
    _paper = {
        "title": "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
        "id": "2306.13649",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{agarwal2024on-policy,
                title     = {{On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes}},
                author    = {Rishabh Agarwal and Nino Vieillard and Yongchao Zhou and Piotr Stanczyk and Sabela Ramos Garea and Matthieu Geist and Olivier Bachem},
                year      = 2024,
                booktitle = {ICLR},
            }"""),
    }
    _imitates = True

    @property
    def _samples_from_teacher(self) -> bool:
        return self.args.lmbda < 1 and self.args.seq_kd

    def _set_up_method(self) -> None:
        self._on_policy = True
        if self.args.lmbda == 1:
            return
        if self.tools or self.rollout_func is not None:
            raise ValueError(
                "Off-policy completions cannot be mixed with tools, environments or `rollout_func`: set `lmbda=1`."
            )
        if isinstance(self.train_dataset, Dataset):
            self._check_completions(self.train_dataset.column_names)

    def _check_completions(self, columns: list[str]) -> None:
        if not self.args.seq_kd and "completion" not in columns:
            raise ValueError(
                f"`lmbda` is {self.args.lmbda:g}, so a part of the training data is the dataset's `completion` column, "
                f"and the dataset has {sorted(columns)}. Add the column, set `lmbda=1` to train on the student's own "
                "rollouts alone, or `seq_kd=True` to have the teacher write the completions."
            )

    def _off_policy_completions(self, prompt_ids: list[list[int]]) -> list[list[int]] | None:
        if self.args.lmbda < 1:  # one draw for all processes, from the random state that checkpoints keep
            draw = broadcast(torch.rand((), device=self.accelerator.device))
            self._on_policy = bool(draw < self.args.lmbda)
        if self._on_policy:
            return None
        if self.args.seq_kd:
            return self._teacher_completions(prompt_ids)
        self._check_completions(list(self._rows[0]))
        return self._dataset_completions(prompt_ids)

    def _signal(self, rollouts: Rollouts) -> Signal:
        columns = {name: [None] * len(rollouts.rewards) for name in ("cost", "feasible")}
        if self._mode == "eval" or self._on_policy:  # the limit is on what the student writes
            columns = self._log_constraint(rollouts, self.args.cost_limit, self.args.cost_scope)
        if self._mode == "train":
            self._count("on_policy_frac", self._on_policy, 1)
        return Signal(torch.zeros_like(rollouts.rewards), rollouts.mask.to(rollouts.costs.dtype), columns)
