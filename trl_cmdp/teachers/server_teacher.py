"""A teacher server as a teacher of padded batches."""

from collections.abc import Callable
from typing import Any

import torch

from ..core import Head
from ._server import TeacherServerError
from .remote import EXACT_SERVER_COMMAND, RemoteTeacher


SERVERS_READ_TEXT = (
    "A teacher server reads text alone: it is sent token ids, and no images. Take the teacher into this process "
    "(`teacher_model` without `teacher_model_server_url`, quantised if memory is short), or remove the images from the "
    "data (`dataset.remove_columns`, or the image parts of the messages)."
)


class ServerTeacher:
    """
    A [`RemoteTeacher`] as a [`Teacher`]. Each process asks the server for its own rollouts.

    Args:
        remote ([`RemoteTeacher`]):
            The server.
        device (`torch.device`):
            Device of what it answers.
        on_any_process (`Callable[[bool], bool]`, *optional*):
            Whether a condition holds on any of several processes, which then raise together.
    """

    def __init__(
        self, remote: RemoteTeacher, device: torch.device, on_any_process: Callable[[bool], bool] = lambda here: here
    ):
        self.remote, self._on_any_process = remote, on_any_process
        self.exact, self.vocab_size = remote.exact, remote.vocab_size
        self.max_length: int | None = None  # the server says itself what is too long
        self._head = None if remote.head is None else remote.head.to(device)

    def head(self) -> Head:
        """The teacher's head."""
        if self._head is None:
            raise ValueError(
                f"The teacher server at {self.remote.url} returns log-probabilities only, and the exact divergence needs "
                f"hidden states. Start it with: {EXACT_SERVER_COMMAND}"
            )
        return self._head

    def fingerprint(self) -> str:
        """Of what the server names its model, and of the head."""
        return self.remote.fingerprint()

    def hidden_states(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, mask: torch.Tensor, **images: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states (N, H), see [`Teacher`]."""
        if images:
            raise ValueError(SERVERS_READ_TEXT)
        return self._ask(self.remote.hidden_states, input_ids, attention_mask, mask)

    def log_probs(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (N,) of the tokens of a mask (B, T), at temperature 1."""
        return self._ask(self.remote.log_probs, input_ids, attention_mask, mask)

    def top_k(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, mask: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The k likeliest tokens at each token of a mask (B, T) and their log-probabilities, (N, k) each."""

        def packed(sequences: list[list[int]], num_last: list[int]) -> list[torch.Tensor]:
            # Token ids are exact in float64.
            return [
                torch.stack([ids.double(), logps.double()], -1)
                for ids, logps in self.remote.top_k(sequences, num_last, k)
            ]

        both = self._ask(packed, input_ids, attention_mask, mask)  # (N, k, 2)
        return both[..., 0].long(), both[..., 1].float()

    def _ask(
        self,
        question: Callable[[list[list[int]], list[int]], list[torch.Tensor]],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """What the server says of each sequence without its padding, at the tokens of the mask."""
        attended = attention_mask.bool()
        completion = attended[:, -mask.size(1) :]  # (B, T)
        sequences = [ids[own].tolist() for ids, own in zip(input_ids, attended, strict=True)]
        answers: list[Any] = []
        error: Exception | None = None
        try:
            answers = question(sequences, completion.sum(1).tolist())
        except (TeacherServerError, ValueError) as failure:
            error = failure
        if self._on_any_process(error is not None):
            raise error or TeacherServerError("The teacher server failed another process, see its error.")
        selected = [
            answer[asked[own].to(answer.device)] for answer, asked, own in zip(answers, mask, completion, strict=True)
        ]
        return torch.cat(selected).to(mask.device)
