"""Running the cells of a comparison, some at a time, each in a process of its own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import IO, TYPE_CHECKING, Any

from .._messages import message, without_secrets
from ._experiment import Cell


if TYPE_CHECKING:
    from ..evaluation import CellRecord

RECORDS_FILE = "records.jsonl"
_LOG_TAIL = 8


def load_records(output_dir: Path) -> "tuple[list[CellRecord], bool]":
    """
    Records of the cells that are done, and whether the last line was cut while it was written. Such a line is cut off
    the file; other damage is a `ValueError`.
    """
    from ..evaluation import read_records

    path = output_dir / RECORDS_FILE
    content = path.read_bytes() if path.exists() else b""
    whole = content.rfind(b"\n") + 1
    try:
        records = read_records(content[:whole].decode())
    except ValueError as error:
        raise ValueError(f"{path}: {error} Repair the file, or take another --output_dir.") from error
    if whole < len(content):
        os.truncate(path, whole)
    return records, whole < len(content)


def missing_cells(cells: Sequence[Cell], records: "Sequence[CellRecord]", output_dir: Path) -> list[Cell]:
    """Cells that have no record yet. A record with other settings than the cells is a `ValueError`."""
    planned = {(cell.method, cell.seed): cell for cell in cells}
    shared = {key: value for cell in cells for key, value in cell.settings.items() if key != "fields"}
    for record in records:
        cell = planned.get((record.method, record.seed))
        # A secret decides no result, and is in no record.
        old = without_secrets({"trainer": record.trainer, **record.settings})
        new = without_secrets(shared if cell is None else {"trainer": cell.trainer, **cell.settings})
        keys = old.keys() & new.keys() if cell is None else old.keys() | new.keys()
        other = sorted(key for key in keys if old.get(key) != new.get(key))
        if other:
            key = other[0]
            raise ValueError(
                f"{output_dir} holds {record.method!r} with seed {record.seed} and {key} {old.get(key)}, and now it "
                f"is {new.get(key)}: take another --output_dir."
            )
    done = {(record.method, record.seed) for record in records}
    return [cell for cell in cells if (cell.method, cell.seed) not in done]


@dataclass
class _Running:
    cell: Cell
    process: "subprocess.Popen[bytes]"
    folder: Path
    log: Path
    start: float
    gpu: str | None


def run_cells(
    cells: Sequence[Cell],
    output_dir: Path,
    *,
    jobs: int,
    num_threads: int,
    num_done: int,
    report: Callable[[str], None],
    running_changed: Callable[[int, list[str]], None],
) -> "tuple[list[CellRecord], int]":
    """
    Run cells, `jobs` at a time with `num_threads` each, and append the record of each to the records file as it ends. A
    cell that fails does not stop the others. Each runs on one GPU, if there are any: the one with the fewest cells.

    `report` is called with a line for each cell that ended, `running_changed` with the number of cells that have ended
    and the names of those that run. Returned are the new records, and the number of cells that failed.
    """
    logs, folders = output_dir / "logs", output_dir / "running"
    logs.mkdir(parents=True, exist_ok=True)
    waiting, gpus = list(cells), _gpus()
    running: list[_Running] = []
    records: list[CellRecord] = []
    num_ended, total = num_done, num_done + len(cells)

    def tell_running() -> None:
        running_changed(num_ended, [_name(run.cell) for run in running])

    with (output_dir / RECORDS_FILE).open("ab", buffering=0) as file, _stop_on_signals():
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    used = [run.gpu for run in running]
                    gpu = min(gpus, key=used.count) if gpus else None
                    running.append(_start(waiting.pop(0), logs, folders, gpu, num_threads))
                    tell_running()
                time.sleep(0.1)
                for run in [run for run in running if run.process.poll() is not None]:
                    running.remove(run)
                    num_ended += 1
                    name, seconds = f"cell {num_ended}/{total} {_name(run.cell)}", time.monotonic() - run.start
                    record = _finish(run, file)
                    if record is not None:
                        records.append(record)
                        report(f"{name} done in {seconds:.0f} s: {_result(record)}")
                    else:
                        report(f"{name} FAILED after {seconds:.0f} s, see {run.log}:\n{_tail(run.log)}")
                    tell_running()
        finally:
            for run in running:
                run.process.kill()
                run.process.wait()
            shutil.rmtree(folders, ignore_errors=True)
    return records, len(cells) - len(records)


def _gpus() -> list[str]:
    """Names of the GPUs that this process sees, as CUDA_VISIBLE_DEVICES has them."""
    import torch

    num_gpus = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (visible.split(",") if visible else [str(gpu) for gpu in range(num_gpus)])[:num_gpus]


def _start(cell: Cell, logs: Path, folders: Path, gpu: str | None, num_threads: int) -> _Running:
    name = f"{cell.method}-seed-{cell.seed}"
    folder, log = folders / name, logs / f"{name}.log"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    folder.mkdir(parents=True)
    environment = {"OMP_NUM_THREADS": str(num_threads), "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    if gpu is not None:  # of several, transformers would use `nn.DataParallel`
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "trl_cmdp.cli._cell", str(folder)],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )
    run = _Running(cell, process, folder, log, time.monotonic(), gpu)
    assert process.stdin is not None
    # Left open: its end tells the cell that this process is gone.
    with suppress(BrokenPipeError):  # one that ended at once has its log
        process.stdin.write(json.dumps(asdict(cell)).encode() + b"\n")
    return run


def _finish(run: _Running, file: IO[bytes]) -> "CellRecord | None":
    """Record of a cell that ended, appended to the file, or `None` if it failed."""
    from ..evaluation import CellRecord
    from ._cell import RECORD_FILE

    assert run.process.stdin is not None
    run.process.stdin.close()
    if run.process.returncode != 0:
        return None
    line = (run.folder / RECORD_FILE).read_text()
    record = CellRecord.from_json(line)
    file.write(line.encode())  # unbuffered: one write
    os.fsync(file.fileno())
    shutil.rmtree(run.folder)
    return record


def _name(cell: Cell) -> str:
    return f"{cell.method} seed {cell.seed}"


def _result(record: "CellRecord") -> str:
    correct = mean(outcome.right for outcome in record.outcomes)
    satisfaction = mean(outcome.cost <= record.cost_limit for outcome in record.outcomes)
    return f"correct {correct:.2f}, satisfaction {satisfaction:.2f}"


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-_LOG_TAIL:]
    return message("\n".join(f"    {line}" for line in lines))


@contextmanager
def _stop_on_signals() -> Iterator[None]:
    """A polite kill ends as Ctrl-C does, so that the cells end too."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
