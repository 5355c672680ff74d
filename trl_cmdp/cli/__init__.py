"""The command line, one file per command."""

import argparse
from collections.abc import Sequence

from . import calibrate, compare, constrained, demo, env, evaluate, gkd, lagrangian, minillm, report


def main(argv: Sequence[str] | None = None) -> int:
    """Run `trl-cmdp`. Returns the exit code: 0, 1 if a part failed, or 2 for a mistake in the arguments."""
    parser = argparse.ArgumentParser(
        prog="trl-cmdp", description="Reward-aware distillation under a teacher budget that holds."
    )
    parser.set_defaults(trains=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (constrained, lagrangian, gkd, minillm, demo, calibrate, compare, evaluate, report, env):
        command.add_parser(commands)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.trains:  # reads its hundreds of arguments itself, with TRL's parser
        return arguments.run(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments.run(arguments)
