"""How far an evaluation is."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .._messages import message


@contextmanager
def show_progress(description: str) -> Iterator[Callable[[int, int], None]]:
    """A function to be called with (done, total): a bar in a terminal, else a plain line now and then."""
    description = message(description)
    if not sys.stdout.isatty():
        last = -1

        def print_line(done: int, total: int) -> None:
            nonlocal last
            if done == total or last < 0 or 20 * (done - last) >= total:
                last = done
                print(f"{description}: {done}/{total}", flush=True)

        yield print_line
        return
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), *times)
    with Progress(*columns, console=Console()) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
