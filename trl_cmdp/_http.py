"""What our two HTTP clients share, of a teacher server and of a judge: one request, bounded in time and in size."""

import asyncio
import contextlib
import functools
import json
import logging
import os
import re
import ssl
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import httpx2

from ._messages import printable


_Result = TypeVar("_Result")

_CONNECT_TIMEOUT = 10.0  # seconds
_MAX_MESSAGE_BYTES = 2**14  # of an answer with another status than 200; the rest is not read

# At level DEBUG it logs the headers of answers, where a server may quote the key.
logging.getLogger("httpcore2").setLevel(logging.INFO)


class Answer(NamedTuple):
    """What a server answered. A body that is longer than allowed is cut somewhere beyond the allowed length."""

    status: int
    headers: httpx2.Headers
    body: bytearray


class HttpFailure(Exception):
    """
    A request without a usable answer. `kind` is "timeout", "connection", "bad_answer", "http_429" or "http_5xx", which
    sending it again may cure (after `delay` seconds, where the server asks for that), or "refused".
    """

    def __init__(self, kind: str, message: str, delay: float | None = None):
        super().__init__(message)
        self.kind, self.delay = kind, delay


class HttpServer:
    """
    One HTTP server: a connection per request, no proxy, no redirect followed, and a key that is sent to it alone.
    """

    def __init__(self, name: str, url: str, example: str, api_key: str | None, timeout: float):
        if re.match("[^/?#]*//[^/?#]*@", url):  # the URL is logged and saved: no word of it here
            raise ValueError(f"The {name}'s URL holds credentials. Pass the key as the API key instead.")
        if not _is_usable(url):
            raise ValueError(f"The {name}'s URL must look like {example!r}, got {url!r}.")
        if api_key is not None and not re.fullmatch(r"[!-~]+", api_key):
            raise ValueError(f"The {name}'s API key must be printable ASCII without spaces or line breaks.")
        self.url = url.rstrip("/")
        self._api_key = api_key
        self._timeout = timeout
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies certificates and host names
        if urlsplit(url).scheme == "https":  # reading the certificates takes tens of milliseconds
            self._tls.load_default_certs()

    def _request(self, path: str, payload: bytes | None, max_bytes: int, accept: str = "*/*") -> Answer:
        """Answer to a GET, or to a POST of JSON, of any status but 429 and 5xx. Raises `HttpFailure`."""
        return submit(self._send(path, payload, max_bytes, accept)).result()

    async def _send(self, path: str, payload: bytes | None, max_bytes: int, accept: str = "*/*") -> Answer:
        """As `_request`."""
        headers = {"Accept": accept, "Accept-Encoding": "identity", "Connection": "close"}
        if payload is not None:
            headers["Content-Type"] = "application/json"
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        timeouts = {"timeout": {"connect": min(_CONNECT_TIMEOUT, self._timeout)}}
        method = "GET" if payload is None else "POST"
        request = httpx2.Request(method, self.url + path, headers=headers, content=payload, extensions=timeouts)
        answer = await self._exchange(request, max_bytes)
        if answer.status == 429 or answer.status >= 500:
            kind = "http_429" if answer.status == 429 else "http_5xx"
            raise HttpFailure(kind, self._describe(answer), _retry_after(answer.headers.get("Retry-After")))
        return answer

    async def _exchange(self, request: httpx2.Request, max_bytes: int) -> Answer:
        body = bytearray()
        failure = "connection"
        try:
            # The transport alone, without a client: it follows no redirect, reads no proxy from the environment, and
            # logs no URL.
            async with httpx2.AsyncHTTPTransport(verify=self._tls) as transport:
                async with asyncio.timeout(self._timeout):
                    response = await transport.handle_async_request(request)
                failure = "bad_answer"
                allowed = max_bytes if response.status_code == 200 else _MAX_MESSAGE_BYTES
                async with asyncio.timeout(self._timeout):
                    async for chunk in response.aiter_raw():
                        body += chunk
                        if len(body) > allowed:
                            break
        except (TimeoutError, httpx2.TimeoutException):
            raise HttpFailure("timeout", f"no whole answer within {self._timeout:g} s") from None
        except httpx2.TransportError as error:  # not `from error`, which may quote the server
            said = printable(self._hide_key(f"{type(error).__name__}: {error}"))[:300]
            raise HttpFailure(failure, said.rstrip(".")) from None  # which ends a sentence
        return Answer(response.status_code, response.headers, body)

    def _describe(self, answer: Answer) -> str:
        """Status of an answer and its message, if it has one."""
        text = answer.body.decode(errors="replace")
        with contextlib.suppress(LookupError, RecursionError, TypeError, ValueError):
            text = json.loads(text)["error"]["message"]
        text = printable(self._hide_key(" ".join(str(text).split())))[:300]
        return f"HTTP {answer.status}" + (f" ({text})" if text else "")

    def _problem(self, status: int) -> str | None:
        """What is wrong where every request would get this status; `None` where it is about the one that was sent."""
        if status in (401, 403):
            return "needs an API key" if self._api_key is None else "does not accept the API key"
        if 300 <= status < 400:
            return "redirects elsewhere, where the key must not go: give the final address"
        return None

    def _hide_key(self, text: str) -> str:
        """What a server says, without the key that it may quote."""
        return text if self._api_key is None else text.replace(self._api_key, "***")


def submit(coroutine: Coroutine[Any, Any, _Result]) -> "Future[_Result]":
    """Run a coroutine among this process's requests. Cancelling the future ends it, and its connections with it."""
    return asyncio.run_coroutine_threadsafe(coroutine, _event_loop(os.getpid()))


@functools.cache
def _event_loop(process_id: int) -> asyncio.AbstractEventLoop:
    """Runs a process's requests in a thread of its own: the caller's may run another loop, as a notebook's does."""
    loop = asyncio.new_event_loop()  # a fork of the process does not have the thread, and makes another
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


def _is_usable(url: str) -> bool:
    """Whether requests can be sent to paths below an address."""
    try:
        httpx2.URL(url)
        parts = urlsplit(url)
        complete = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except (ValueError, httpx2.InvalidURL):
        return False
    return bool(complete and not (parts.query or parts.fragment) and re.fullmatch(r"[!-~]+", url))


def _retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, `None` without one that can be read."""
    if value is None:
        return None
    with contextlib.suppress(ValueError, OverflowError):
        if re.fullmatch(r"\s*[0-9]{1,9}\s*", value):
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return None
