"""Chat completions of an OpenAI-compatible endpoint: bounded waiting, bounded bodies, and a key that stays with it."""

import json
import logging
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from ..._http import Answer, HttpFailure, HttpServer


_logger = logging.getLogger(__name__)

Message = dict[str, str]

MAX_BODY_BYTES = 2**20
_LONGEST_DELAY = 30.0  # seconds, between two attempts and for a Retry-After
# What some servers refuse (newer models of OpenAI's `max_tokens` and `temperature`), and the other name of it.
_OTHER_NAMES = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens", "temperature": None}


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


class ChatEndpoint(HttpServer):
    """
    An OpenAI-compatible endpoint: a connection per request, no proxy, no redirect followed.

    Args:
        url (`str`):
            Base URL as OpenAI's clients take it, `https://api.openai.com/v1`; `/v1` is added to a URL without path.
        model (`str`):
            Name of the model.
        api_key (`str`, *optional*):
            Sent as a bearer token to this address alone. It is in no log, cache, `repr` or error.
        sampling_params (`dict[str, Any]`, *optional*):
            Further fields of the request, `{"temperature": 0, "max_tokens": 1024}` unless given. Where the server refuses
            `max_tokens`, it gets `max_completion_tokens` (or the reverse), and no `temperature` where it refuses that:
            the request is sent once more, and what it takes is remembered.
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
        if self.url.count("/") == 2:  # those of "http://"
            self.url += "/v1"
        self.model = model
        self.sampling_params = {"temperature": 0, "max_tokens": 1024} if sampling_params is None else sampling_params
        self.concurrency = concurrency
        self._fields = self.sampling_params  # as the server takes them
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
        fields, failures = self._fields, Counter[str]()
        refusals: list[str] = []  # of fields that were changed since
        delay = 0.5
        while True:
            request = {**fields, "model": self.model, "messages": list(messages), "stream": False}
            try:
                answer = self._request(
                    "/chat/completions", json.dumps(request).encode(), MAX_BODY_BYTES, "application/json"
                )
                if (changed := self._changed(fields, answer)) is not None:
                    fields = changed
                    refusals.append(self._describe(answer))
                    continue
                reply = self._reply(answer)
                self._remember(fields)
                return reply, failures
            except HttpFailure as failure:
                failures[failure.kind] += 1
                if failure.kind == "refused" or failures.total() > self._max_retries:
                    raise NoReplyError("; then ".join([*refusals, str(failure)]), failures) from None
                wait = self._jitter.uniform(0.5, 1.0) * delay if failure.delay is None else failure.delay
            self._sleep(min(wait, _LONGEST_DELAY))
            delay *= 2

    def _changed(self, fields: dict[str, Any], answer: Answer) -> dict[str, Any] | None:
        """The fields without one that the server refuses by name, or with its other name; each is changed once."""
        if answer.status not in (400, 422):
            return None
        said = answer.body.decode(errors="replace")
        for name, other in _OTHER_NAMES.items():
            if name in self.sampling_params and name in fields and re.search(rf"\b{name}\b", said):
                kept = {key: value for key, value in fields.items() if key != name}
                return kept if other is None else {**kept, other: fields[name]}
        return None

    def _remember(self, fields: dict[str, Any]) -> None:
        """Keep the fields that were not refused for further requests."""
        if "temperature" in self._fields and "temperature" not in fields:
            _logger.warning(f"{self!r} refuses `temperature`: it replies at its own.")
        self._fields = fields

    def _reply(self, answer: Answer) -> str:
        status = answer.status
        problem = self._problem(status)
        if status in (404, 405):
            problem = f"has no such address or model: check the URL (as in 'http://host:8000/v1') and {self.model!r}"
        if problem is not None:
            raise JudgeError(f"The judge at {self.url} {problem}: {self._describe(answer)}.")
        if status != 200:
            raise HttpFailure("refused", self._describe(answer))
        if answer.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
            raise HttpFailure("bad_answer", "an answer that is not JSON")
        if len(answer.body) > MAX_BODY_BYTES:
            raise HttpFailure("bad_answer", f"an answer of more than {MAX_BODY_BYTES} bytes")
        try:
            content = json.loads(answer.body)["choices"][0]["message"]["content"]
        except (ValueError, RecursionError, LookupError, TypeError):
            content = None
        if not isinstance(content, str):
            raise HttpFailure("bad_answer", "an answer that is not a chat completion")
        return self._hide_key(content)
