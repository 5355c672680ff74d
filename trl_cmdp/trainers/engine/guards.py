"""What stands guard over a run while it trains: its folder is its own, and a signal ends it with a checkpoint."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from accelerate import Accelerator
from filelock import FileLock, Timeout
from transformers import TrainerCallback
from transformers.utils import is_in_notebook

from .processes import on_any_process


_LOCK_FILE = "_run.lock"  # the Hub's uploads leave out what begins with an underscore
_STOPPING = b"\nStopping: the step under way ends, then a checkpoint is saved. Ctrl-C again stops at once.\n"
_SAME_SIGNAL = 1.0  # seconds in which a launcher passes on to its processes the Ctrl-C that they have had themselves


class RefusedRun(ValueError, RuntimeError):
    """What a user has to settle before a run can begin."""


@contextmanager
def sole_run(output_dir: str, accelerator: Accelerator) -> Iterator[None]:
    """No other run trains into the folder meanwhile: their checkpoints would take each other's places."""
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    lock, taken = FileLock(Path(output_dir, _LOCK_FILE), timeout=0), False
    if accelerator.is_main_process:
        try:
            lock.acquire()
        except Timeout:
            taken = True
    if on_any_process(accelerator, taken):
        raise RefusedRun(
            f"Another run is training into {output_dir}: give this one another `output_dir`, or stop that one first."
        )
    try:
        yield
    finally:
        lock.release()


@contextmanager
def named_failure(what: str, folder: Path, advice: str) -> Iterator[None]:
    """
    What fails while `what` is written is named: the libraries' own errors know neither the folder nor the disk. `advice`
    says what is left, and what to do once the cause is gone.
    """
    try:
        yield
    except Exception as error:
        disk = next(path for path in folder.absolute().parents if path.exists())
        free = shutil.disk_usage(disk).free / 2**20
        raise RuntimeError(
            f"{what} {folder} could not be written ({error}); {free:,.0f} MiB are free on its disk. {advice}"
        ) from error


class CheckpointOnSignal(TrainerCallback):
    """
    SIGTERM, with which schedulers announce the end of a job, and Ctrl-C (SIGINT) end training after the optimizer step
    under way, with a checkpoint. Then the signal is delivered as it would have been at once. Ctrl-C once more is delivered
    at once.

    Where a signal is ignored it stays ignored. In a notebook Ctrl-C, its button to interrupt, is left alone: a cell is
    interrupted to try something else, which neither waits for a step nor wants a checkpoint.

    transformers' `enable_jit_checkpoint` saves between micro-steps too, from where a resumed run does not repeat the
    same rollouts.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._process_id = os.getpid()
        self._told_at = 0.0
        self._previous: dict[int, Any] = {}  # handlers outside training, by signal
        self.told: int | None = None  # signal that ends the run

    @contextmanager
    def listening(self, to_ctrl_c: bool) -> Iterator[None]:
        """While training. Only the main thread may handle signals: in another this does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.told = None
        signals = [signal.SIGTERM, *([signal.SIGINT] if to_ctrl_c and not is_in_notebook() else [])]
        self._previous = {
            number: signal.signal(number, self._note)
            for number in signals
            if signal.getsignal(number) not in (signal.SIG_IGN, None)
        }
        try:
            yield
        finally:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
        if self.told is not None:
            signal.raise_signal(self.told)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process_id:  # a process forked from this one, which has inherited the handler
            if signum == signal.SIGTERM:
                signal.signal(signum, signal.SIG_DFL)
                signal.raise_signal(signum)
            # Ctrl-C reaches all: a worker that the step under way still needs waits for what this process decides.
        elif self.told is None:
            self.told, self._told_at = signum, time.monotonic()
            if self._accelerator.is_main_process:
                os.write(2, _STOPPING)  # `print` may not be called while it runs
        elif signum == signal.SIGINT and time.monotonic() - self._told_at > _SAME_SIGNAL:
            signal.signal(signum, self._previous[signum])
            signal.raise_signal(signum)

    def on_step_end(self, args, state, control, **kwargs):
        if on_any_process(self._accelerator, self.told is not None):
            self.told = self.told or signal.SIGTERM
            control.should_save = control.should_training_stop = True
