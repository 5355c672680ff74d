"""The command line, one file per command."""

import sys
from collections.abc import Sequence

from .. import __version__
from .._messages import say
from . import calibrate, compare, completion, demo, env, evaluate, init, report, tasks, training
from ._arguments import Mistake
from ._parser import Parser, underscored


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run `trl-cmdp`. Returns the exit code: 0, 1 if a part failed, 2 for a mistake in what was asked for, or 130 if a
    command that can be resumed was stopped.
    """
    argv = underscored(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog="trl-cmdp", description="Reward-aware distillation under a teacher budget that holds.")
    parser.add_argument("--version", action="version", version=f"trl-cmdp {__version__}")
    parser.set_defaults(trains=False, resumes=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    training.add_parsers(commands)
    for command in (demo, init, tasks, calibrate, compare, evaluate, report, env, completion):
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
        # A training command reads its hundreds of arguments itself, with TRL's parser.
        if arguments.trains:
            return arguments.run(rest)
        commands.choices[name].refuse_unknown(rest)
        return arguments.run(arguments)
    except Mistake as error:
        say(f"trl-cmdp {name}: error: {' '.join(str(error).split())}", error=True)
        return 2
    except KeyboardInterrupt:
        if not arguments.resumes:
            raise
        print("\nStopped. What is recorded stays: run the same command again to resume.", file=sys.stderr)
        return 130
