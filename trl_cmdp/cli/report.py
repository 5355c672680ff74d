"""`trl-cmdp report`: one HTML page, and its plots, from records and the states of trainers."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from .._messages import say
from ._arguments import existing_path, mistakes, positive_int, writable_folder


_SECONDS = 10


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "report",
        help="write one HTML page, and its plots, about evaluations, training runs and comparisons",
        description="Write report.html, which needs nothing but itself, and its plots as PNGs, from the records of "
        "`trl-cmdp evaluate` and `trl-cmdp compare` and from the states that trainers save. No model is loaded.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a file (records, the state of a trainer), or a folder with some: of checkpoints the newest counts",
    )
    parser.add_argument(
        "--output_dir", type=writable_folder, default=Path("outputs/report"), help="default: outputs/report"
    )
    parser.add_argument("--title", help="title of the page (default: the task, or the names of the runs)")
    parser.add_argument(
        "--max_rollouts",
        type=positive_int,
        default=1000,
        help="most rollouts that the page holds, chosen at even distances (default: 1000)",
    )
    parser.add_argument(
        "--watch",
        nargs="?",
        type=positive_int,
        const=_SECONDS,
        metavar="SECONDS",
        help="write the page anew when a run has gone on, until Ctrl-C; it loads itself anew every SECONDS "
        f"(default: {_SECONDS})",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the report, once or for as long as it is watched."""
    if arguments.watch is not None:
        _watch(arguments)  # it waits for what is not there yet
    for path in arguments.runs:
        existing_path(str(path))
    with mistakes():
        _write(arguments, None)
    return 0


def _write(arguments: argparse.Namespace, refresh: int | None) -> None:
    # Imported here: `trl-cmdp --help` should not wait for torch and matplotlib.
    from ..reports import read_runs, write_report

    page, *plots = write_report(
        read_runs(arguments.runs),
        arguments.output_dir,
        title=arguments.title,
        max_rollouts=arguments.max_rollouts,
        refresh=refresh,
    )
    say(f"{page} ({page.stat().st_size / 1e6:.1f} MB), and {len(plots)} plots beside it.")


def _watch(arguments: argparse.Namespace) -> None:
    """Write the page whenever what it is made from has changed, until Ctrl-C."""
    say("Watching the runs; Ctrl-C writes the page for the last time.")
    seen, said = None, ""
    try:
        while True:
            found = _sizes_and_times(arguments.runs)
            if found != seen:
                seen = found
                try:
                    _write(arguments, arguments.watch)
                except (ValueError, OSError) as error:  # such as a run that has not begun
                    if str(error) != said:
                        said = str(error)
                        say(f"Waiting: {said}")
            time.sleep(arguments.watch)
    except KeyboardInterrupt:
        print()


def _sizes_and_times(paths: Sequence[Path]) -> list[tuple[Path, int, int]]:
    """Of every file that a page of these runs may be made from."""
    files = [file for path in paths for file in (path, *path.glob("*.json*"), *path.glob("checkpoint-*/*.json"))]
    stats = [(file, file.stat()) for file in files if file.is_file()]
    return [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats]
