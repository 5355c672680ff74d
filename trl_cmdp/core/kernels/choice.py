"""Which kernel compares two heads, for each device."""

import logging
import os
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch


Kernel = Literal["torch", "trl", "triton"]

# Measured on an H200 (docs/kernels.md): TRL's kernels take 30 ms where the operations of torch take 345. Ours in Triton,
# which should take 18, waits to be measured on a card.
_DEFAULTS: dict[str, Kernel] = {"cuda": "trl"}
_VARIABLE = "TRL_CMDP_KERNEL"
_logger = logging.getLogger(__name__)


def kernel_of(device: torch.device) -> Kernel:
    """
    Kernel of a device: `"torch"`, the operations of torch, on every device but CUDA, where it is `"trl"`, TRL's kernels,
    which stand in `teachers` and leave to the operations of torch what they do not cover; or what the environment
    variable `TRL_CMDP_KERNEL` says, `"triton"` for our own (on a CPU with `TRITON_INTERPRET=1`).

    Raises:
        ValueError: If the environment variable names another kernel.
    """
    default = _DEFAULTS.get(device.type, "torch")
    kernel = os.environ.get(_VARIABLE, default)
    if kernel not in get_args(Kernel):
        raise ValueError(f"{_VARIABLE} must be one of {', '.join(get_args(Kernel))}, got {kernel!r}.")
    if (kernel == "triton" or (kernel == "trl" and device.type == "cuda")) and not _has_triton():
        return default
    return kernel  # type: ignore[return-value]


@lru_cache
def _has_triton() -> bool:
    found = find_spec("triton") is not None
    if not found:
        _logger.warning(
            "Triton is not installed (`pip install triton`): the divergence runs as operations of torch, which take "
            "several times as long on a GPU."
        )
    return found
