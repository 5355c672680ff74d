"""`trl-cmdp compare`: train methods × seeds on one task, under the same rollouts and evaluation, and report."""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .._files import write_whole
from .._messages import message, printable, say
from ._arguments import Mistake, mistakes, positive_int, writable_folder
from ._experiment import preset_names
from ._results import Show, add_json_option


if TYPE_CHECKING:
    from ..evaluation import CellRecord
    from ._experiment import Cell, Experiment

QUICK_STEPS, QUICK_HELD_OUT = 10, 60


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "compare",
        help="train any methods x seeds on one task or on your own models and data, and compare them",
        description="Train every method of an experiment with every seed, each in a process of its own, on the same "
        "problems, and write records.jsonl, summary.json, table.md, pareto.png and curves.png. What is in "
        "records.jsonl already is not run again.",
    )
    presets = ", ".join(preset_names())
    parser.add_argument("experiment", help=f"a preset ({presets}), or the path of a YAML file of the same form")
    parser.add_argument(
        "--output_dir", type=writable_folder, help="where everything is written (default: outputs/compare-NAME)"
    )
    parser.add_argument(
        "--jobs",
        "--workers",
        type=positive_int,
        default=2,
        help="cells at a time, shared out among the GPUs (default: 2; --workers is its earlier name)",
    )
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these methods")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="other seeds than the experiment's")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"a smoke run: {QUICK_STEPS} steps, {QUICK_HELD_OUT} held-out problems, the first seed, with no promise",
    )
    add_json_option(parser)
    parser.set_defaults(run=run, resumes=True)


def run(arguments: argparse.Namespace) -> int:
    """Run the comparison. Returns 0, or 1 if a cell failed."""
    # Imported here: `trl-cmdp --help` should not wait for torch and TRL.
    import torch
    from filelock import FileLock, Timeout

    from ._experiment import load_experiment
    from ._run import set_up_process

    num_threads = torch.get_num_threads() // arguments.jobs or 1
    set_up_process()
    with mistakes():
        experiment = load_experiment(arguments.experiment).select(arguments.methods, arguments.seeds)
        if arguments.quick:
            steps, held_out = min(experiment.steps, QUICK_STEPS), min(experiment.held_out, QUICK_HELD_OUT)
            experiment = replace(experiment, steps=steps, held_out=held_out, seeds=experiment.seeds[:1])
        experiment = experiment.checked()
    if "task" in experiment.sources:
        num_threads = 1  # the models are so small that a second one costs more in waiting than it gives
    name = f"compare-{experiment.name}{'-quick' if arguments.quick else ''}"
    output_dir = arguments.output_dir or Path("outputs") / name
    with mistakes():
        output_dir.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output_dir / ".lock", timeout=0):  # released however this process ends
            return _compare(experiment, output_dir, arguments, num_threads)
    except Timeout as error:
        raise Mistake(f"another run is writing to {output_dir}: wait for it, or take another --output_dir.") from error


def _compare(experiment: "Experiment", output_dir: Path, arguments: argparse.Namespace, num_threads: int) -> int:
    from ._cells import load_records, missing_cells

    cells = experiment.cells()
    with mistakes():
        records, cut = load_records(output_dir)
        missing = missing_cells(cells, records, output_dir)
    if cut:
        say("The last record was cut while it was written: its cell is run again.")
    if len(missing) < len(cells):
        say(f"{len(cells) - len(missing)} of {len(cells)} cells are recorded already.")
    new, num_failed = _run_with_progress(missing, len(cells), output_dir, arguments.jobs, num_threads)
    records += new
    if records:
        _report(experiment, records, output_dir, arguments.show)
    if num_failed:
        say(f"{num_failed} of {len(cells)} cells failed, see {output_dir}/logs/.", error=True)
    return 1 if num_failed else 0


def _run_with_progress(
    missing: "list[Cell]", total: int, output_dir: Path, jobs: int, num_threads: int
) -> "tuple[list[CellRecord], int]":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from ._cells import run_cells

    done = total - len(missing)
    bar = (TextColumn("cells"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    columns = (*bar, TextColumn("{task.description}"))
    with Progress(*columns, console=Console(), disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task("", total=total, completed=done)

        def report(line: str) -> None:
            # Over the bar where there is a terminal, a plain line where there is none.
            progress.console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

        def running_changed(completed: int, names: list[str]) -> None:
            progress.update(task, completed=completed, description=", ".join(names))

        return run_cells(
            missing,
            output_dir,
            jobs=jobs,
            num_threads=num_threads,
            num_done=done,
            report=report,
            running_changed=running_changed,
        )


def in_order(records: "list[CellRecord]", experiment: "Experiment") -> "list[CellRecord]":
    """Records in the experiment's order, whatever the order in which the cells ended."""
    order = {method.name: index for index, method in enumerate(experiment.methods)}
    return sorted(records, key=lambda record: (order.get(record.method, len(order)), record.method, record.seed))


def _report(experiment: "Experiment", records: "list[CellRecord]", output_dir: Path, show: Show) -> None:
    from ..evaluation import compare_methods
    from ..reports import comparison_table, plot_comparison_curves, plot_pareto

    records = in_order(records, experiment)
    comparison = compare_methods(records)
    commits = sorted({f"{record.git_commit}{'-dirty' * record.git_dirty}" for record in records})
    versions = [dict(pairs) for pairs in sorted({tuple(record.versions.items()) for record in records})]
    summary = {"experiment": experiment.name, **asdict(comparison), "versions": versions, "git_commits": commits}
    text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
    table = message(comparison_table(comparison))
    write_whole(output_dir / "summary.json", text)
    write_whole(output_dir / "table.md", table)
    plot_pareto(comparison, output_dir / "pareto.png", f"{experiment.name}: correct answers against cost")
    title = f"{experiment.name}: training, mean over seeds"
    plot_comparison_curves(records, output_dir / "curves.png", title, comparison.reference)
    show(f"\n{table}", summary)
    say(f"records.jsonl, summary.json, table.md, pareto.png and curves.png are in {output_dir}/.")
