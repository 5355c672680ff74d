"""`trl-cmdp minillm`: distillation by the reverse KL of whole sequences."""

import argparse


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "minillm", help="imitate the teacher by the reverse KL of whole sequences", add_help=False
    )
    parser.set_defaults(run=run, trains=True)


def run(arguments: list[str]) -> int:
    """Run the command, given what follows it."""
    # Imported here: `trl-cmdp --help` should not wait for torch and TRL.
    from ..trainers import MiniLLMDistillTrainer
    from ._train import run_training

    return run_training("minillm", MiniLLMDistillTrainer, arguments)
