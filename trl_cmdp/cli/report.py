"""`trl-cmdp report`: one HTML page, and its plots, from records and the states of trainers."""

import argparse
from pathlib import Path

from .._messages import say
from ._arguments import existing_path, mistakes, positive_int, writable_folder


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "report",
        help="write one HTML page, and its plots, about evaluations, training runs and comparisons",
        description="Write report.html, which needs nothing but itself, and its plots as PNGs, from the records of "
        "`trl-cmdp evaluate` and `trl-cmdp compare` and from trainer_state.json. No model is loaded.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=existing_path,
        metavar="RUN",
        help="a file (records, trainer_state.json), or a folder with some: of checkpoints the newest counts",
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
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the report."""
    # Imported here: `trl-cmdp --help` should not wait for torch and matplotlib.
    from ..reports import read_runs, write_report

    with mistakes():
        runs = read_runs(arguments.runs)
        written = write_report(runs, arguments.output_dir, title=arguments.title, max_rollouts=arguments.max_rollouts)
    page, *plots = written
    say(f"{page} ({page.stat().st_size / 1e6:.1f} MB), and {len(plots)} plots beside it.")
    return 0
