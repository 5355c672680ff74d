"""What the student's one forward pass is asked for besides TRL's own outputs."""

import functools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from ... import core
from ...core import Head, chunked_log_probs, default_memory_mb
from ...teachers import (
    LeftAligned,
    ServerAnswer,
    backbone,
    predicting,
    read_head,
    without_no_images,
)
from ...teachers.kernels import chunked_divergence, chunked_policy_divergence, chunked_scores
from .config import DistillConfig
from .mixture import TeacherMixture


_logger = logging.getLogger(__name__)


@dataclass
class TeacherStates:
    """What one teacher says of a batch."""

    mask: torch.Tensor  # booleans of shape `(B, T)`, the N positions that it was asked for
    answer: torch.Tensor | ServerAnswer  # its hidden states there, of shape `(N, H_t)`, in row-major order
    head: Head  # its head

    @property
    def hidden(self) -> torch.Tensor:
        """The hidden states. A server is waited for: read them only when the student's own are there."""
        return self.answer if isinstance(self.answer, torch.Tensor) else self.answer.result()

    def cancel(self) -> None:
        """They are not read any more."""
        if isinstance(self.answer, ServerAnswer):
            self.answer.cancel()


@dataclass
class DivergenceRequest:
    """
    Asks a forward pass for divergences from the teachers, with gradient if there are weights.

    The forward sets `loss`, a scalar, if there are weights; and `scores`, of shape `(B, T)` each and 0 where nothing was
    asked: `costs` and, if wanted, `student_logps` and `teacher_logps`.
    """

    teachers: list[TeacherStates]  # teachers, of whom no two were asked for the same position
    # Weights of shape `(B, T)`. Without them only scores are computed, and TRL's outputs are not
    weights: torch.Tensor | None = None
    # Booleans of shape `(B, T)`, the tokens to score, where there are no weights
    scored_mask: torch.Tensor | None = None
    # Completions of shape `(B, T)`, where the log-probabilities of their tokens are wanted too. Without teachers also
    # several tokens at each position, `(B, T, k)`
    token_ids: torch.Tensor | None = None
    # Differentiate the teacher's expected negative log-likelihood in place of the divergence
    cross_entropy: bool = False
    loss: torch.Tensor | None = None
    scores: dict[str, torch.Tensor] = field(default_factory=dict)


class StudentForward:
    """
    Wraps the student's (already fused) forward, once, so that it answers requests: the divergence is computed from the
    hidden states of the one forward pass, inside it, where FSDP and DeepSpeed have the head gathered. While
    [`~StudentForward.mixing`], the logits that generation samples from are those of the mixture with the teacher, which is
    told what `generate`, wrapped too, is called with.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        args: DistillConfig,
        gathered_head: Callable[..., AbstractContextManager],
        fused: bool,
    ):
        self._student, self._gathered_head, self._fused = student, gathered_head, fused
        self._comparison = args.comparison
        self._memory_mb = args.divergence_memory_mb  # less once the device's memory has run out
        self._request: DivergenceRequest | None = None
        self._mixture: TeacherMixture | None = None
        self._fused_forward, student_generate = student.forward, student.generate

        @functools.wraps(type(student).forward)  # PEFT and `generate` look at its signature
        def forward(_, *args, **kwargs):
            return self._forward(*args, **kwargs)

        @functools.wraps(type(student).generate)
        def generate(_, *args, **kwargs):
            if self._mixture is not None:
                self._mixture.begin(**kwargs)
            return student_generate(*args, **kwargs)

        student.forward = forward.__get__(student)
        student.generate = generate.__get__(student)

    @contextmanager
    def answering(self, request: DivergenceRequest):
        """Every forward inside answers the request."""
        self._request = request
        try:
            yield
        finally:
            self._request = None
            for states in request.teachers:
                states.cancel()

    @contextmanager
    def mixing(
        self,
        alpha: float,
        teacher: torch.nn.Module,
        ends: tuple[int, int] | None = None,
        prompts: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        """
        Generation inside samples from α·teacher + (1 − α)·student, both at the training temperature. `ends` are as in
        [`OneStopTeacher`]; `prompts` are the teacher's own, ids and mask (B, P), where it does not read the student's.
        """
        self._mixture = TeacherMixture(alpha, teacher, self._comparison.temperature, ends, prompts)
        try:
            yield
        finally:
            self._mixture = None

    def _forward(self, *args, **kwargs):
        request = self._request
        if request is None:
            outputs = self._fused_forward(*args, **kwargs)
            if self._mixture is not None:
                outputs.logits = self._mixture(outputs.logits, kwargs.get("input_ids"))
            return outputs
        if request.weights is None:
            kwargs.pop("labels", None)  # PEFT passes it on as None
            hidden = self._last_hidden_state(**kwargs)
            self._score(request, predicting(hidden, request.scored_mask.size(1)))
            return hidden
        if self._fused and len(request.teachers) == 1 and not kwargs.get("output_router_logits"):
            return self._differentiate_fused(request, **kwargs)
        captured = []
        hook = backbone(self._student).register_forward_hook(
            lambda module, inputs, output: captured.append(output.last_hidden_state)
        )
        try:
            rows, outputs = left_aligned_outputs(self._fused_forward, **kwargs)
        finally:
            hook.remove()
        self._differentiate(request, predicting(rows.restore(captured[0]), request.weights.size(1)))
        return outputs

    def _last_hidden_state(self, **model_inputs: Any) -> torch.Tensor:
        # Not by the head's input, as a teacher's: FSDP2 shards again what a backward does not reach by its output.
        rows = LeftAligned(without_no_images(model_inputs))
        return rows.restore(backbone(self._student)(**rows.inputs, use_cache=False).last_hidden_state)

    def _differentiate_fused(
        self, request: DivergenceRequest, *, labels: torch.Tensor, fused_lm_head: bool, **model_inputs: Any
    ) -> FusedCausalLMOutput:
        """TRL's outputs and the loss Σ weights·divergences from one projection of the student's hidden states."""
        (states,) = request.teachers
        hidden = self._last_hidden_state(**model_inputs)[:, :-1]
        labels = labels[:, 1:]
        mask = labels != -100  # (B, P + T - 1), the positions that TRL wants log-probabilities of
        weights = torch.nn.functional.pad(request.weights, (labels.size(1) - request.weights.size(1), 0))[mask]  # (N,)
        weighted = states.mask & (request.weights != 0)  # a weight may have underflowed
        teacher_hidden = (
            states.hidden if weighted.equal(states.mask) else states.hidden[weighted[states.mask]]
        )  # (M, H_t)
        head = read_head(self._student)
        with self._gathered_head(head.weight, head.bias), self._gathered_head(states.head.weight, states.head.bias):
            log_probs, entropy, request.loss, costs = self._in_tiles(
                chunked_policy_divergence,
                hidden[mask],
                head,
                teacher_hidden,
                states.head,
                replace(self._comparison, cross_entropy=request.cross_entropy),
                labels[mask],
                weights,
            )
        self._put(request, "costs", weighted, costs)

        def placed(values: torch.Tensor) -> torch.Tensor:  # (N,) to (B, P + T - 1)
            return values.new_zeros(mask.shape).masked_scatter(mask, values)

        return FusedCausalLMOutput(log_probs=placed(log_probs), entropy=placed(entropy))

    def _differentiate(self, request: DivergenceRequest, hidden: torch.Tensor) -> None:
        """Set the loss Σ weights·divergences, with gradient to the student's hidden states (B, T, H) and head."""
        request.loss = hidden.new_zeros((), dtype=torch.float32)
        head = read_head(self._student)
        # Of a head that may be partitioned again by the time of backward, the gradient must be formed now.
        compute = chunked_divergence if self._fused else core.chunked_divergence
        for states in request.teachers:
            with (
                self._gathered_head(head.weight, head.bias),
                self._gathered_head(states.head.weight, states.head.bias),
            ):
                loss, costs = self._in_tiles(
                    compute,
                    hidden[states.mask],
                    head,
                    states.hidden,
                    states.head,
                    request.weights[states.mask],
                    **asdict(replace(self._comparison, cross_entropy=request.cross_entropy)),
                )
            request.loss = request.loss + loss
            self._put(request, "costs", states.mask, costs)

    def _score(self, request: DivergenceRequest, hidden: torch.Tensor) -> None:
        """Set the scores, without gradient."""
        head = read_head(self._student)
        for states in request.teachers:
            token_ids = None if request.token_ids is None else request.token_ids[states.mask]
            with (
                self._gathered_head(head.weight, head.bias),
                self._gathered_head(states.head.weight, states.head.bias),
            ):
                scores = self._in_tiles(
                    chunked_scores,
                    hidden[states.mask],
                    head,
                    states.hidden,
                    states.head,
                    self._comparison,
                    token_ids,
                )
            for name, values in scores._asdict().items():
                if values is not None:
                    self._put(request, name, states.mask, values)
        if not request.teachers:  # a teacher that knows the tokens' log-probabilities alone
            mask = request.scored_mask
            with self._gathered_head(head.weight, head.bias):
                logps = self._in_tiles(
                    chunked_log_probs, hidden[mask], head, request.token_ids[mask], self._comparison.temperature
                )
            self._put(request, "student_logps", mask, logps)

    def _in_tiles(self, compute: Callable[..., Any], *inputs: Any, **settings: Any) -> Any:
        """What it computes. Where the device's memory runs out it is tried once more, in tiles a quarter as large."""
        try:
            return compute(*inputs, memory_mb=self._memory_mb, **settings)
        except torch.OutOfMemoryError:
            self._memory_mb = (self._memory_mb or default_memory_mb(self._student.device)) / 4
            _logger.warning(
                f"The device's memory ran out in the divergence. Its tiles take {self._memory_mb:g} MB from here on, "
                "which is slower: set `divergence_memory_mb` to that, or free memory elsewhere."
            )
        # Out here the failed attempt's tensors are no longer held by its traceback.
        torch.cuda.empty_cache()
        try:
            return compute(*inputs, memory_mb=self._memory_mb, **settings)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"The device's memory ran out in the divergence, also in tiles of {self._memory_mb:g} MB. Lower "
                "`per_device_train_batch_size` (and raise `gradient_accumulation_steps` as much), "
                "`max_completion_length`, or the memory that generation holds. The last checkpoint is untouched."
            ) from error

    def _put(self, request: DivergenceRequest, name: str, mask: torch.Tensor, values: torch.Tensor) -> None:
        if name not in request.scores:
            request.scores[name] = values.new_zeros((*mask.shape, *values.shape[1:]))
        request.scores[name][mask] = values


def left_aligned_outputs(
    forward: Callable[..., FusedCausalLMOutput], *, labels: torch.Tensor, **model_inputs: Any
) -> tuple[LeftAligned, FusedCausalLMOutput]:
    """TRL's outputs of a fused forward, computed of the rows without the padding on their left, and these rows."""
    rows = LeftAligned(model_inputs)
    outputs = forward(labels=rows.align(labels), **rows.inputs)
    unscored = labels[:, 1:] == -100
    for name in ("log_probs", "entropy"):
        if name in outputs:  # what TRL has not asked for is not
            moved = rows.restore(torch.nn.functional.pad(outputs[name], (1, 0)))  # (B, L)
            outputs[name] = moved[:, 1:].masked_fill(unscored, 0.0)
    return rows, outputs


def score_without_left_padding(model: PreTrainedModel) -> None:
    """
    Let a fused forward read its rows without the padding on their left, as they were sampled: TRL's own loss of a model
    whose positions are a table counts the padding among them.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model that TRL has given a fused head, patched in place.
    """
    fused_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(_, *args, **kwargs):
        if kwargs.get("fused_lm_head"):
            return left_aligned_outputs(fused_forward, **kwargs)[1]
        return fused_forward(*args, **kwargs)

    model.forward = forward.__get__(model)
