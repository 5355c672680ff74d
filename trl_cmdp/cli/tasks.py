"""`trl-cmdp tasks`: the tasks there are, with a problem of each."""

import argparse
import ast
from pathlib import Path

from .. import tasks
from ._tasks import EMBEDDED_TASKS, task_names


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "tasks",
        help="list the tasks there are, with a problem of each",
        description="List the tasks of --task, with what each is, a problem and its answer.",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the tasks."""
    for name in task_names():
        # Read, not imported: some import libraries that take seconds.
        source = ast.parse(Path(tasks.__path__[0], f"{name}.py").read_text(encoding="utf-8"))
        prompt, answer = next(
            ast.literal_eval(line.value)
            for line in source.body
            if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "SAMPLE_PROBLEM"
        )
        what = (ast.get_docstring(source) or "").split("\n\n")[0].replace("\n", " ")
        embedded = "  with an embedded teacher and student\n" if name in EMBEDDED_TASKS else ""
        print(f"{name}\n  {what}\n{embedded}  problem: {prompt}\n  answer:  {answer}\n")
    print("trl-cmdp evaluate, calibrate and the training commands take one as --task NAME; docs/tasks.md says more.")
    return 0
