"""Completions that are sampled from a mixture of student and teacher."""

import math
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers.generation.utils import ALL_CACHE_NAMES

from ...teachers import OF_IMAGES, OF_TOKENS, probe_rows, swapped
from .guards import RefusedRun


@torch.no_grad()
def check_mixing(teacher: torch.nn.Module) -> None:
    """
    Check that a teacher can be mixed into sampling, by one step with it.

    Args:
        teacher (`torch.nn.Module`):
            Teacher, as for [`TeacherMixture`].

    Raises:
        ValueError: If it returns no cache of what it has read.
    """
    input_ids, attention_mask, _ = probe_rows(teacher)
    mixture = TeacherMixture(0.5, teacher, 1.0, None, None)
    mixture.begin(input_ids, attention_mask)
    mixture._teacher_logits(None)


class TeacherMixture:
    """
    Mixes the teacher into each generation step's logits. The teacher reads what the student has generated as its own
    `generate` would read it, by the same steps: every architecture, and an adapter that brings a prompt, has its own
    cache, positions and mask.

    Args:
        alpha (`float`):
            Share of the teacher.
        teacher (`torch.nn.Module`):
            Teacher, a [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`] as the trainer wraps it.
        temperature (`float`):
            Temperature that both are read at.
        ends (`tuple[int, int]` or `None`):
            As in [`OneStopTeacher`].
        prompts (`tuple[torch.Tensor, torch.Tensor]` or `None`):
            The teacher's own, ids and mask of shape `(B, P)`, where it does not read the student's.
    """

    def __init__(
        self,
        alpha: float,
        teacher: torch.nn.Module,
        temperature: float,
        ends: tuple[int, int] | None,
        prompts: tuple[torch.Tensor, torch.Tensor] | None,
    ):
        self._alpha, self._teacher, self._temperature, self._ends = alpha, teacher, temperature, ends
        self._prompts = prompts
        # PEFT prepares inputs for the model below its own, prompts of its adapters included.
        self._forward = teacher.base_model if is_peft_model(teacher) else teacher

    def begin(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **inputs: Any) -> None:
        """Read what the student's `generate` is called with: prompts (B, P), padded on the left, and images."""
        own = {name: inputs[name] for name in (*OF_IMAGES, *OF_TOKENS) if name in inputs}
        if self._prompts is not None:
            (input_ids, attention_mask), own = self._prompts, {}
        self._token_ids, self._step = input_ids, {"is_first_iteration": True}
        self._state = {"attention_mask": attention_mask, "use_cache": True, **own}
        self._state["position_ids"] = self._teacher._prepare_position_ids_for_generation(input_ids, self._state)
        if self._teacher._supports_logits_to_keep():
            self._state["logits_to_keep"] = 1

    def __call__(self, logits: torch.Tensor, input_ids: torch.Tensor | None) -> torch.Tensor:
        """
        Mix the teacher into the student's logits.

        Args:
            logits (`torch.Tensor`):
                Logits of the student, of shape `(B, 1, V)`, or of more columns, of which `generate` reads the last.
            input_ids (`torch.Tensor` or `None`):
                Tokens that it has read for them, the newest in the last column. Not looked at in the first step.

        Returns:
            `torch.Tensor`: Logits `(B, 1, V)` that, divided by the temperature, are the mixture's log-probabilities.
        """
        logits, teacher_logits = logits[:, -1:], self._teacher_logits(input_ids)
        if self._ends is not None:
            tokens = torch.arange(teacher_logits.size(-1), device=teacher_logits.device)
            teacher_logits = teacher_logits[..., swapped(tokens, self._ends)]
        shared = min(logits.size(-1), teacher_logits.size(-1))
        student_logps = (logits[..., :shared].float() / self._temperature).log_softmax(-1)
        teacher_logps = (teacher_logits[..., :shared].float() / self._temperature).log_softmax(-1)
        mixture_logps = torch.logaddexp(
            student_logps + math.log1p(-self._alpha), teacher_logps + math.log(self._alpha)
        )
        mixed = torch.full_like(logits, -torch.inf, dtype=torch.float32)
        mixed[..., :shared] = self._temperature * mixture_logps
        return mixed

    def _teacher_logits(self, input_ids: torch.Tensor | None) -> torch.Tensor:
        """Logits of the teacher (B, 1, V'), one step of `generate`."""
        if "is_first_iteration" not in self._step:
            self._token_ids = torch.cat([self._token_ids, input_ids[:, -1:]], dim=1)
        inputs = self._teacher.prepare_inputs_for_generation(self._token_ids, **self._step, **self._state)
        outputs = self._forward(**inputs, return_dict=True)
        if not any(name in outputs for name in ALL_CACHE_NAMES):
            raise RefusedRun(
                f"No completions can be sampled with a teacher of type {self._teacher.config.model_type!r}: it returns no "
                "cache of what it has read. Turn that off: `teacher_mixed_alpha=0`."
            )
        self._state = self._teacher._update_model_kwargs_for_generation(outputs, self._state, is_encoder_decoder=False)
        self._step = {"next_sequence_length": 1}
        return outputs.logits[:, -1:]
