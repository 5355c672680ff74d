"""What both of our HTTP clients need: of a teacher server, and of a judge. Standard library only."""

import contextlib
import http.client
import re
import socket
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit


_CONNECT_TIMEOUT = 10.0  # seconds


class HttpServer:
    """
    One HTTP server: a connection per request, no proxy, no redirect followed, and a key that is sent to it alone.

    Args:
        name (`str`):
            What errors call it: `"judge"`.
        url (`str`):
            Its address.
        example (`str`):
            An address as it should be, for errors.
        api_key (`str`, *optional*):
            Sent as a bearer token. It is in no log, `repr` or error.
        timeout (`float`):
            Seconds until an answer begins, its headers included, and again that its body may take.

    Raises:
        ValueError: If the URL or the key cannot be used.
    """

    def __init__(self, name: str, url: str, example: str, api_key: str | None, timeout: float):
        parts = urlsplit(url)
        if parts.username is not None or parts.password is not None:  # the URL is logged and saved: no word of it here
            raise ValueError(f"The {name}'s URL holds credentials. Pass the key as the API key instead.")
        try:
            port = parts.port
        except ValueError:
            port = -1
        usable = parts.scheme in ("http", "https") and parts.hostname and port != -1 and re.fullmatch(r"[!-~]+", url)
        if not usable or parts.query or parts.fragment:
            raise ValueError(f"The {name}'s URL must look like {example!r}, got {url!r}.")
        # Checked here: `http.client` would print a key that it cannot send.
        if api_key is not None and not re.fullmatch(r"[!-~]+", api_key):
            raise ValueError(f"The {name}'s API key must be printable ASCII without spaces or line breaks.")
        self._connection_class = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port = str(parts.hostname), port
        self._origin, self._path = f"{parts.scheme}://{parts.netloc}", parts.path.rstrip("/")
        self._api_key = api_key
        self._timeout = timeout

    @property
    def url(self) -> str:
        """Address, before the API's own paths."""
        return self._origin + self._path

    @contextlib.contextmanager
    def _respond(self, path: str, payload: bytes | None, accept: str = "*/*") -> Iterator[http.client.HTTPResponse]:
        """The response to a GET, or to a POST of JSON, while it may be read. What goes wrong raises as it comes."""
        connection = self._connection_class(self._host, self._port, timeout=min(_CONNECT_TIMEOUT, self._timeout))
        headers = {"Accept": accept, "Connection": "close"}
        if payload is not None:
            headers["Content-Type"] = "application/json"
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        try:
            connection.connect()
            sock = connection.sock
            sock.settimeout(self._timeout)
            connection.request("GET" if payload is None else "POST", self._path + path, payload, headers)
            with _cut_after(sock, self._timeout):
                response = connection.getresponse()
            with response, _cut_after(sock, self._timeout):
                yield response
        finally:
            connection.close()

    def _hide_key(self, text: str) -> str:
        """What a server says, without the key that it may quote."""
        return text if self._api_key is None else text.replace(self._api_key, "***")


@contextlib.contextmanager
def _cut_after(sock: socket.socket, seconds: float) -> Iterator[None]:
    """Ends a connection that is not done in time. A socket's own timeout bounds each silence, not what drips."""
    late = threading.Event()

    def cut() -> None:
        late.set()
        with contextlib.suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)  # beneath TLS, which another thread is reading from

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception:
        if not late.is_set():
            raise
    finally:
        timer.cancel()
    if late.is_set():  # whatever the cut looked like
        raise TimeoutError(f"the answer was incomplete after {seconds:g} s")
