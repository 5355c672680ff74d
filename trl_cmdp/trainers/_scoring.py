"""Scoring finished rollouts against their teachers, and what the loss then needs of them."""

from typing import Any

import torch
from accelerate import Accelerator

from ..teachers import Teacher
from ._config import DistillConfig
from ._forward import DivergenceRequest, StudentForward, TeacherStates


class RolloutScorer:
    """
    Per-token costs of rollouts, each from the teacher that its prompt names. A teacher's hidden states are kept from
    scoring to the loss while they fit `args.teacher_hidden_memory_mb`, and computed once more otherwise.

    Args:
        teachers (`dict[str, Teacher]`):
            Teachers by name; rollouts name theirs by its index.
        student_forward ([`StudentForward`]):
            The student's wrapped forward.
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator.
        args ([`DistillConfig`]):
            Where memory bounds come from.
    """

    def __init__(
        self,
        teachers: dict[str, Teacher],
        student_forward: StudentForward,
        accelerator: Accelerator,
        args: DistillConfig,
    ):
        self._teachers, self._student_forward = teachers, student_forward
        self._accelerator, self._args = accelerator, args

    @torch.no_grad()
    def score(
        self,
        student: torch.nn.Module,
        inputs: dict[str, Any],
        mask: torch.Tensor,
        most_tokens: int,
        batch_size: int,
        log_probs: bool,
        step: int,
    ) -> tuple[dict[str, torch.Tensor], list[torch.Tensor] | None]:
        """
        Score this process's rollouts.

        Args:
            student (`torch.nn.Module`):
                Student, as the trainer calls it.
            inputs (`dict[str, Any]`):
                Rollouts, as TRL's loss gets them, with `teacher_index` of shape `(b,)`.
            mask (`torch.Tensor`):
                Booleans of shape `(b, T)`, the tokens that count.
            most_tokens (`int`):
                Largest number of such tokens on any process: all decide alike what they keep.
            batch_size (`int`):
                Rollouts in one forward pass.
            log_probs (`bool`):
                Whether the log-probabilities of the sampled tokens are wanted too.
            step (`int`):
                Optimizer step, for messages.

        Returns:
            `tuple[dict[str, torch.Tensor], list[torch.Tensor] | None]`: Scores of shape `(b, T)` each, and each
            rollout's teacher hidden states `(L, H_t)`, `None` if they do not fit.

        Raises:
            ValueError: If a score is not finite, or a token is beyond the teacher's vocabulary, on any process.
        """
        self._check_token_ids(inputs, step)
        names = ("costs", "student_logps", "teacher_logps") if log_probs else ("costs",)
        scores = {name: torch.zeros(mask.shape, device=mask.device) for name in names}
        widths = [teacher.head().weight for teacher in self._teachers.values()]
        bytes_per_token = max(weight.size(1) * weight.element_size() for weight in widths)
        keep = most_tokens * bytes_per_token <= self._args.teacher_hidden_memory_mb * 2**20
        kept: list[torch.Tensor] = []
        teacher_is_finite = True
        for start in range(0, len(mask), batch_size):
            rows = slice(start, start + batch_size)
            model_inputs = _model_inputs(inputs, rows)
            states = self._states(model_inputs, mask[rows], inputs["teacher_index"][rows])
            teacher_is_finite = teacher_is_finite and all(bool(part.hidden.isfinite().all()) for part in states)
            request = DivergenceRequest(
                states,
                scored_rows=mask[rows],
                token_ids=inputs["completion_ids"][rows] if log_probs else None,
            )
            # Under autocast as the loss's forward, or costs would differ from it.
            with self._accelerator.autocast(), self._student_forward.answering(request):
                student(**model_inputs)
            for name, values in request.scores.items():
                scores[name][rows] = values.to(scores[name].dtype)
            if keep:
                kept.extend(self._per_rollout(states, mask[rows]))
        teacher_failed = on_any_process(self._accelerator, not teacher_is_finite)
        scores_are_finite = all(bool(values.isfinite().all()) for values in scores.values())
        if teacher_failed or on_any_process(self._accelerator, not scores_are_finite):
            self._raise_not_finite(teacher_failed, step)
        return scores, kept if keep else None

    def weighted_hidden(
        self, kept: list[torch.Tensor], weights: torch.Tensor, mask: torch.Tensor
    ) -> list[torch.Tensor]:
        """Of each rollout's hidden states those that the loss weights, (b, T) weights and mask: nothing else is kept."""
        selected = [
            hidden[(row_weights[row_mask] != 0).to(hidden.device)]
            for hidden, row_weights, row_mask in zip(kept, weights, mask, strict=True)
        ]
        pinned = self._args.teacher_hidden_offload and self._accelerator.device.type == "cuda"
        return [hidden.pin_memory() for hidden in selected] if pinned else selected

    def weighted_states(self, inputs: dict[str, Any], rows: torch.Tensor) -> list[TeacherStates]:
        """Teachers' hidden states at the `rows` (b, T) that the loss weights: those kept, or computed once more."""
        if "teacher_hidden" not in inputs:
            return self._states(_model_inputs(inputs), rows, inputs["teacher_index"])
        states = []
        for index, teacher in enumerate(self._teachers.values()):
            # Also a teacher that no rollout here has: gathering a sharded head takes all processes.
            head, own = teacher.head(), inputs["teacher_index"] == index
            hidden = [head.weight.new_empty((0, head.weight.size(1)))]
            hidden += [part for part, is_own in zip(inputs["teacher_hidden"], own.tolist(), strict=True) if is_own]
            states.append(
                TeacherStates(rows & own.unsqueeze(1), torch.cat([part.to(rows.device) for part in hidden]), head)
            )
        return states

    def _states(
        self, model_inputs: dict[str, torch.Tensor], rows: torch.Tensor, teacher_index: torch.Tensor
    ) -> list[TeacherStates]:
        states = []
        for index, teacher in enumerate(self._teachers.values()):
            own = teacher_index == index  # (b,)
            anywhere = bool(own.any()) if len(self._teachers) == 1 else on_any_process(self._accelerator, own.any())
            if not anywhere:
                continue
            # A sharded teacher runs on all processes or on none: where it has no rollout, it reads one for nothing.
            selected = own if own.any() else torch.arange(len(own), device=own.device) == 0
            own_rows = rows & own.unsqueeze(1)
            hidden = teacher.hidden_states(
                model_inputs["input_ids"][selected], model_inputs["attention_mask"][selected], own_rows[selected]
            )
            states.append(TeacherStates(own_rows, hidden, teacher.head()))
        return states

    def _per_rollout(self, states: list[TeacherStates], mask: torch.Tensor) -> list[torch.Tensor]:
        """Hidden states of each rollout (L, H_t), whichever teacher it has."""
        parts: dict[int, torch.Tensor] = {}
        for part in states:
            lengths = part.rows.sum(1).tolist()
            for row, (length, hidden) in enumerate(zip(lengths, part.hidden.split(lengths), strict=True)):
                if length:
                    parts[row] = hidden.cpu() if self._args.teacher_hidden_offload else hidden
        return [parts[row] if row in parts else states[0].hidden[:0] for row in range(len(mask))]

    def _check_token_ids(self, inputs: dict[str, Any], step: int) -> None:
        vocab_size = min(teacher.vocab_size for teacher in self._teachers.values())
        if on_any_process(self._accelerator, (_model_inputs(inputs)["input_ids"] >= vocab_size).any()):
            raise ValueError(
                f"The student produced a token id beyond the teacher's {vocab_size} (its padding, which no text has) "
                f"at step {step}. Suppress those ids with `generation_kwargs={{'suppress_tokens': [...]}}`."
            )

    def _raise_not_finite(self, teacher_failed: bool, step: int) -> None:
        heads_are_finite = all(bool(teacher.head().weight.isfinite().all()) for teacher in self._teachers.values())
        if on_any_process(self._accelerator, not heads_are_finite) or teacher_failed:
            raise ValueError(
                f"The teacher returned NaN or infinite values at step {step}. Check its weights, and load it in a "
                "dtype with enough range (float16 overflows in many models): "
                "`teacher_model_init_kwargs={'dtype': 'bfloat16'}`. The last checkpoint is untouched."
            )
        raise ValueError(
            f"The divergence from the teacher is not finite at step {step} although the teacher's hidden states are. "
            "Either the student diverged (lower the learning rate, see `grad_norm`), or the teacher gives probability "
            "0 to a token that the student can choose: set `teacher_prob_floor`, for example to 1e-6. The last "
            "checkpoint is untouched."
        )


def on_any_process(accelerator: Accelerator, condition: bool | torch.Tensor) -> bool:
    """Whether it holds anywhere: all processes must raise together, or the others would wait for ever."""
    return bool(accelerator.gather(torch.tensor([bool(condition)], device=accelerator.device)).any())


def gather_rows(accelerator: Accelerator, local: torch.Tensor) -> torch.Tensor:
    """(b, T) of this process to (B, T) of all, padded with 0 to the longest T."""
    # Padding makes booleans int64, on the processes alone that need it: the others would gather another dtype.
    rows = local.int() if local.dtype == torch.bool else local
    return accelerator.gather(accelerator.pad_across_processes(rows, dim=1)).to(local.dtype)


def _model_inputs(inputs: dict[str, Any], rows: slice = slice(None)) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.cat([inputs["prompt_ids"][rows], inputs["completion_ids"][rows]], dim=1),
        "attention_mask": torch.cat([inputs["prompt_mask"][rows], inputs["completion_mask"][rows]], dim=1),
    }
