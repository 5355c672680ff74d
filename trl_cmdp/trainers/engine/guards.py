"""What stands guard over a run while it trains: its folder is its own, and SIGTERM ends it with a checkpoint."""

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from filelock import FileLock, Timeout
from transformers import TrainerCallback

from .processes import on_any_process


_LOCK_FILE = "_run.lock"  # the Hub's uploads leave out what begins with an underscore


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


class CheckpointOnSigterm(TrainerCallback):
    """
    SIGTERM, with which schedulers announce the end of a job, ends training after the optimizer step under way, with a
    checkpoint. Then the signal is delivered as it would have been at once, so the process ends as one that was told
    to.

    transformers' `enable_jit_checkpoint` saves between micro-steps too, from where a resumed run does not repeat the
    same rollouts.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._process_id = os.getpid()
        self._told = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While training. Only the main thread may handle signals: in another this does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._told = False
        previous = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)
        if self._told:
            signal.raise_signal(signal.SIGTERM)

    def _note(self, signum, frame):
        if os.getpid() == self._process_id:
            self._told = True
        else:  # a process forked from this one, which has inherited the handler, and should end
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)

    def on_step_end(self, args, state, control, **kwargs):
        self._told = on_any_process(self._accelerator, self._told)
        if self._told:
            control.should_save = control.should_training_stop = True
