"""`trl-cmdp init`: a commented YAML file of what one would set for a training."""

import argparse
from pathlib import Path

from .._files import write_whole
from .._messages import say
from ._arguments import Mistake, mistakes
from ._settings import settings_file
from .training import COMMANDS


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "init",
        help="write a commented YAML file of what one would set for a training",
        description="Print a commented YAML file of what one would set for a training, or write it. What it names "
        "(student, teacher, data, reward) is an example to replace.",
    )
    parser.add_argument(
        "method", nargs="?", choices=list(COMMANDS), default="constrained", help="default: constrained"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="file to write, which must not exist")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the file, or write it."""
    text = settings_file(arguments.method)
    if arguments.output is None:
        print(text, end="")
        return 0
    if arguments.output.exists():
        raise Mistake(f"{arguments.output} is there already: take another --output, or delete it.")
    with mistakes():
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(arguments.output, text)
    say(
        f"{arguments.output} is written. Fill it in, then: trl-cmdp {arguments.method} --config {arguments.output} --dry_run"
    )
    return 0
