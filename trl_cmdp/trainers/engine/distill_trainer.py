"""
The base of every method: a `GRPOTrainer` with a teacher, in which a method is one function, its signal.

Every touch of TRL's private hooks but those of checkpoints is in this file; tests/trainers/test_trl_hooks.py pins them.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from trl import GRPOConfig
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import get_config_model_id, maybe_gather_lm_head_ctx

from ...core.signal import Rollouts, Signal
from ...teachers import base_model, offloaded
from ..telemetry.card import distillation_facts, write_model_card
from ..telemetry.metrics import DistillMetrics
from ..telemetry.run_settings import of_limit, of_teachers
from ..telemetry.selection import asks_for_feasible_reward
from ..telemetry.shading import ShadedCompletions
from ..telemetry.symptoms import Symptoms
from .checks import (
    check_arguments,
    check_data,
    check_images_can_be_read,
    check_reward_columns,
    check_reward_templates,
    check_rewards_finite,
    check_teacher_prompts,
    check_trackers,
    checked_rollout_func,
    find_images,
    has_teacher,
    no_reward,
)
from .config import DistillConfig
from .forward import DivergenceRequest, StudentForward
from .off_policy_trainer import OffPolicyGRPOTrainer
from .policy_loss import loss_mask, policy_token_weight
from .processes import gather_rows, on_any_process
from .scoring import RolloutScorer
from .student import prepare_student
from .teacher_prompts import TeacherPrompts
from .teachers import Teacher, TeacherModel, common_end, count_waiting, make_teachers, teacher_index, with_common_end
from .trl_hooks import check_trl_hooks


class DistillTrainer(OffPolicyGRPOTrainer):
    """
    [`~trl.GRPOTrainer`] with a teacher. Subclasses define one method, [`~DistillTrainer._signal`]; rollouts, batching,
    vLLM, PEFT, logging and checkpoints stay TRL's. Without a teacher it is `GRPOTrainer`, bit for bit.

    Args:
        teacher_model (`str`, [`~transformers.PreTrainedModel`] or `dict`, *optional*):
            Teacher: path, hub id or instance. It is frozen, in eval mode, and keeps its own dtype. Several by name, in a
            `dict`: the dataset's column `teacher` then names each prompt's. With a column `teacher_prompt` a teacher reads that
            in the place of `prompt`.

    All other arguments are [`~trl.GRPOTrainer`]'s, in its order. With a teacher, `reward_funcs` may be `None`.
    """

    _config_class: type[DistillConfig]
    _divergence_coefficient = 1.0  # factor on all divergence weights, read at each micro-step
    # What a method asks of the base; a property where it depends on the arguments.
    _needs_divergence = True  # over the full vocabulary; what a teacher of log-probabilities alone lacks
    _needs_log_probs = False  # of the sampled tokens, in its `Rollouts`
    _token_cost = "divergence"  # what costs a token, as `ConstrainedDistillConfig.cost` names it
    _imitates = False  # learns from the teacher alone: rewards are logged, and a limit is only measured against
    _keeps_limit = False  # the limit steers training
    _distill_cross_entropy = False  # differentiate E_π[−log μ] in place of the divergence

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
        has_reward = reward_funcs is not None or environment_factory is not None
        check_arguments(self._config_class, args, with_teacher, has_reward, self._imitates)
        check_trackers(args.report_to)
        if with_teacher:
            check_teacher_prompts(train_dataset, eval_dataset, environment_factory)
            check_images_can_be_read(train_dataset, eval_dataset, teacher_model, args)
            if not has_reward:
                reward_funcs = no_reward
            if rollout_func is not None:
                rollout_func = checked_rollout_func(rollout_func)
        check_data(model, args, train_dataset, eval_dataset, processing_class, rollout_func, environment_factory)
        selects = asks_for_feasible_reward(args, with_teacher, eval_dataset)

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
        check_reward_templates(self.reward_funcs, self.reward_processing_classes, self.train_dataset)

        if with_teacher:
            check_trl_hooks(self)
        self.command = sys.argv  # what the model card says that made the run; secrets are hidden there
        self._given_teacher = teacher_model
        self._ends = common_end(self) if with_teacher else None  # an error of these before a teacher is loaded
        self.teachers: dict[str, Teacher] = make_teachers(self, teacher_model) if with_teacher else {}
        if not self.teachers:
            return
        self._offload = offloaded(self.teachers.values() if args.teacher_offload else ())
        self._teacher_prompts = TeacherPrompts(self)
        if find_images(train_dataset, eval_dataset) is not None:
            self._check_images()
        if self._samples_from_teacher:
            self._check_sampling_teacher()
        prepare_student(self)
        student = base_model(self.accelerator.unwrap_model(self.model))
        # DeepSpeed may have the head partitioned again by the time of a backward that reads it.
        fused = not (args.cast_lm_head_to_fp32 or self.is_deepspeed_enabled)
        self._student_forward = StudentForward(student, args, maybe_gather_lm_head_ctx, fused)
        teachers = with_common_end(self.teachers, self._ends)
        self._scorer = RolloutScorer(teachers, self._student_forward, self.accelerator, args)
        self._rewards_per_func: torch.Tensor | None = None
        tolerated = args.tolerated_violation_rate if selects else None
        self._distill_metrics = DistillMetrics(list(self.teachers), tolerated)
        shades = args.log_completions and "wandb" in args.report_to
        self._shaded = ShadedCompletions(self._tokenizer) if shades else None
        self._set_up_method()
        self.add_callback(Symptoms(has_reward and not self._imitates, self._keeps_limit))
        # Loading a teacher may draw random numbers; rollouts must not depend on that.
        set_seed(args.seed, device_specific=True)

    # ------------------------------------------------------------------------------------------------ for subclasses

    def _signal(self, rollouts: Rollouts) -> Signal:
        """The method: task rewards and teacher costs to advantages and divergence weights."""
        raise NotImplementedError

    def _set_up_method(self) -> None:
        """Called once at the end of the set-up, with a teacher only."""

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
        return self._distill_metrics.constraint(self._mode, rollouts, cost_limit, cost_scope)

    def _count(self, name: str, numerator: torch.Tensor | float, denominator: torch.Tensor | float) -> None:
        """Log numerator/denominator, both summed over the logging window. Give global sums."""
        self._distill_metrics.count(self._mode, name, numerator, denominator)

    # ----------------------------------------------------------------------------------------------- rollouts to signal

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.teachers:
            check_rewards_finite(rewards_per_func, self.reward_func_names, self.state.global_step)
        self._rewards_per_func = rewards_per_func  # (B, num_funcs), of all processes
        return rewards_per_func

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if not self.teachers:
            return output
        if on_any_process(self.accelerator, "pixel_values" in output):
            self._check_images()
        if self._used_in_one_step:
            # vLLM's correction leaves them there. They equal the loss's own, but for rounding.
            output.pop("old_per_token_logps", None)

        rewards_per_func = self._rewards_per_func
        rewards = (rewards_per_func * self.reward_weights.to(rewards_per_func.device)).nansum(dim=1)
        rewards[rewards_per_func.isnan().all(dim=1)] = torch.nan  # as in TRL: unscorable, not 0

        output["teacher_index"] = teacher_index(inputs, list(self.teachers), self.accelerator.device)  # (b,)
        local_mask = loss_mask(output).bool()  # (b, T)
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
            grpo_advantages=self.accelerator.gather(output["advantages"]),
            rewards_per_func=rewards_per_func,
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

    def _score(self, output, local_mask, mask) -> tuple[dict[str, torch.Tensor], list[torch.Tensor] | None]:
        """Scores (b, T) of this process's rollouts, and the teachers' hidden states per rollout if they fit."""
        args, training = self.args, self._mode == "train"
        tokens_per_process = mask.sum(1).view(self.accelerator.num_processes, -1).sum(1)
        checkpointing = disable_gradient_checkpointing(self.model, args.gradient_checkpointing_kwargs)
        with checkpointing, self._offload.unloaded_afterwards():
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
        count_waiting(self)
        if self._mode == "train":
            self._after_micro_step(inputs)
        return loss

    def _compute_loss_with_divergence(self, model, inputs):
        mask = loss_mask(inputs)
        token_weight = policy_token_weight(self, mask, inputs["num_items_in_batch"])  # (B, 1) or ()
        weights = inputs["divergence_weights"] * token_weight * self._divergence_coefficient  # (B, T)
        with self._offload.unloaded_afterwards():  # the teachers run once more if their hidden states were not kept
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

    def _looked_at(self) -> list[str]:
        scored = ["the teachers' outputs were finite when the rollouts were scored"] if self.teachers else []
        return [*super()._looked_at(), *scored]

    # ---------------------------------------------------------------------------------------------------------- logging

    def _log_rollouts(self, rollouts: Rollouts, signal: Signal) -> None:
        self._distill_metrics.divergence(self._mode, rollouts)
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
            values = self._distill_metrics.close(self._mode, self.state.global_step)
            self._metrics[self._mode].update({name: [value] for name, value in values.items()})
        super().log(logs, start_time)
        if self.teachers and self._shaded is not None and self.accelerator.is_main_process:
            self._shaded.log(self.state.global_step)

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def _identity(self) -> dict[str, Any]:
        identity = super()._identity()
        if self.teachers:
            identity["method"] = self._name
            identity["teacher"] = {name: teacher.fingerprint() for name, teacher in self.teachers.items()}
        return identity

    def _run_settings(self) -> dict[str, Any]:
        settings = super()._run_settings()
        if self.teachers:
            settings |= of_limit(self.args, self._token_cost, self.state.log_history)
            settings |= of_teachers(self.teachers, self._given_teacher, self.args, self.accelerator)
            if self._teacher_prompts.used:
                settings["teacher_prompt"] = True
        return settings

    def _saved_state(self) -> dict[str, Any]:
        return self._method_state() if self.teachers else {}

    def _load_saved_state(self, state: dict[str, Any]) -> None:
        self._load_method_state(state)

    def _logging_window(self) -> dict[str, Any]:
        return super()._logging_window() | (self._distill_metrics.state() if self.teachers else {})

    def _load_logging_window(self, window: dict[str, Any]) -> None:
        super()._load_logging_window(window)
        if self.teachers:
            self._distill_metrics.load_state(window)

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
            licence = self.args.hub_license if isinstance(self.args, DistillConfig) else None
            write_model_card(self, self.command, distillation_facts(self), dataset_name, evaluation, licence)

    # ---------------------------------------------------------------------------------------------------------- helpers

    @property
    def _used_in_one_step(self) -> bool:
        """Whether one optimizer step uses all rollouts of a generation, TRL's condition for a ratio of 1 in the loss."""
        return self.args.gradient_accumulation_steps % (self.args.steps_per_generation * self.num_iterations) == 0
