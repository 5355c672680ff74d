"""
The base of every trainer: a `GRPOTrainer` with a teacher, in which a method is one function, its signal.

Every touch of TRL's private hooks is in this file, and of its state between steps in `_resume.py`;
tests/trainers/test_trl_hooks.py pins them.
"""

import sys
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch.utils.data import Sampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import get_config_model_id, maybe_gather_lm_head_ctx

from ..core import infeasible_steps, rollout_cost
from ..teachers import LocalTeacher, base_model
from ._card import write_model_card
from ._config import DistillConfig
from ._forward import DivergenceRequest, StudentForward
from ._guards import CheckpointOnSigterm, named_failure, sole_run
from ._hub import warn_if_failed
from ._images import IMAGES_REFUSED, check_no_images
from ._processes import gather_rows, on_any_process
from ._resume import check_whole, last_whole_checkpoint, load_progress, save_progress, start_checkpoint
from ._rewards import check_reward_columns, no_reward
from ._rollout_func import checked_rollout_func
from ._satisfaction import SatisfactionCounts
from ._scoring import RolloutScorer
from ._selection import FEASIBLE_REWARD, Verdicts, asks_for_feasible_reward
from ._shading import ShadedCompletions
from ._signal import Rollouts, Signal
from ._teachers import Teacher, TeacherModel, check_teacher_name, has_teacher, make_teachers


class DistillTrainer(GRPOTrainer):
    """
    [`~trl.GRPOTrainer`] with a teacher. Subclasses define one method, [`~DistillTrainer._signal`]; rollouts, batching,
    vLLM, PEFT, logging and checkpoints stay TRL's. Without a teacher it is `GRPOTrainer`, bit for bit.

    Args:
        teacher_model (`str`, [`~transformers.PreTrainedModel`] or `dict`, *optional*):
            Teacher: path, hub id or instance. It is frozen, in eval mode, and keeps its own dtype. Several by name, in a
            `dict`: the dataset's column `teacher` then names each prompt's.

    All other arguments are [`~trl.GRPOTrainer`]'s, in its order. With a teacher, `reward_funcs` may be `None`.
    """

    _config_class: type[DistillConfig]
    _divergence_coefficient = 1.0  # factor on all divergence weights, read at each micro-step
    # What a method asks of the base; a property where it depends on the arguments.
    _needs_divergence = True  # over the full vocabulary; what a teacher of log-probabilities alone lacks
    _needs_log_probs = False  # of the sampled tokens, in its `Rollouts`
    _distill_cross_entropy = False  # differentiate E_π[−log μ] in place of the divergence
    _teacher_mixed_alpha = 0.0  # share of the teacher in what training rollouts are sampled from
    _samples_from_teacher = False
    _train_sampler: Sampler | None = None  # of the dataset, unless it is iterable

    def __init__(
        self,
        model,
        reward_funcs=None,
        args: GRPOConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        reward_processing_classes=None,
        callbacks=None,
        optimizers=(None, None),
        quantization_config=None,
        peft_config=None,
        tools=None,
        rollout_func=None,
        environment_factory=None,
        *,
        teacher_model: TeacherModel | None = None,
    ):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = self._config_class(f"{model_name.split('/')[-1]}-{self._name.replace(' ', '-')}")
        with_teacher = has_teacher(teacher_model, args)
        if with_teacher:
            if not isinstance(args, self._config_class):
                raise TypeError(
                    f"{type(self).__name__} with a teacher needs a `{self._config_class.__name__}` as `args`, got "
                    f"`{type(args).__name__}`. It takes every argument of `GRPOConfig`: change the class name alone."
                )
            if args.multi_objective_aggregation == "normalize_then_sum":
                raise ValueError(
                    "`multi_objective_aggregation='normalize_then_sum'` cannot be used with a teacher: it leaves no "
                    "single reward to weigh against the limit. Use 'sum_then_normalize' and `reward_weights`."
                )
            check_no_images(train_dataset, eval_dataset)
            if reward_funcs is None and environment_factory is None:
                reward_funcs = no_reward
            if rollout_func is not None:
                rollout_func = checked_rollout_func(rollout_func)
        elif reward_funcs is None and environment_factory is None:
            raise ValueError(
                "There is neither a reward nor a teacher to learn from. Pass `reward_funcs`, `teacher_model`, or both."
            )
        self._selects = asks_for_feasible_reward(args, with_teacher, eval_dataset)

        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
            rollout_func=rollout_func,
            environment_factory=environment_factory,
        )
        if rollout_func is None and environment_factory is None:
            check_reward_columns(self.reward_funcs, self.reward_func_names, self.train_dataset, self.eval_dataset)

        self._sigterm = CheckpointOnSigterm(self.accelerator)
        self.add_callback(self._sigterm)
        self.command = sys.argv  # what the model card says that made the run; secrets are hidden there
        self.teachers: dict[str, Teacher] = make_teachers(self, teacher_model) if with_teacher else {}
        if not self.teachers:
            return
        if self._samples_from_teacher:
            self._sampling_teacher()  # refuse before training what cannot sample
        student = base_model(self.accelerator.unwrap_model(self.model))
        # DeepSpeed may have the head partitioned again by the time of a backward that reads it.
        fused = not (args.cast_lm_head_to_fp32 or self.is_deepspeed_enabled)
        self._student_forward = StudentForward(student, args, maybe_gather_lm_head_ctx, fused)
        self._scorer = RolloutScorer(self.teachers, self._student_forward, self.accelerator, args)
        self._rows: list[dict[str, Any]] = []  # of the dataset, that are being generated for
        self._rewards_per_func: torch.Tensor | None = None
        # Numerators and denominators: TRL averages logged values unweighted, which is wrong for rates.
        self._sums = {mode: defaultdict(lambda: [0.0, 0.0]) for mode in ("train", "eval")}
        self._maxima: dict[str, dict[str, float]] = {"train": {}, "eval": {}}
        self._verdicts = Verdicts()  # of the evaluation under way
        self._satisfaction = SatisfactionCounts()
        shades = args.log_completions and "wandb" in args.report_to
        self._shaded = ShadedCompletions(self._tokenizer) if shades else None
        self._set_up_method()
        # Loading a teacher may draw random numbers; rollouts must not depend on that.
        set_seed(args.seed, device_specific=True)

    @property
    def teacher_model(self) -> torch.nn.Module | None:
        """The teacher's module, where a single teacher is in this process; `teachers` has all of them."""
        teachers = list(self.teachers.values())
        return teachers[0].module if len(teachers) == 1 and isinstance(teachers[0], LocalTeacher) else None

    # ------------------------------------------------------------------------------------------------ for subclasses

    def _signal(self, rollouts: Rollouts) -> Signal:
        """The method: task rewards and teacher costs to advantages and divergence weights."""
        raise NotImplementedError

    def _set_up_method(self) -> None:
        """Called once at the end of the set-up, with a teacher only."""

    def _off_policy_completions(self, prompt_ids: list[list[int]]) -> list[list[int]] | None:
        """Token ids of the training completions that are not sampled from the student, `None` if all are."""
        return None

    def _after_micro_step(self, inputs: dict[str, Any]) -> None:
        """Called after the loss of each training micro-step, with a teacher only. `inputs` has exact `costs` (b, T)."""

    def _method_state(self) -> dict[str, Any]:
        """What a method must find again when it resumes from a checkpoint."""
        return {}

    def _load_method_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError

    def _log_constraint(
        self, rollouts: Rollouts, cost_limit: float | torch.Tensor | None, cost_scope: str
    ) -> dict[str, list]:
        """Log the metrics of a limit (of the cost alone where none is set yet), and return its columns of the table."""
        costs, mask = rollouts.costs, rollouts.mask
        cost = rollout_cost(costs, mask, cost_scope)  # (B,)
        has_tokens = mask.any(1)
        self._count("constraint/cost", cost.sum(), has_tokens.sum())
        self._maximum("constraint/cost_max", cost.max())
        if cost_limit is None:
            return {"cost": cost.tolist(), "feasible": [None] * len(cost)}
        feasible = cost <= cost_limit
        judged = has_tokens & ~rollouts.rewards.isnan()
        self._count("constraint/limit", torch.as_tensor(cost_limit, dtype=torch.float64).mean(), 1)
        self._count("constraint/satisfaction_rate", (feasible & judged).sum(), judged.sum())
        self._satisfaction.add(self._mode, feasible, judged, rollouts.num_generations)
        if self._mode == "eval":
            self._verdicts.add(rollouts.rewards, feasible, judged)
        if len(self.teachers) > 1:
            for index, name in enumerate(self.teachers):
                own = judged & (rollouts.teacher_index == index)
                self._count(f"constraint/satisfaction_rate/{name}", (feasible & own).sum(), own.sum())
        infeasible = infeasible_steps(costs, mask, cost_limit, cost_scope)
        self._count("constraint/violated_token_frac", infeasible.sum(), mask.sum())
        self._count("constraint/unjudged_frac", (~judged).sum(), len(judged))
        verdicts = [
            verdict if counts else None for verdict, counts in zip(feasible.tolist(), judged.tolist(), strict=True)
        ]
        return {"cost": cost.tolist(), "feasible": verdicts}

    def _count(self, name: str, numerator: torch.Tensor | float, denominator: torch.Tensor | float) -> None:
        """Log numerator/denominator, both summed over the logging window. Give global sums."""
        sums = self._sums[self._mode][name]
        sums[0] += float(numerator)
        sums[1] += float(denominator)

    def _maximum(self, name: str, value: torch.Tensor) -> None:
        """Log the largest value of the logging window. Give the global one."""
        maxima = self._maxima[self._mode]
        maxima[name] = max(maxima.get(name, -torch.inf), float(value))

    # ----------------------------------------------------------------------------------------------- rollouts to signal

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self._rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._rewards_per_func

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs):
        training = bool(self.teachers) and self._mode == "train"
        completions = self._off_policy_completions(prompt_ids) if training else None
        if completions is not None:
            return completions, None
        alpha = self._teacher_mixed_alpha if training else 0.0
        with self._student_forward.mixing(alpha, self._sampling_teacher()) if alpha > 0 else nullcontext():
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs
            )

    def _sampling_teacher(self) -> torch.nn.Module:
        """The one teacher that completions can be sampled from."""
        if self.teacher_model is None:
            raise ValueError(
                f"{type(self).__name__} with these arguments samples completions from the teacher, which takes a single "
                "`teacher_model` in this process. Turn that off (MiniLLM: `teacher_mixed_alpha=0`, GKD: "
                "`seq_kd=False`), or pass one."
            )
        return self.teacher_model

    def _teacher_completions(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """Completions sampled from the teacher: TRL's own generation, with the teacher in the student's place."""
        student = self.model_wrapped
        backends = self.use_vllm, self.use_transformers_continuous_batching
        self.model_wrapped = self._sampling_teacher()
        self.use_vllm = self.use_transformers_continuous_batching = False
        try:
            completions, _ = super()._generate_single_turn(prompt_ids, None, {}, self.num_generations)
        finally:
            self.model_wrapped = student
            self.use_vllm, self.use_transformers_continuous_batching = backends
        return completions

    def _generate_and_score_completions(self, inputs):
        self._rows = inputs
        output = super()._generate_and_score_completions(inputs)
        if not self.teachers:
            return output
        if on_any_process(self.accelerator, "pixel_values" in output):  # in a later row, or returned by a tool
            raise ValueError(IMAGES_REFUSED)
        if self._used_in_one_step:
            # vLLM's correction leaves them there. They equal the loss's own, but for rounding.
            output.pop("old_per_token_logps", None)

        rewards_per_func = self._rewards_per_func  # (B, num_funcs), of all processes
        rewards = (rewards_per_func * self.reward_weights.to(rewards_per_func.device)).nansum(dim=1)
        rewards[rewards_per_func.isnan().all(dim=1)] = torch.nan  # as in TRL: unscorable, not 0

        output["teacher_index"] = self._teacher_index(inputs)  # (b,)
        local_mask = _loss_mask(output).bool()  # (b, T)
        mask = gather_rows(self.accelerator, local_mask)  # (B, T), T now the longest of all processes
        if "tool_mask" in output:
            num_tokens = self.accelerator.gather(output["completion_mask"].sum()).sum()
            self._count("tools/token_frac", num_tokens - mask.sum(), num_tokens)
        local, kept = self._score(output, local_mask, mask)
        scores = {name: gather_rows(self.accelerator, values) for name, values in local.items()}  # (B, T) each
        rollouts = Rollouts(
            rewards=rewards,
            mask=mask,
            num_generations=self.num_generations if self._mode == "train" else self.num_generations_eval,
            horizon=self.max_completion_length,
            teacher_index=self.accelerator.gather(output["teacher_index"]),
            **{"costs": None, **scores},
        )
        signal = self._signal(rollouts)

        first = self.accelerator.process_index * len(local_mask)
        own = slice(first, first + len(local_mask))
        length = local_mask.size(1)
        advantages = signal.advantages[own]  # (b,) or (b, T)
        output["advantages"] = advantages if advantages.dim() == 1 else advantages[:, :length]
        # A batch without a weight anywhere costs no divergence pass; the decision is the same on every process.
        if signal.divergence_weights is not None and signal.divergence_weights.any():
            weights = signal.divergence_weights[own, :length]
            output["divergence_weights"] = weights
            if kept is not None:
                # One tensor per rollout, so that TRL's shuffle and split carry it.
                output["teacher_hidden"] = self._scorer.weighted_hidden(kept, weights, local_mask)
        if "costs" in local:
            output["costs"] = local["costs"]
        self._log_rollouts(rollouts, signal)
        if self._shaded is not None and self._mode == "train":
            ids, shown = (gather_rows(self.accelerator, output[f"completion_{name}"]) for name in ("ids", "mask"))
            self._shaded.replace(self._logs["prompt"], ids, shown, rollouts, signal)
        return output

    def _teacher_index(self, inputs: list[dict[str, Any]]) -> torch.Tensor:
        """Index of each rollout's teacher, of shape (b,)."""
        names = list(self.teachers)
        if len(names) == 1:
            return torch.zeros(len(inputs), dtype=torch.long, device=self.accelerator.device)
        for row in inputs:
            check_teacher_name(row.get("teacher"), names)
        return torch.tensor([names.index(row["teacher"]) for row in inputs], device=self.accelerator.device)

    def _score(self, output, local_mask, mask) -> tuple[dict[str, torch.Tensor], list[torch.Tensor] | None]:
        """Scores (b, T) of this process's rollouts, and the teachers' hidden states per rollout if they fit."""
        args, training = self.args, self._mode == "train"
        tokens_per_process = mask.sum(1).view(self.accelerator.num_processes, -1).sum(1)
        with disable_gradient_checkpointing(self.model, args.gradient_checkpointing_kwargs):
            return self._scorer.score(
                self.model,
                output,
                local_mask,
                most_tokens=tokens_per_process.max().item(),
                batch_size=args.per_device_train_batch_size if training else args.per_device_eval_batch_size,
                log_probs=self._needs_log_probs,
                step=self.state.global_step,
            )

    # ------------------------------------------------------------------------------------------------------------- loss

    def _compute_loss(self, model, inputs):
        if not self.teachers:
            return super()._compute_loss(model, inputs)
        if "divergence_weights" in inputs and self._divergence_coefficient != 0:
            loss = self._compute_loss_with_divergence(model, inputs)
        else:
            loss = super()._compute_loss(model, inputs)
            self._count("distill_loss", 0, 1)
        if self._mode == "train":
            self._after_micro_step(inputs)
        return loss

    def _compute_loss_with_divergence(self, model, inputs):
        mask = _loss_mask(inputs)
        token_weight = self._policy_token_weight(mask, inputs["num_items_in_batch"])  # (B, 1) or ()
        weights = inputs["divergence_weights"] * token_weight * self._divergence_coefficient  # (B, T)
        states = self._scorer.weighted_states(inputs, inputs["divergence_weights"] != 0)
        request = DivergenceRequest(
            states,
            weights,
            cross_entropy=self._distill_cross_entropy,
        )
        with self._student_forward.answering(request):
            loss = super()._compute_loss(model, inputs)

        accumulation = self.current_gradient_accumulation_steps if self._mode == "train" else 1
        distill_loss = self.accelerator.gather(request.loss.detach() * accumulation).mean()
        self._count("distill_loss", distill_loss, 1)
        return loss + request.loss

    def _policy_token_weight(self, mask: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
        """
        Factor of each token in TRL's policy loss, of shape `(B, 1)` or `()`: the loss is Σ factor·mask·per_token_loss.

        Restated from `GRPOTrainer._compute_loss` in this one place, and tested against it for each loss type.
        """
        training = self._mode == "train"
        accumulation = self.current_gradient_accumulation_steps if training else 1
        num_rows = mask.size(0)
        if self.loss_type in ("grpo", "sapo"):
            return 1 / (mask.sum(-1, keepdim=True).clamp(min=1.0) * num_rows * accumulation)
        if self.loss_type == "bnpo":
            return 1 / (mask.sum().clamp(min=1.0) * accumulation)
        if self.loss_type == "dr_grpo":
            return torch.tensor(1 / (num_rows * self.max_completion_length * accumulation), device=mask.device)
        if self.loss_type == "luspo":
            return torch.tensor(1 / (num_rows * accumulation), device=mask.device)
        if self.loss_type in ("cispo", "dapo", "vespo"):
            normalizer = num_items_in_batch.clamp(min=1.0) / self.accelerator.num_processes
            return 1 / (normalizer * accumulation / self.args.steps_per_generation if training else normalizer)
        raise ValueError(f"Unknown loss type: {self.loss_type}")

    # ---------------------------------------------------------------------------------------------------------- logging

    def _log_rollouts(self, rollouts: Rollouts, signal: Signal) -> None:
        if rollouts.costs is not None:
            self._count("teacher/divergence", rollouts.costs.sum(), rollouts.mask.sum())
        if rollouts.divergence_lower_bound is not None:
            bound = rollouts.divergence_lower_bound.sum()
            self._count("teacher/divergence_lower_bound", bound, rollouts.mask.sum())

        # TRL has logged GRPO's own advantages for these rollouts: replace them.
        advantages = signal.advantages
        spread = advantages.view(len(advantages), -1).abs().amax(1).view(-1, rollouts.num_generations).amax(1)
        self._metrics[self._mode]["frac_reward_zero_std"][-1] = (spread == 0).float().mean().item()
        if advantages.dim() == 2:
            advantages = (advantages * rollouts.mask).sum(1) / rollouts.mask.sum(1).clamp(min=1)
        logged = self._logs["advantages"]
        for _ in range(min(len(logged), len(advantages))):
            logged.pop()
        logged.extend(advantages.tolist())
        for name, values in signal.columns.items():
            self._logs["extra"][name].extend(values)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.teachers:
            metrics = self._metrics[self._mode]
            for name, (numerator, denominator) in self._sums[self._mode].items():
                metrics[name] = [numerator / denominator if denominator else float("nan")]
            for name, value in self._maxima[self._mode].items():
                metrics[name] = [value]
            if self._selects and self._mode == "eval" and self._sums["eval"]:  # a log of an evaluation, not after one
                metrics[FEASIBLE_REWARD] = [self._verdicts.feasible_reward(self.args.tolerated_violation_rate)]
                self._verdicts = Verdicts()
            self._satisfaction.close(self._mode, self.state.global_step)
            self._sums[self._mode].clear()
            self._maxima[self._mode].clear()
        super().log(logs, start_time)
        if self.teachers and self._shaded is not None and self.accelerator.is_main_process:
            self._shaded.log(self.state.global_step)

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """
        [`~transformers.Trainer.train`], where a resumed run goes on as if it had never stopped. SIGTERM
        ends the step under way, saves a checkpoint, and then ends the process.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Folder of a checkpoint, or `True` for the newest one in `args.output_dir` that is whole.

        Raises:
            ValueError: If that checkpoint was cut off while it was written, or there is none that is whole.
            RuntimeError: If another run is training into `args.output_dir`.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
        elif resume_from_checkpoint:
            check_whole(resume_from_checkpoint)
        with sole_run(self.args.output_dir, self.accelerator), self._sigterm.listening():
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_train_sampler(self, dataset=None):
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        with named_failure(folder):
            if self.args.should_save:
                start_checkpoint(folder)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        save_progress(self, Path(output_dir))  # now, as transformers may delete the checkpoint before this one next

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_progress(self, Path(checkpoint))

    # ---------------------------------------------------------------------------------------------------------- the Hub

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        evaluation: Any | None = None,
    ):
        """
        Write the model card into `args.output_dir`. `push_to_hub` hands its other arguments on to this.

        Args:
            model_name (`str`, *optional*):
                Name of the model.
            dataset_name (`str`, *optional*):
                Name of the dataset on the Hub. A file or folder of this machine is left out.
            tags (`str` or `list[str]`, *optional*):
                Tags beside the method's.
            evaluation ([`~trl_cmdp.evaluation.EvaluationSummary`], *optional*):
                Figures on held-out problems, for the card's table and its metadata.
        """
        if dataset_name is not None and Path(dataset_name).exists():
            dataset_name = None  # the Hub refuses what is no dataset's id
        model_name = model_name or Path(self.args.output_dir).name
        super().create_model_card(model_name, dataset_name, tags)
        if self.is_world_process_zero():
            write_model_card(self, dataset_name, evaluation)

    def _push_from_checkpoint(self, checkpoint_folder):
        if not self.is_world_process_zero():
            return
        earlier = [] if self.push_in_progress is None else [*self.push_in_progress.jobs]
        super()._push_from_checkpoint(checkpoint_folder)
        for push in [] if self.push_in_progress is None else self.push_in_progress.jobs:
            if push not in earlier:
                push.add_done_callback(warn_if_failed)

    # ---------------------------------------------------------------------------------------------------------- helpers

    @property
    def _used_in_one_step(self) -> bool:
        """Whether one optimizer step uses all rollouts of a generation, TRL's condition for a ratio of 1 in the loss."""
        return self.args.gradient_accumulation_steps % (self.args.steps_per_generation * self.num_iterations) == 0

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"


def _loss_mask(inputs: dict[str, Any]) -> torch.Tensor:
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
