"""HTTP to a teacher server: waiting and bodies are bounded, and no other host ever sees the key."""

import contextlib
import http.client
import json
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

from transformers.utils import logging

from .._http import HttpServer


logger = logging.get_logger(__name__)

_Item, _Result = TypeVar("_Item"), TypeVar("_Result")

_LONGEST_DELAY = 10.0  # seconds between two attempts
_WARN_EVERY = 10.0  # seconds, over all threads
_PROBE_BYTES = 2**24


class TeacherServerError(RuntimeError):
    """
    A teacher server that cannot be used: not there, gone for too long, or answering what cannot be right.

    Args:
        message (`str`):
            What happened, and what to do.
        status (`int`, *optional*):
            HTTP status of an answer that refuses the request.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class _Unavailable(Exception):
    """A failure that waiting may cure."""


class TeacherServer(HttpServer):
    """
    Connection to one HTTP server, by the standard library: a connection per request, no proxy, no redirect followed.

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
        self._path = self._path.removesuffix("/v1")
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
        except _Unavailable as error:
            raise TeacherServerError(f"The teacher server at {self.url} is not available: {error}.") from None
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
                Largest answer that can be right.
            stop (`threading.Event`):
                Ends the waiting when set.

        Returns:
            `bytearray`: The body.

        Raises:
            TeacherServerError: If the server refuses, answers too much, or stays away for `max_wait` seconds.
        """
        first_failure = None
        delay = 0.5
        while True:
            try:
                return self._attempt(path, payload, max_bytes)
            except _Unavailable as error:
                now = time.monotonic()
                first_failure = now if first_failure is None else first_failure
                left = first_failure + self._max_wait - now
                if left <= 0:
                    raise TeacherServerError(
                        f"The teacher server at {self.url} did not answer for {now - first_failure:.0f} s. "
                        f"Last: {error}. The last checkpoint is untouched: start the server again, and resume with "
                        "`trainer.train(resume_from_checkpoint=True)`."
                    ) from None
                if now - self._last_warning > _WARN_EVERY:
                    self._last_warning = now
                    logger.warning(f"Waiting for the teacher server at {self.url}, {left:.0f} s at most: {error}.")
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
        body = None if payload is None else json.dumps(payload).encode()
        try:
            with self._respond(path, body) as response:
                return self._read(response, max_bytes)
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: malformed status or chunks
            # Not `from error`, which may quote the server.
            raise _Unavailable(self._hide_key(f"{type(error).__name__}: {error}")[:300]) from None

    def _read(self, response: http.client.HTTPResponse, max_bytes: int) -> bytearray:
        """Body of an answer of status 200; an error for any other."""
        status = response.status
        if status != 200:
            max_bytes = 2**14  # enough for a message, the rest is not read
        body = bytearray()
        while len(body) <= max_bytes and (chunk := response.read1(2**20)):
            body += chunk
        if status != 200:
            raise self._refusal(status, body)
        if len(body) > max_bytes:
            raise self.unexpected(f"more than the {max_bytes} bytes that an answer can have")
        if response.length or not body:  # less than the header announced; a cut header announces nothing
            raise http.client.IncompleteRead(bytes(body), response.length)
        return body

    def _refusal(self, status: int, body: bytearray) -> Exception:
        text = body.decode(errors="replace")
        with contextlib.suppress(LookupError, RecursionError, TypeError, ValueError):
            text = json.loads(text)["error"]["message"]
        text = self._hide_key(" ".join(str(text).split()))[:300]
        answer = f"HTTP {status}" + (f" ({text})" if text else "")
        if status == 429 or status >= 500:
            return _Unavailable(answer)
        if status in (401, 403):
            problem = "needs an API key" if self._api_key is None else "does not accept the API key"
            return TeacherServerError(f"The teacher server at {self.url} {problem}: HTTP {status}.", status)
        if 300 <= status < 400:
            return TeacherServerError(
                f"The teacher server at {self.url} redirects elsewhere (HTTP {status}), which is never followed: the "
                "key must not reach another host. Give the final address.",
                status,
            )
        return TeacherServerError(f"The teacher server at {self.url} refused the request: {answer}.", status)
