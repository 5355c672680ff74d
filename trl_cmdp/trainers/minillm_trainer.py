"""MiniLLM."""

import textwrap

from ..core import minillm_advantages
from ..core.signal import Rollouts, Signal
from .engine.distill_trainer import DistillTrainer
from .minillm_config import MiniLLMDistillConfig


class MiniLLMDistillTrainer(DistillTrainer):
    """
    Trainer for MiniLLM (https://huggingface.co/papers/2306.08543): policy gradient on the reverse KL of whole sequences.

    The only change w.r.t. [`~trl.GRPOTrainer`] is the signal: the advantage of a token is the length-normalised
    reward-to-go of the log-ratio log μ − log π of the tokens after it, and its own expectation over the vocabulary, the
    reverse KL, is differentiated. Training rollouts are sampled from a mixture with the teacher and carry its importance
    weight. Each of the three parts can be switched off. The paper's language-modelling loss on a pre-training corpus is
    left out. Rewards are only logged.

    Args:
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*, keyword-only):
            Teacher: path, hub id or instance, of the student's tokenizer.

    All other arguments are [`~trl.GRPOTrainer`]'s, in its order; `args` is a [`MiniLLMDistillConfig`].
    """

    _config_class = MiniLLMDistillConfig
    _tag_names = ["trl", "trl-cmdp", "minillm-distillation"]
    _name = "MiniLLM Distillation"
    _paper = {
        "title": "MiniLLM: Knowledge Distillation of Large Language Models",
        "id": "2306.08543",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{gu2024minillm,
                title     = {{MiniLLM: Knowledge Distillation of Large Language Models}},
                author    = {Yuxian Gu and Li Dong and Furu Wei and Minlie Huang},
                year      = 2024,
                booktitle = {ICLR},
            }"""),
    }
    _needs_log_probs = True
    _imitates = True

    @property
    def _teacher_mixed_alpha(self) -> float:
        return self.args.teacher_mixed_alpha

    @property
    def _samples_from_teacher(self) -> bool:
        return self._teacher_mixed_alpha > 0

    def _set_up_method(self) -> None:
        if self._samples_from_teacher and self.rollout_func is not None:
            raise ValueError("With `rollout_func` the teacher cannot be mixed in: set `teacher_mixed_alpha=0`.")

    def _signal(self, rollouts: Rollouts) -> Signal:
        args = self.args
        advantages, importance = minillm_advantages(
            rollouts.student_logps,
            rollouts.teacher_logps,
            rollouts.mask,
            args.single_step_decomposition,
            args.length_normalization,
            self._teacher_mixed_alpha if self._mode == "train" else 0.0,
        )
        columns = self._log_constraint(rollouts, args.cost_limit, args.cost_scope)
        if self._mode == "train":
            self._count("importance_weight", importance.sum(), rollouts.mask.sum())
        return Signal(advantages, importance if args.single_step_decomposition else None, columns)
