"""The command line, one file per command."""

import argparse
from collections.abc import Sequence

from . import compare, demo


def main(argv: Sequence[str] | None = None) -> int:
    """Run `trl-cmdp`. Returns the exit code: 0, 1 if a part failed, or 2 for a mistake in the arguments."""
    parser = argparse.ArgumentParser(
        prog="trl-cmdp", description="Reward-aware distillation under a teacher budget that holds."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    compare.add_parser(commands)
    demo.add_parser(commands)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)
