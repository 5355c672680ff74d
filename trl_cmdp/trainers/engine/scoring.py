"""Scoring finished rollouts against their teachers, and what the loss then needs of them."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, TypeVar

import torch
from accelerate import Accelerator

from ...core import top_k_divergence_lower_bound
from ...teachers import OneStopTeacher, ServerAnswer, ServerTeacher, Teacher, misfit, model_inputs, take_rows
from .config import DistillConfig
from .forward import DivergenceRequest, StudentForward, TeacherStates
from .processes import on_any_process


_Asked = TypeVar("_Asked", TeacherStates, ServerAnswer)


class RolloutScorer:
    """
    Per-token costs of rollouts, each from the teacher that its prompt names. A teacher's hidden states are kept from
    scoring to the loss while they fit `args.teacher_hidden_memory_mb`, and computed once more otherwise.
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
        """Score this process's rollouts."""
        self._check_fit(inputs, step)
        teachers = list(self._teachers.values())
        exact = all(teacher.exact for teacher in teachers)
        scores: dict[str, torch.Tensor] = {}
        kept: list[torch.Tensor] = []
        keep = exact and most_tokens * self._bytes_per_token() <= self._args.teacher_hidden_memory_mb * 2**20
        teacher_is_finite = True

        def ask(batch: dict[str, Any], rows: slice) -> list[TeacherStates] | list[ServerAnswer]:
            if exact:
                return self._states(batch, mask[rows], inputs["teacher_index"][rows])
            return self._ask_log_probs(teachers[0], _teacher_inputs(batch), mask[rows])

        with closing(self._asked_ahead(ask, inputs, len(mask), batch_size)) as batches:
            for rows, batch, asked in batches:
                row_inputs, row_mask, token_ids = model_inputs(batch), mask[rows], batch["completion_ids"]
                if exact:
                    request = DivergenceRequest(
                        asked, scored_mask=row_mask, token_ids=token_ids if log_probs else None
                    )
                    self._answer(student, request, row_inputs)
                    teacher_is_finite = teacher_is_finite and all(bool(part.hidden.isfinite().all()) for part in asked)
                    answer = request.scores
                    if keep:
                        kept.extend(self._per_rollout(asked, row_mask))
                else:
                    answer = self._score_log_probs(student, asked, row_inputs, row_mask, token_ids)
                for name, values in answer.items():
                    scores.setdefault(name, torch.zeros(mask.shape, device=mask.device))[rows] = values
        teacher_failed = on_any_process(self._accelerator, not teacher_is_finite)
        scores_are_finite = all(bool(values.isfinite().all()) for values in scores.values())
        if teacher_failed or on_any_process(self._accelerator, not scores_are_finite):
            self._raise_not_finite(teacher_failed, step)
        return scores, kept if keep else None

    def _answer(self, student: torch.nn.Module, request: DivergenceRequest, inputs: dict[str, torch.Tensor]) -> None:
        # Under autocast as the loss's forward, or costs would differ from it.
        with self._accelerator.autocast(), self._student_forward.answering(request):
            student(**inputs)

    def _asked_ahead(
        self,
        ask: Callable[[dict[str, Any], slice], list[_Asked]],
        inputs: dict[str, Any],
        num_rows: int,
        batch_size: int,
    ) -> Iterator[tuple[slice, dict[str, Any], list[_Asked]]]:
        """
        Batches of rows, which they are, and what the teachers were asked about each. Servers are asked about the next ones too, so that they
        compute while the student does. What is not waited for any more is cancelled.
        """
        ahead = min(teacher.ahead for teacher in self._teachers.values())
        asked: deque[tuple[slice, dict[str, Any], list[_Asked]]] = deque()
        next_start = 0
        try:
            for start in range(0, num_rows, batch_size):
                while next_start < min(start + batch_size + ahead, num_rows):
                    rows = slice(next_start, next_start + batch_size)
                    batch = take_rows(inputs, range(num_rows)[rows])
                    asked.append((rows, batch, ask(batch, rows)))
                    next_start += batch_size
                yield asked[0]
                asked.popleft()
        finally:
            for *_, answers in asked:
                for answer in answers:
                    answer.cancel()

    def _ask_log_probs(
        self, teacher: ServerTeacher | OneStopTeacher, inputs: dict[str, torch.Tensor], mask: torch.Tensor
    ) -> list[ServerAnswer]:
        """Log-probabilities of the tokens, and the likeliest tokens if they are wanted."""
        k = self._args.teacher_model_server_top_k
        top_k = [teacher.ask_top_k(**inputs, mask=mask, k=k)] if k > 0 else []
        return [teacher.ask_log_probs(**inputs, mask=mask), *top_k]

    def _score_log_probs(
        self,
        student: torch.nn.Module,
        asked: list[ServerAnswer],
        inputs: dict[str, torch.Tensor],
        mask: torch.Tensor,
        token_ids: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Scores (b, T) by a teacher that knows log-probabilities alone: both models', and a bound if asked for."""
        log_probs, *top_k = asked
        wanted = token_ids.unsqueeze(-1)  # (b, T, 1 + k)
        if top_k:
            likely_ids, teacher_top_k = top_k[0].result().unbind(-1)  # (N, k) each
            wanted = torch.cat([wanted, wanted.expand(*mask.shape, likely_ids.size(1))], -1)
            wanted[..., 1:][mask] = likely_ids.long()
        request = DivergenceRequest([], scored_mask=mask, token_ids=wanted)
        self._answer(student, request, inputs)
        student_logps = request.scores["student_logps"]  # (b, T, 1 + k)
        teacher_logps = torch.zeros(mask.shape, device=mask.device)
        teacher_logps[mask] = log_probs.result()
        scores = {"student_logps": student_logps[..., 0], "teacher_logps": teacher_logps}
        if top_k:
            bound = torch.zeros_like(teacher_logps)
            bound[mask] = top_k_divergence_lower_bound(student_logps[mask][:, 1:], teacher_top_k.float())
            scores["divergence_lower_bound"] = bound
        return scores

    def _bytes_per_token(self) -> int:
        heads = [teacher.head().weight for teacher in self._teachers.values()]
        return max(head.size(1) * head.element_size() for head in heads)

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

    def weighted_states(self, inputs: dict[str, Any], mask: torch.Tensor) -> list[TeacherStates]:
        """Teachers' hidden states at the tokens (b, T) that the loss weights: those kept, or computed once more."""
        if "teacher_hidden" not in inputs:
            return self._states(inputs, mask, inputs["teacher_index"])
        states = []
        for index, teacher in enumerate(self._teachers.values()):
            # Also a teacher that no rollout here has: gathering a sharded head takes all processes.
            head, own = teacher.head(), inputs["teacher_index"] == index
            hidden = [
                part.to(mask.device)
                for part, is_own in zip(inputs["teacher_hidden"], own.tolist(), strict=True)
                if is_own and len(part) > 0  # a rollout without tokens has the width of any teacher
            ]
            hidden = torch.cat(hidden) if hidden else head.weight.new_empty((0, head.weight.size(1)))
            states.append(TeacherStates(mask & own.unsqueeze(1), hidden, head))
        return states

    def _states(self, batch: dict[str, Any], mask: torch.Tensor, teacher_index: torch.Tensor) -> list[TeacherStates]:
        states = []
        for index, teacher in enumerate(self._teachers.values()):
            own = teacher_index == index  # (b,)
            anywhere = bool(own.any()) if len(self._teachers) == 1 else on_any_process(self._accelerator, own.any())
            if not anywhere:
                continue
            # A sharded teacher runs on all processes or on none: where it has no rollout, it reads one for nothing.
            selected = own if own.any() else torch.arange(len(own), device=own.device) == 0
            own_mask = mask & own.unsqueeze(1)
            own_inputs = _teacher_inputs(take_rows(batch, selected.nonzero().flatten().tolist()))
            ask = teacher.ask if teacher.ahead else teacher.hidden_states
            states.append(TeacherStates(own_mask, ask(**own_inputs, mask=own_mask[selected]), teacher.head()))
        return states

    def _per_rollout(self, states: list[TeacherStates], mask: torch.Tensor) -> list[torch.Tensor]:
        """Hidden states of each rollout (L, H_t), whichever teacher it has."""
        parts: dict[int, torch.Tensor] = {}
        for part in states:
            lengths = part.mask.sum(1).tolist()
            for row, (length, hidden) in enumerate(zip(lengths, part.hidden.split(lengths), strict=True)):
                if length:
                    parts[row] = hidden.cpu() if self._args.teacher_hidden_offload else hidden
        return [parts[row] if row in parts else states[0].hidden[:0] for row in range(len(mask))]

    def _check_fit(self, inputs: dict[str, Any], step: int) -> None:
        teachers = list(self._teachers.values())
        read = _teacher_inputs(inputs)
        problems = (misfit(teacher, read["input_ids"], read["attention_mask"]) for teacher in teachers)
        problem = next(filter(None, problems), None)
        if on_any_process(self._accelerator, problem is not None):
            raise ValueError(
                f"At step {step}: {problem or 'a rollout of another process does not fit, see its error.'}"
            )

    def _raise_not_finite(self, teacher_failed: bool, step: int) -> None:
        teachers = [teacher for teacher in self._teachers.values() if teacher.exact]
        heads_are_finite = all(bool(teacher.head().weight.isfinite().all()) for teacher in teachers)
        if on_any_process(self._accelerator, not heads_are_finite) or teacher_failed:
            raise ValueError(
                f"The teacher returned NaN or infinite values at step {step}. Check its weights, and load it in a "
                "dtype with enough range (float16 overflows in many models): "
                "`teacher_model_init_kwargs={'dtype': 'bfloat16'}`. The last checkpoint is untouched."
            )
        raise ValueError(
            f"The cost of a token is not finite at step {step}, and it is not the teacher's weights. Either the "
            "student diverged (lower the learning rate, see `grad_norm`), or the teacher gives probability "
            "0 to a token that the student can choose: set `teacher_prob_floor`, for example to 1e-6. The last "
            "checkpoint is untouched."
        )


def _teacher_inputs(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What teachers read of a batch: as the student, but behind their own prompts where the dataset has them."""
    if "teacher_prompt_ids" in batch:
        batch = {**batch, "prompt_ids": batch["teacher_prompt_ids"], "prompt_mask": batch["teacher_prompt_mask"]}
    return model_inputs(batch)
