"""What the student's one forward pass is asked for besides TRL's own outputs."""

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from ..teachers import head_divergence, head_log_probs, last_hidden_state, lm_head
from ._config import DistillConfig


@dataclass
class DivergenceRequest:
    """
    Asks a forward pass for the divergence on `rows`, with gradient if there are weights.

    Args:
        rows (`torch.Tensor`):
            Booleans of shape `(B, T)`, the N positions asked for.
        teacher_hidden (`torch.Tensor`):
            Teacher's hidden states of shape `(N, H_t)`, in row-major order.
        weights (`torch.Tensor`, *optional*):
            Weights of shape `(N,)`. Without them only costs are computed, and TRL's outputs are not.
        token_ids (`torch.Tensor`, *optional*):
            Sampled tokens of shape `(N,)`, where their log-probabilities are wanted too.
        cross_entropy (`bool`, *optional*):
            Differentiate the teacher's expected negative log-likelihood in place of the divergence.

    The forward sets `loss` (a scalar) and `scores`, of shape `(N,)` each: `costs` and, if asked for, `student_logps` and
    `teacher_logps`.
    """

    rows: torch.Tensor
    teacher_hidden: torch.Tensor
    weights: torch.Tensor | None = None
    token_ids: torch.Tensor | None = None
    cross_entropy: bool = False
    loss: torch.Tensor | None = None
    scores: dict[str, torch.Tensor] = field(default_factory=dict)


class StudentForward:
    """
    Wraps the student's (already fused) forward, once, so that it answers requests: the divergence is computed from the
    hidden states of the one forward pass, inside it, where FSDP and DeepSpeed have the head gathered. While
    [`~StudentForward.mixing`], the logits that generation samples from are those of the mixture with the teacher.

    Args:
        student ([`~transformers.PreTrainedModel`]):
            Student, patched in place.
        teacher ([`~transformers.PreTrainedModel`]):
            Teacher, unwrapped.
        args ([`DistillConfig`]):
            Where β, temperature, memory and probability floor come from.
        gathered_head (`Callable`):
            Context manager that gathers the parameters it is given where they are sharded.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        args: DistillConfig,
        gathered_head: Callable[..., AbstractContextManager],
    ):
        self._student, self._teacher, self._args, self._gathered_head = student, teacher, args, gathered_head
        self._request: DivergenceRequest | None = None
        self._mixture: _TeacherMixture | None = None
        self._fused_forward = student.forward

        @functools.wraps(student.forward)
        def forward(_, *args, **kwargs):
            return self._forward(*args, **kwargs)

        student.forward = forward.__get__(student)

    @contextmanager
    def answering(self, request: DivergenceRequest):
        """Every forward inside answers the request."""
        self._request = request
        try:
            yield
        finally:
            self._request = None

    @contextmanager
    def mixing(self, alpha: float, teacher: torch.nn.Module):
        """Generation inside samples from α·teacher + (1 − α)·student, both at the training temperature."""
        self._mixture = _TeacherMixture(alpha, teacher, self._args.temperature)
        try:
            yield
        finally:
            self._mixture = None

    def _forward(self, *args, **kwargs):
        request = self._request
        if request is None:
            outputs = self._fused_forward(*args, **kwargs)
            if self._mixture is not None:
                outputs.logits = self._mixture(outputs.logits, **kwargs)
            return outputs
        if request.weights is None:
            kwargs.pop("labels", None)  # PEFT passes it on as None
            hidden = last_hidden_state(self._student, request.rows.size(1), **kwargs)
            self._answer(request, hidden)
            return hidden
        captured = []
        hook = self._student.base_model.register_forward_hook(
            lambda module, inputs, output: captured.append(output.last_hidden_state)
        )
        try:
            outputs = self._fused_forward(*args, **kwargs)
        finally:
            hook.remove()
        self._answer(request, captured[0][:, -(request.rows.size(1) + 1) : -1])
        return outputs

    def _answer(self, request: DivergenceRequest, hidden: torch.Tensor) -> None:
        args = self._args
        student_head, teacher_head = lm_head(self._student), lm_head(self._teacher)
        student_hidden, teacher_hidden = hidden[request.rows], request.teacher_hidden  # (N, H_s), (N, H_t)
        with (
            self._gathered_head(student_head.weight, student_head.bias),
            self._gathered_head(teacher_head.weight, teacher_head.bias),
        ):
            request.loss, request.scores["costs"] = head_divergence(
                student_hidden,
                student_head,
                teacher_hidden,
                teacher_head,
                request.weights,
                beta=args.teacher_beta,
                temperature=args.temperature,
                memory_mb=args.divergence_memory_mb,
                teacher_prob_floor=args.teacher_prob_floor,
                cross_entropy=request.cross_entropy,
            )
            if request.token_ids is None:
                return
            vocab_size = min(len(student_head.weight), len(teacher_head.weight))
            shared = (request.token_ids, vocab_size, args.temperature, args.divergence_memory_mb)
            request.scores["student_logps"] = head_log_probs(student_hidden, student_head, *shared)
            request.scores["teacher_logps"] = head_log_probs(
                teacher_hidden, teacher_head, *shared, args.teacher_prob_floor
            )


class _TeacherMixture:
    """Mixes the teacher into each generation step's logits. It keeps the teacher's own cache of the same tokens."""

    def __init__(self, alpha: float, teacher: torch.nn.Module, temperature: float):
        self._alpha, self._teacher, self._temperature = alpha, teacher, temperature
        self._cache = DynamicCache()

    def __call__(self, logits: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Logits (B, 1, V) that, divided by the temperature, are the mixture's log-probabilities."""
        inputs = {name: kwargs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in kwargs}
        teacher_logits = self._teacher(**inputs, past_key_values=self._cache, use_cache=True).logits
        shared = min(logits.size(-1), teacher_logits.size(-1))
        last = slice(-logits.size(1), None)
        student_logps = (logits[..., :shared].float() / self._temperature).log_softmax(-1)
        teacher_logps = (teacher_logits[:, last, :shared].float() / self._temperature).log_softmax(-1)
        mixture_logps = torch.logaddexp(
            student_logps + math.log1p(-self._alpha), teacher_logps + math.log(self._alpha)
        )
        mixed = torch.full_like(logits, -torch.inf, dtype=torch.float32)
        mixed[..., :shared] = self._temperature * mixture_logps
        return mixed
