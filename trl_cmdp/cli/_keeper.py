"""
Runs a command until its own standard input ends, which it does when the process that holds the other end stops or is
killed. Then the command, and everything that it has started, is ended too.

    python _keeper.py COMMAND ...

Run as a file, of the standard library alone, and as the leader of a process group.
"""

import os
import select
import signal
import subprocess
import sys


GRACE = 15.0  # seconds that the command has to end by itself


def main() -> None:
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, lambda *_: None)  # not `SIG_IGN`, which the command would inherit
    try:
        command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
        while command.poll() is None and not select.select([0], [], [], 0.2)[0]:
            pass
        if command.poll() is None:
            command.terminate()
        print(f"It ended with exit code {command.wait(GRACE)}.", flush=True)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(error, flush=True)
    finally:
        os.killpg(0, signal.SIGKILL)  # what is left of it, and this process


if __name__ == "__main__":
    main()
