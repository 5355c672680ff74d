"""`trl-cmdp lagrangian`: train for reward minus a multiplier times the divergence from the teacher."""

import argparse


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "lagrangian", help="train for reward minus a multiplier times the divergence", add_help=False
    )
    parser.set_defaults(run=run, trains=True)


def run(arguments: list[str]) -> int:
    """Run the command, given what follows it."""
    # Imported here: `trl-cmdp --help` should not wait for torch and TRL.
    from ..trainers import LagrangianDistillTrainer
    from ._train import run_training

    return run_training("lagrangian", LagrangianDistillTrainer, arguments)
