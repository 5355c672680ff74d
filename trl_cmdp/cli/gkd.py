"""`trl-cmdp gkd`: generalised knowledge distillation."""

import argparse


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "gkd", help="imitate the teacher, on the student's own rollouts or others", add_help=False
    )
    parser.set_defaults(run=run, trains=True)


def run(arguments: list[str]) -> int:
    """Run the command, given what follows it."""
    # Imported here: `trl-cmdp --help` should not wait for torch and TRL.
    from ..trainers import GKDDistillTrainer
    from ._train import run_training

    return run_training("gkd", GKDDistillTrainer, arguments)
