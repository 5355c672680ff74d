"""A teacher server that answers for the trainer's padded batches, and fails on all processes together."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator

from ...teachers import LMHead, RemoteTeacher, TeacherServerError
from .processes import on_any_process


class ServerTeacher:
    """
    A [`RemoteTeacher`] for batches.

    Args:
        remote ([`RemoteTeacher`]):
            The server.
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator. Each process asks the server for its own rollouts.
    """

    def __init__(self, remote: RemoteTeacher, accelerator: Accelerator):
        self.remote, self._accelerator = remote, accelerator
        self.exact, self.vocab_size = remote.exact, remote.vocab_size
        self._head = None
        if remote.head is not None:
            weight, bias = remote.head.weight.to(accelerator.device), remote.head.bias
            self._head = replace(
                remote.head, weight=weight, bias=None if bias is None else bias.to(accelerator.device)
            )

    def head(self) -> LMHead:
        """The teacher's head, on this process's device."""
        return self._head

    def hidden_states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """
        Hidden states (N, H_t) that predict the tokens at `rows` (B, T), as [`LocalTeacher.hidden_states`].

        Raises:
            TeacherServerError: If the server stays away or answers what cannot be right, to any process.
        """
        return self._ask(self.remote.hidden_states, input_ids, attention_mask, rows)

    def log_probs(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (N,) of the tokens at `rows` (B, T), at temperature 1."""
        return self._ask(self.remote.log_probs, input_ids, attention_mask, rows)

    def top_k(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, rows: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The k likeliest tokens at `rows` (B, T) and their log-probabilities, (N, k) each."""

        def packed(sequences: list[list[int]], num_last: list[int]) -> list[torch.Tensor]:
            # Token ids are exact in float64.
            return [
                torch.stack([ids.double(), logps.double()], -1)
                for ids, logps in self.remote.top_k(sequences, num_last, k)
            ]

        both = self._ask(packed, input_ids, attention_mask, rows)  # (N, k, 2)
        return both[..., 0].long(), both[..., 1].float()

    def _ask(
        self,
        question: Callable[[list[list[int]], list[int]], list[torch.Tensor]],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        rows: torch.Tensor,
    ) -> torch.Tensor:
        """What the server says of each sequence without its padding, at `rows`."""
        attended = attention_mask.bool()
        completion = attended[:, -rows.size(1) :]  # (B, T)
        sequences = [ids[own].tolist() for ids, own in zip(input_ids, attended, strict=True)]
        answers: list[Any] = []
        error: Exception | None = None
        try:
            answers = question(sequences, completion.sum(1).tolist())
        except (TeacherServerError, ValueError) as failure:
            error = failure
        if on_any_process(self._accelerator, error is not None):
            raise error or TeacherServerError("The teacher server failed another process, see its error.")
        selected = [
            answer[own_rows[own].to(answer.device)]
            for answer, own_rows, own in zip(answers, rows, completion, strict=True)
        ]
        return torch.cat(selected).to(rows.device)
