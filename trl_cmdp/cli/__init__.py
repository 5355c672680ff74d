"""The command line, one file per command."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from .._messages import message, say
from . import calibrate, compare, demo, env, evaluate, report, training
from ._arguments import Mistake
from ._results import results


class _Parser(argparse.ArgumentParser):
    """A parser, and those of the commands, whose errors quote no secret and nothing that a terminal obeys."""

    def error(self, text: str) -> NoReturn:
        super().error(message(text))


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run `trl-cmdp`. Returns the exit code: 0, 1 if a part failed, 2 for a mistake in what was asked for, or 130 if the
    command was stopped by Ctrl-C.
    """
    parser = _Parser(prog="trl-cmdp", description="Reward-aware distillation under a teacher budget that holds.")
    parser.set_defaults(trains=False, resumes=False, json=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    training.add_parsers(commands)
    for command in (demo, calibrate, compare, evaluate, report, env):
        command.add_parser(commands)
    arguments, rest = parser.parse_known_args(argv)
    if rest and not arguments.trains:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        with results(arguments.json) as arguments.show:
            # A training command reads its hundreds of arguments itself, with TRL's parser.
            return arguments.run(rest if arguments.trains else arguments)
    except Mistake as error:
        say(f"trl-cmdp {arguments.command}: error: {' '.join(str(error).split())}", error=True)
        return 2
    except KeyboardInterrupt:
        again = " What is recorded stays: run the same command again to resume." if arguments.resumes else ""
        print(f"\nStopped.{again}", file=sys.stderr)
        return 130
