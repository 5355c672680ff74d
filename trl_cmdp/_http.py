"""What both of our HTTP clients need: of a teacher server, and of a judge. Standard library only."""

import contextlib
import socket
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def cut_after(sock: socket.socket, seconds: float) -> Iterator[None]:
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
