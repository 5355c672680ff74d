"""A teacher server as a teacher of padded batches."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache, partial
from typing import Any

import torch

from ..core import Head
from ._server import EXACT_SERVER_COMMAND, TeacherServerError, awaited
from .images import OF_IMAGES
from .remote import RemoteTeacher


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
        self.ahead = remote.concurrency
        self._seconds_waited = 0.0
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

    def take_seconds_waited(self) -> float:
        """How long this process has waited for answers since this was last asked."""
        seconds, self._seconds_waited = self._seconds_waited, 0.0
        return seconds

    def hidden_states(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, mask: torch.Tensor, **images: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states (N, H), see [`Teacher`]."""
        if images.keys() & OF_IMAGES:
            raise ValueError(SERVERS_READ_TEXT)
        return self.ask(input_ids, attention_mask, mask).result()

    def ask(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, mask: torch.Tensor) -> "ServerAnswer":
        """Hidden states (N, H), asked for and not waited for."""
        return self._ask(self.remote.ask_hidden_states, input_ids, attention_mask, mask)

    def ask_log_probs(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, mask: torch.Tensor
    ) -> "ServerAnswer":
        """Log-probabilities (N,) of the tokens of a mask (B, T), at temperature 1."""
        return self._ask(self.remote.ask_log_probs, input_ids, attention_mask, mask)

    def ask_top_k(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, mask: torch.Tensor, k: int
    ) -> "ServerAnswer":
        """
        The k likeliest tokens at each token of a mask (B, T) and their log-probabilities, of shape (N, k, 2) and in float64,
        in which token ids are exact.
        """

        def stacked(answer: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return torch.stack([values.double() for values in answer], -1)

        return self._ask(partial(self.remote.ask_top_k, k=k), input_ids, attention_mask, mask, stacked)

    def _ask(
        self,
        question: Callable[[list[list[int]], list[int]], Future[list[Any]]],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        mask: torch.Tensor,
        read: Callable[[Any], torch.Tensor] = lambda answer: answer,
    ) -> "ServerAnswer":
        """What the server says of each sequence without its padding, at the tokens of the mask."""
        attended = attention_mask.bool()
        completion = attended[:, -mask.size(1) :]  # (B, T)
        sequences = [ids[own].tolist() for ids, own in zip(input_ids, attended, strict=True)]
        answers: Future[list[Any]] = Future()
        try:
            answers = question(sequences, completion.sum(1).tolist())
        except ValueError as failure:
            answers.set_exception(failure)  # other processes have to learn of it, which they do when they wait

        def wait() -> torch.Tensor:
            error: Exception | None = None
            started = time.perf_counter()
            try:
                said = awaited(answers)
            except (TeacherServerError, ValueError) as failure:
                error = failure
            self._seconds_waited += time.perf_counter() - started
            if self._on_any_process(error is not None):
                raise error or TeacherServerError("The teacher server failed another process, see its error.")
            selected = [
                read(answer)[asked[own].to("cpu")] for answer, asked, own in zip(said, mask, completion, strict=True)
            ]
            return torch.cat(selected).to(mask.device)

        return ServerAnswer(wait, answers.cancel)


class ServerAnswer:
    """
    What a server was asked for, while its requests are under way.

    Args:
        wait (`Callable[[], torch.Tensor]`):
            Waits for the answer and gives it. With several processes each must call it.
        cancel (`Callable[[], object]`):
            Ends the requests.
    """

    def __init__(self, wait: Callable[[], torch.Tensor], cancel: Callable[[], object]):
        self.result, self.cancel = cache(wait), cancel

    def read_as(self, read: Callable[[torch.Tensor], torch.Tensor]) -> "ServerAnswer":
        """The answer, changed when it is there."""
        return ServerAnswer(lambda: read(self.result()), self.cancel)
