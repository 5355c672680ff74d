"""HTTP to a teacher server: waiting and bodies are bounded, and no other host ever sees the key."""

import json
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

from transformers.utils import logging

from .._http import HttpFailure, HttpServer


logger = logging.get_logger(__name__)

_Item, _Result = TypeVar("_Item"), TypeVar("_Result")

_LONGEST_DELAY = 10.0  # seconds between two attempts
_WARN_EVERY = 10.0  # seconds, over all threads
_PROBE_BYTES = 2**24


class TeacherServerError(RuntimeError):
    """
    A teacher server that cannot be used: not there, gone for too long, or one whose answers cannot be correct.

    Args:
        message (`str`):
            What happened, and what to do.
        status (`int`, *optional*):
            HTTP status of an answer that refuses the request.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class TeacherServer(HttpServer):
    """
    HTTP to one teacher server: a connection per request, no proxy, no redirect followed.

    Args:
        url (`str`):
            Address, `http://host:port` or with a path before the API's own. A final `/v1` is dropped.
        api_key (`str`, *optional*):
            Sent as a bearer token, to this server alone. It is in no log, `repr` or error.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds until an answer begins, its headers included, and again that its body may take.
        max_wait (`float`, *optional*, defaults to `600.0`):
            Seconds for which a request that fails (no connection, cut answer, HTTP 429 or 5xx) is tried again.
        concurrency (`int`, *optional*, defaults to `16`):
            Number of requests under way at once.

    Raises:
        ValueError: If the URL or the key cannot be used.
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
        self.url = self.url.removesuffix("/v1")
        self._max_wait = max_wait
        self._concurrency = concurrency
        self._jitter = random.Random()  # its own: the global one decides the training run
        self._last_warning = float("-inf")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def probe(self, path: str, payload: dict[str, Any] | None = None) -> Any:
        """
        JSON answer to one request, tried once.

        Args:
            path (`str`):
                Path, `/v1/models` for one.
            payload (`dict`, *optional*):
                Body of a POST. Without it the request is a GET.

        Returns:
            The decoded answer.

        Raises:
            TeacherServerError: If there is no answer, or one that is not JSON. `status` tells a refusal.
        """
        try:
            body = self._attempt(path, payload, _PROBE_BYTES)
        except HttpFailure as failure:
            raise TeacherServerError(f"The teacher server at {self.url} is not available: {failure}.") from None
        return self.decode(body)

    def post(self, path: str, payload: dict[str, Any], max_bytes: int, stop: threading.Event) -> bytearray:
        """
        Body of the answer to a POST, tried again with growing delays for as long as waiting may help.

        Args:
            path (`str`):
                Path, `/pooling` for one.
            payload (`dict`):
                Body, sent as JSON.
            max_bytes (`int`):
                Longest answer that can be correct.
            stop (`threading.Event`):
                Ends the waiting when set.

        Returns:
            `bytearray`: The body.

        Raises:
            TeacherServerError: If the server refuses the request, answers too much, or is gone for `max_wait` seconds.
        """
        first_failure = None
        delay = 0.5
        while True:
            try:
                return self._attempt(path, payload, max_bytes)
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
                if stop.wait(min(self._jitter.uniform(0.5, 1.0) * delay, left)):
                    raise TeacherServerError(f"Gave up on the teacher server at {self.url}.") from None
                delay = min(2 * delay, _LONGEST_DELAY)

    def map(self, function: Callable[[_Item, threading.Event], _Result], items: Sequence[_Item]) -> list[_Result]:
        """
        `function(item, stop)` of all items, several at a time. The first error ends the others.

        Args:
            function (`Callable`):
                Called in threads, with an event to hand to [`~TeacherServer.post`].
            items (`Sequence`):
                Items.

        Returns:
            `list`: Results, in the order of the items.
        """
        stop = threading.Event()
        executor = ThreadPoolExecutor(max_workers=max(1, min(self._concurrency, len(items))))
        try:
            futures = [executor.submit(function, item, stop) for item in items]
            for future in as_completed(futures):
                future.result()
            return [future.result() for future in futures]
        finally:
            stop.set()
            executor.shutdown(wait=False, cancel_futures=True)

    def decode(self, body: bytearray) -> Any:
        """The JSON value of a body, or a [`TeacherServerError`]."""
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise self.unexpected(f"{len(body)} bytes that are not JSON") from None

    def unexpected(self, answer: str) -> TeacherServerError:
        """Error for an answer that no retry would mend."""
        return TeacherServerError(
            f"The teacher server at {self.url} sent {answer}. Is it vLLM (0.32 was tested), and nothing else before "
            "it? The last checkpoint is untouched."
        )

    def _attempt(self, path: str, payload: dict[str, Any] | None, max_bytes: int) -> bytearray:
        """Body of an answer of status 200. Raises `HttpFailure` for what waiting may cure."""
        answer = self._request(path, None if payload is None else json.dumps(payload).encode(), max_bytes)
        if answer.status != 200:
            problem = self._refusal(answer.status) or "refused the request"
            raise TeacherServerError(
                f"The teacher server at {self.url} {problem}: {self._describe(answer)}.", answer.status
            )
        if len(answer.body) > max_bytes:
            raise self.unexpected(f"more than the {max_bytes} bytes that an answer can have")
        if not answer.body:  # the server went away between the headers and a body of no announced length
            raise HttpFailure("bad_answer", "an empty answer")
        return answer.body
