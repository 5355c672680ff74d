"""
Runs that a signal ends, each a fork of this process, which imports torch and TRL once and trains nothing itself. Started
by test_run_end.py.

    python ended_by_signals.py OUTPUT
"""

import json
import os
import signal
import sys
from pathlib import Path

from test_run_end import TOLD, At, build


sys.path.append(str(Path(__file__).parents[2] / "slow"))

import kill_runs


def told(folder: Path, settings: dict) -> int:
    """Return code of a run that is told to end in its third step, and again in the one after it."""
    process = os.fork()
    if process == 0:
        callbacks = [At("step_begin", step, lambda: os.kill(os.getpid(), signal.SIGTERM)) for step in (2, 3)]
        try:
            build(folder, callbacks=callbacks, **settings).train()
        finally:
            os._exit(0)  # it went on after training
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


if __name__ == "__main__":
    path = Path(sys.argv[1])
    codes = {name: told(path / name, settings) for name, settings in TOLD.items()}
    (path / "codes.json").write_text(json.dumps(codes))
    kill_runs.main(path / "kills", "end")
