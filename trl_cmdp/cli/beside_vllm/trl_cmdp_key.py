"""The API key of a vLLM server on every path. vLLM itself asks for it below /v1, and hidden states come from /pooling."""

import hmac
import os
from collections.abc import Awaitable, Callable
from typing import Any


_OPEN_PATHS = ("/health",)


class RequireKey:
    """ASGI middleware that answers HTTP 401 without the key `VLLM_API_KEY`."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self._app = app
        self._expected = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        if scope["type"] == "lifespan" or scope["path"] in _OPEN_PATHS or self._has_key(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _has_key(self, scope: dict[str, Any]) -> bool:
        return any(
            name == b"authorization" and hmac.compare_digest(value, self._expected) for name, value in scope["headers"]
        )
