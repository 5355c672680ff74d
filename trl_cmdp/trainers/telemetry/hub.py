"""Pushes in the background while a student is trained."""

import logging
from concurrent.futures import Future

from ..._messages import hide_secrets, printable


_logger = logging.getLogger(__name__)


def warn_if_failed(push: Future) -> None:
    """Say why a push to the Hub failed, once it is over: transformers waits for it and looks no further."""
    error = None if push.cancelled() else push.exception()
    if error is not None:
        _logger.warning(
            f"A push to the Hub failed: {describe_error(error)}. Training continues, and the checkpoint is on disk. What "
            "was not pushed goes with the next push."
        )


def describe_error(error: BaseException) -> str:
    """An error of the Hub's client on one line, followed by what caused it."""
    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        part = f"{type(cause).__name__}: {' '.join(str(cause).split())}".rstrip(".: ")
        # A library that wraps another often repeats it.
        if not any(part.partition(": ")[2] and part.partition(": ")[2] in earlier for earlier in parts):
            parts.append(part)
        cause = cause.__cause__
    return printable(hide_secrets(", caused by ".join(parts)))
