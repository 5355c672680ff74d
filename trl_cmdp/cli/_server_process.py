"""A server as a child of this process: its log is kept, and nothing of it outlives this process."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from .._messages import message
from . import _keeper


_TAIL_LINES, _TAIL_BYTES = 20, 2**15


class ServerProcess:
    """
    A command that runs until [`~ServerProcess.stop`], or until this process is gone, however that ends.

    Args:
        command (`Sequence[str]`):
            Program and arguments.
        environment (`Mapping[str, str]`):
            Environment variables, all of them.
        log_file (`Path`):
            File that its output is added to.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log_file: Path):
        self.log_file = log_file
        self._log_start = log_file.stat().st_size if log_file.exists() else 0
        with log_file.open("ab") as log:
            # In a session of its own: Ctrl-C reaches this process, which ends the other in order.
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", _keeper.__file__, *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    @property
    def has_ended(self) -> bool:
        """Whether it ended by itself."""
        return self._keeper.poll() is not None

    def wait(self, seconds: float) -> bool:
        """Wait for its end, and say whether it has come."""
        with suppress(subprocess.TimeoutExpired):
            self._keeper.wait(seconds)
        return self.has_ended

    def log_tail(self, lines: int = _TAIL_LINES) -> str:
        """Last lines of its log, without secrets."""
        with self.log_file.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - _TAIL_BYTES))
            text = log.read().decode(errors="replace")
        return message("\n".join([line for line in text.splitlines() if line.strip()][-lines:]))

    def stop(self) -> None:
        """End it and all that it has started. A second Ctrl-C does not wait until it has ended by itself."""
        try:
            self._keeper.stdin.close()
            self._keeper.wait(_keeper.GRACE + 5)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._keeper.pid, signal.SIGKILL)
            self._keeper.wait()


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end this process as an exception does, so that what it has started is ended too. `nohup` holds."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    previous = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}
    for number in previous:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
