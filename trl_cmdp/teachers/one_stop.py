"""A teacher whose end of turn counts as the student's."""

from dataclasses import replace

import torch
from trl.trainer.utils import maybe_gather_lm_head_ctx

from ..core import Head
from ..core.fingerprint import fingerprint
from .server_teacher import ServerAnswer, ServerTeacher
from .teacher import Teacher


class OneStopTeacher:
    """
    A [`Teacher`] that ends a turn with another token than the student, where both are meant to be one stop action: its
    probabilities of the two tokens are swapped, in everything that is asked of it.

    Args:
        teacher ([`Teacher`]):
            Teacher.
        ends (`tuple[int, int]`):
            Token ids with which student and teacher end a turn.
    """

    def __init__(self, teacher: Teacher, ends: tuple[int, int]):
        self._teacher, self._ends = teacher, ends
        self.exact, self.vocab_size, self.max_length = teacher.exact, teacher.vocab_size, teacher.max_length
        self.ahead = teacher.ahead
        self._head: Head | None = None

    def hidden_states(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, mask: torch.Tensor, **images: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states (N, H), see [`Teacher`]. The teacher reads the student's tokens as they are."""
        return self._teacher.hidden_states(input_ids, attention_mask, mask, **images)

    def ask(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, mask: torch.Tensor) -> ServerAnswer:
        """As [`ServerTeacher.ask`]."""
        return self._server.ask(input_ids, attention_mask, mask)

    def head(self) -> Head:
        """The teacher's head with two rows swapped: a copy, which is kept, as a teacher does not change."""
        if self._head is None:
            head = self._teacher.head()
            with maybe_gather_lm_head_ctx(head.weight, head.bias):
                rows = torch.arange(head.vocab_size, device=head.weight.device)
                rows = swapped(rows, self._ends)
                self._head = replace(
                    head,
                    weight=head.weight.detach()[rows],
                    bias=None if head.bias is None else head.bias.detach()[rows],
                )
        return self._head

    def ask_log_probs(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, mask: torch.Tensor) -> ServerAnswer:
        """
        As [`ServerTeacher.ask_log_probs`]. A server gives the probability of the tokens that it reads, so it is given the other
        end in place of one: at the end of a completion, which nothing follows, and inside it in a row that ends there.
        """
        start, length = input_ids.size(1) - mask.size(1), input_ids.size(1)
        others = swapped(input_ids, self._ends)  # (B, P + T)
        columns = torch.arange(length, device=input_ids.device)
        at_end = columns == (attention_mask * columns).amax(1, keepdim=True)
        asked = torch.nn.functional.pad(mask, (start, 0))  # (B, P + T)
        inside = asked & (input_ids != others) & ~at_end
        rows, ends = inside.nonzero().unbind(1)  # (M,)
        answer = self._server.ask_log_probs(
            torch.cat(
                [
                    torch.where(at_end, others, input_ids),
                    torch.where(columns == ends[:, None], others[rows], input_ids[rows]),
                ]
            ),
            torch.cat([attention_mask, attention_mask[rows] * (columns <= ends[:, None])]),
            torch.cat([mask, (columns == ends[:, None])[:, start:]]),
        )

        def of_either_end(logps: torch.Tensor) -> torch.Tensor:
            values = logps.new_zeros(asked.shape)
            values[asked], values[inside] = logps[: len(logps) - len(rows)], logps[len(logps) - len(rows) :]
            return values[asked]

        return answer.read_as(of_either_end)

    def ask_top_k(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, mask: torch.Tensor, k: int
    ) -> ServerAnswer:
        """As [`ServerTeacher.ask_top_k`]."""
        answer = self._server.ask_top_k(input_ids, attention_mask, mask, k)
        return answer.read_as(lambda both: torch.stack([swapped(both[..., 0], self._ends), both[..., 1]], -1))

    def fingerprint(self) -> str:
        """Of the teacher and the two tokens."""
        return fingerprint([self._teacher.fingerprint(), self._ends])

    @property
    def _server(self) -> ServerTeacher:
        assert isinstance(self._teacher, ServerTeacher)  # what else is asked ahead, or has log-probabilities alone
        return self._teacher


def swapped(token_ids: torch.Tensor, ends: tuple[int, int]) -> torch.Tensor:
    """Token ids in which each of two takes the other's part."""
    first, second = ends
    return torch.where(token_ids == first, second, torch.where(token_ids == second, first, token_ids))
