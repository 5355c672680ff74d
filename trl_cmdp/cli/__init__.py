"""The command line, one file per command."""

import sys
from collections.abc import Sequence

from .. import __version__
from .._messages import say
from . import calibrate, compare, completion, demo, env, evaluate, init, report, serve, tasks, training
from ._arguments import Mistake
from ._parser import Parser, underscored
from ._results import results


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run `trl-cmdp`. Returns the exit code: 0, 1 if a part failed, 2 for a mistake in what was asked for, or 130 if the
    command was stopped by Ctrl-C.
    """
    argv = underscored(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog="trl-cmdp", description="Reward-aware distillation under a teacher budget that holds.")
    parser.add_argument("--version", action="version", version=f"trl-cmdp {__version__}")
    parser.set_defaults(trains=False, resumes=False, json=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    training.add_parsers(commands)
    for command in (demo, init, tasks, calibrate, compare, evaluate, report, serve, env, completion):
        command.add_parser(commands)
    if not argv:
        parser.print_help()
        return 0
    name = next((word for word in argv if not word.startswith("-")), "")
    try:
        if name in commands.choices and (own := commands.choices[name]).options:
            # Before argparse says that something else is missing.
            own.refuse_unknown(own.unknown(argv[argv.index(name) + 1 :]))
        arguments, rest = parser.parse_known_args(argv)
        if not arguments.trains:
            commands.choices[name].refuse_unknown(rest)
        with results(arguments.json) as arguments.show:
            # A training command reads its hundreds of arguments itself, with TRL's parser.
            return arguments.run(rest if arguments.trains else arguments)
    except Mistake as error:
        say(f"trl-cmdp {name}: error: {' '.join(str(error).split())}", error=True)
        return 2
    except KeyboardInterrupt:
        again = " What is recorded stays: run the same command again to resume." if arguments.resumes else ""
        print(f"\nStopped.{again}", file=sys.stderr)
        return 130
