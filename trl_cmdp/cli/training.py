"""`trl-cmdp constrained | lagrangian | gkd | minillm`: train a student, with the arguments of its config."""

import argparse
from functools import partial

from ._arguments import Mistake
from ._run import distill_class
from ._settings import print_short_help
from ._training_arguments import LAUNCHED, as_options, check_training_arguments, separate_files


COMMANDS = {
    "constrained": "train for reward, under a limit on the divergence from the teacher",
    "lagrangian": "train for reward minus a multiplier times the divergence",
    "gkd": "imitate the teacher, on the student's own rollouts or others",
    "minillm": "imitate the teacher by the reverse KL of whole sequences",
}


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands to the command line."""
    for command, description in COMMANDS.items():
        parser = commands.add_parser(command, help=description, add_help=False)
        parser.set_defaults(run=partial(_run, command), trains=True)


def _run(command: str, arguments: list[str]) -> int:
    arguments = separate_files(arguments)
    if "--help_all" in arguments:
        arguments = ["--help"]
    elif {"-h", "--help"} & set(arguments):
        print_short_help(command, COMMANDS[command])
        return 0
    try:
        if arguments[:1] != [LAUNCHED] and arguments != ["--help"]:  # the process that launched this one has checked
            check_training_arguments(command, arguments)
        # Imported here: neither the help nor what is wrong should wait for torch and TRL.
        from ._train import run_training

        return run_training(command, distill_class(command, "Trainer"), arguments)
    except Mistake as error:
        raise Mistake(as_options(str(error), command)) from error
