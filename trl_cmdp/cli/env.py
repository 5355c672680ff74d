"""`trl-cmdp env`: what a bug report needs, and nothing of the user's."""

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version

from .. import __version__


PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "bitsandbytes", "vllm")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "env",
        help="print the versions and the hardware that a bug report needs",
        description="Print versions, platform and devices. No paths, no environment variables, no tokens.",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the environment."""
    # Imported here: `trl-cmdp --help` should not wait for torch.
    import torch

    # `trl env` prints the user's accelerate config as well, which may name paths and hosts.
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    environment = {
        "trl_cmdp": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "CPUs": os.cpu_count(),
        "CUDA devices": ", ".join(devices) or "none",
    }
    print("\n".join(f"- {name}: {value}" for name, value in environment.items()))
    return 0


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
