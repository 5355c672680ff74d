"""HTTP to a teacher server: waiting and bodies are bounded, and no other host ever sees the key."""

import asyncio
import json
import random
import shlex
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from transformers.utils import logging

from .._defaults import TEACHER_KEY_VARIABLE
from .._http import HttpFailure, HttpServer, submit


logger = logging.get_logger(__name__)

_Item, _Result = TypeVar("_Item"), TypeVar("_Result")

# What makes a vLLM server an exact teacher.
EXACT_SERVER_ARGUMENTS = (
    *("--runner", "pooling", "--convert", "embed", "--pooler-config"),
    '{"task": "token_embed", "tok_pooling_type": "ALL", "use_activation": false}',
)
EXACT_SERVER_COMMAND = f"trl-cmdp serve MODEL (or {shlex.join(['vllm', 'serve', 'MODEL', *EXACT_SERVER_ARGUMENTS])})"

_LONGEST_DELAY = 10.0  # seconds between two attempts
_WARN_EVERY = 10.0  # seconds, over all threads
_PROBE_BYTES = 2**24


class TeacherServerError(RuntimeError):
    """A teacher server that cannot be used: not there, gone for too long, or one whose answers cannot be correct."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class TeacherServer(HttpServer):
    """
    HTTP to one teacher server, its arguments those of [`RemoteTeacher`]: a request that fails (no connection, a cut
    answer, HTTP 429 or 5xx) is tried again for `max_wait` seconds, and `concurrency` are under way at once.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        timeout: float = 120.0,
        max_wait: float = 600.0,
        concurrency: int = 16,
    ):
        super().__init__("teacher server", url, "http://host:8000", api_key, timeout)
        self.url = self.url.removesuffix("/v1")  # which OpenAI's clients want
        self._max_wait = max_wait
        self._gate = asyncio.Semaphore(concurrency)
        self._jitter = random.Random()  # its own: the global one decides the training run
        self._last_warning = float("-inf")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def probe(self, path: str, payload: dict[str, Any] | None = None) -> Any:
        """JSON answer to a GET or, with a payload, to a POST, tried once. The error's `status` tells a refusal."""
        try:
            body = submit(self._attempt(path, payload, _PROBE_BYTES)).result()
        except HttpFailure as failure:
            raise TeacherServerError(f"The teacher server at {self.url} is not available: {failure}.") from None
        return self.decode(body)

    async def post(self, path: str, payload: dict[str, Any], max_bytes: int) -> bytearray:
        """
        Body of the answer to a POST, at most `max_bytes`, tried again with growing delays for as long as waiting may help.
        """
        first_failure = None
        delay = 0.5
        while True:
            try:
                return await self._attempt(path, payload, max_bytes)
            except HttpFailure as failure:
                now = time.monotonic()
                first_failure = now if first_failure is None else first_failure
                left = first_failure + self._max_wait - now
                if left <= 0:
                    raise TeacherServerError(
                        f"The teacher server at {self.url} did not answer for {now - first_failure:.0f} s. "
                        f"Last: {failure}. The last checkpoint is untouched: start the server again, and resume with "
                        "`trainer.train(resume_from_checkpoint=True)`."
                    ) from None
                if now - self._last_warning > _WARN_EVERY:
                    self._last_warning = now
                    logger.warning(f"Waiting for the teacher server at {self.url}, {left:.0f} s at most: {failure}.")
                await asyncio.sleep(min(self._jitter.uniform(0.5, 1.0) * delay, left))
                delay = min(2 * delay, _LONGEST_DELAY)

    def ask(self, function: Callable[[_Item], Awaitable[_Result]], items: Sequence[_Item]) -> "Future[list[_Result]]":
        """
        `function(item)` of all items in their order, for whoever waits for the future. At most `concurrency` are under way,
        of all that was asked. The first error ends the others, and so does cancelling the future.
        """
        return submit(self._all(function, items))

    async def _all(self, function: Callable[[_Item], Awaitable[_Result]], items: Sequence[_Item]) -> list[_Result]:
        async def one(item: _Item) -> _Result:
            async with self._gate:
                return await function(item)

        tasks = [asyncio.ensure_future(one(item)) for item in items]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def decode(self, body: bytearray) -> Any:
        """The JSON value of a body, or a [`TeacherServerError`]."""
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise self.unexpected(f"{len(body)} bytes that are not JSON") from None

    def unexpected(self, answer: str) -> TeacherServerError:
        """Error for an answer that trying again would not change."""
        return TeacherServerError(
            f"The teacher server at {self.url} sent {answer}. Is it vLLM (0.32 was tested), and nothing else before "
            "it? The last checkpoint is untouched."
        )

    async def _attempt(self, path: str, payload: dict[str, Any] | None, max_bytes: int) -> bytearray:
        """Body of an answer of status 200. Raises `HttpFailure` for what waiting may cure."""
        answer = await self._send(path, None if payload is None else json.dumps(payload).encode(), max_bytes)
        if answer.status != 200:
            problem = f"{self._problem(answer.status) or 'refused the request'}: {self._describe(answer)}"
            if answer.status in (401, 403):
                problem += (
                    f". Set `teacher_model_server_api_key`, or {TEACHER_KEY_VARIABLE} in the environment of a command"
                )
            raise TeacherServerError(f"The teacher server at {self.url} {problem}.", answer.status)
        if len(answer.body) > max_bytes:
            raise self.unexpected(f"more than the {max_bytes} bytes that an answer can have")
        if not answer.body:  # the server went away between the headers and a body of no announced length
            raise HttpFailure("bad_answer", "an empty answer")
        return answer.body


def awaited(answers: "Future[_Result]") -> _Result:
    """What a future gives. An interrupt of the waiting ends the requests too."""
    try:
        return answers.result()
    finally:
        answers.cancel()
