"""Chat completions of an OpenAI-compatible endpoint: bounded waiting, bounded bodies, and a key that stays with it."""

import contextlib
import http.client
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from email.utils import parsedate_to_datetime
from typing import Any

from ..._http import HttpServer


Message = dict[str, str]

MAX_BODY_BYTES = 2**20
_LONGEST_DELAY = 30.0  # seconds, between two attempts and for a Retry-After
_FATAL = {301, 302, 303, 307, 308, 401, 403, 404, 405}  # what every request would be answered


class JudgeError(RuntimeError):
    """A judge that cannot be used at all: wrong address, key or model."""


class NoReplyError(Exception):
    """
    One request that stayed without a usable reply.

    Args:
        message (`str`):
            The last failure.
        failures (`Counter[str]`):
            How often each kind of failure happened.
    """

    def __init__(self, message: str, failures: Counter[str]):
        super().__init__(message)
        self.failures = failures


class _Failure(Exception):
    """One failed attempt."""

    def __init__(self, kind: str, message: str, *, again: bool = True, delay: float | None = None):
        super().__init__(message)
        self.kind, self.again, self.delay = kind, again, delay


class ChatEndpoint(HttpServer):
    """
    An OpenAI-compatible endpoint, by the standard library: a connection per request, no proxy, no redirect followed.

    Args:
        url (`str`):
            Base URL as OpenAI's clients take it, `https://api.openai.com/v1`; `/v1` is added to a URL without path.
        model (`str`):
            Name of the model.
        api_key (`str`, *optional*):
            Sent as a bearer token to this address alone. It is in no log, cache, `repr` or error.
        sampling_params (`dict[str, Any]`, *optional*):
            Further fields of the request, `{"temperature": 0, "max_tokens": 1024}` unless given.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds until an answer begins, its headers included, and again that its body may take.
        max_retries (`int`, *optional*, defaults to `4`):
            Times that a request is tried again after a failure that may pass: no connection, a timeout, HTTP 429 (after
            its `Retry-After`, at most 30 s) or 5xx, a body that is cut or not a chat completion.
        concurrency (`int`, *optional*, defaults to `8`):
            Requests under way at once.
        sleep (`Callable[[float], None]`, *optional*):
            Waits between two attempts.

    Raises:
        ValueError: If the URL or the key cannot be used.
    """

    def __init__(
        self,
        url: str,
        model: str,
        api_key: str | None = None,
        *,
        sampling_params: dict[str, Any] | None = None,
        timeout: float = 120.0,
        max_retries: int = 4,
        concurrency: int = 8,
        sleep: Callable[[float], None] = time.sleep,
    ):
        super().__init__("judge", url, "http://host:8000/v1", api_key, timeout)
        self._path = self._path or "/v1"
        self.model = model
        self.sampling_params = {"temperature": 0, "max_tokens": 1024} if sampling_params is None else sampling_params
        self.concurrency = concurrency
        self._max_retries = max_retries
        self._sleep = sleep
        self._jitter = random.Random()  # its own: the global one belongs to the evaluation

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r}, {self.model!r})"

    def complete(self, messages: Sequence[Message]) -> tuple[str, Counter[str]]:
        """
        Reply to a conversation.

        Args:
            messages (`Sequence[dict[str, str]]`):
                Messages, each with `role` and `content`.

        Returns:
            `tuple[str, Counter[str]]`: The reply, and how often each kind of failure came before it: `timeout`,
            `connection`, `http_429`, `http_5xx`, `bad_answer`.

        Raises:
            NoReplyError: If the retries are used up, or the endpoint refuses the request (`refused`).
            JudgeError: If no request can succeed: a wrong address, key or model, or a redirect.
        """
        request = {**self.sampling_params, "model": self.model, "messages": list(messages), "stream": False}
        payload = json.dumps(request).encode()
        failures: Counter[str] = Counter()
        delay = 0.5
        while True:
            try:
                return self._attempt(payload), failures
            except _Failure as failure:
                failures[failure.kind] += 1
                if not failure.again or failures.total() > self._max_retries:
                    raise NoReplyError(str(failure), failures) from None
                wait = self._jitter.uniform(0.5, 1.0) * delay if failure.delay is None else failure.delay
            self._sleep(min(wait, _LONGEST_DELAY))
            delay *= 2

    def _attempt(self, payload: bytes) -> str:
        try:
            with self._respond("/chat/completions", payload, "application/json") as response:
                return self._reply(response)
        except TimeoutError:
            raise _Failure("timeout", f"no answer within {self._timeout:g} s") from None
        except (http.client.IncompleteRead, ValueError):  # ValueError: malformed status or chunks
            raise _Failure("bad_answer", "an answer that is cut or not HTTP") from None
        except (OSError, http.client.HTTPException) as error:  # not `from error`, which may quote the server
            raise _Failure("connection", f"no connection ({type(error).__name__})") from None

    def _reply(self, response: http.client.HTTPResponse) -> str:
        status = response.status
        if status in _FATAL:
            raise JudgeError(f"The judge at {self.url} answers HTTP {status}: {self._advice(status)}.")
        if status == 429:
            raise _Failure("http_429", "HTTP 429", delay=_retry_after(response.getheader("Retry-After")))
        if status >= 500:
            raise _Failure("http_5xx", f"HTTP {status}", delay=_retry_after(response.getheader("Retry-After")))
        if status != 200:
            raise _Failure("refused", f"HTTP {status}", again=False)
        if response.headers.get_content_type() != "application/json":
            raise _Failure("bad_answer", "an answer that is not JSON")
        body = bytearray()
        while len(body) <= MAX_BODY_BYTES and (chunk := response.read1(2**16)):
            body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise _Failure("bad_answer", f"an answer of more than {MAX_BODY_BYTES} bytes")
        if response.length:  # less than the header announced
            raise _Failure("bad_answer", "an answer that is cut")
        try:
            content = json.loads(body)["choices"][0]["message"]["content"]
        except (ValueError, RecursionError, LookupError, TypeError):
            content = None
        if not isinstance(content, str):
            raise _Failure("bad_answer", "an answer that is not a chat completion")
        return self._hide_key(content)

    def _advice(self, status: int) -> str:
        if status in (401, 403):
            return "it needs an API key" if self._api_key is None else "it does not accept the API key"
        if status in (404, 405):
            return f"check the URL (such as 'http://host:8000/v1') and the model's name, {self.model!r}"
        return "a redirect, which is never followed, as the key must not reach another host; give the final address"


def _retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, `None` without one that can be read."""
    if value is None:
        return None
    with contextlib.suppress(ValueError, OverflowError):
        if re.fullmatch(r"\s*[0-9]{1,9}\s*", value):
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return None
