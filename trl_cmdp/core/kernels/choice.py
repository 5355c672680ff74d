"""Which kernel compares two heads, for each device."""

import logging
import os
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch


Kernel = Literal["torch", "trl", "triton"]

# Measured on an H200 (docs/kernels.md).
_DEFAULTS: dict[str, Kernel] = {"cuda": "triton"}
_WITHOUT_TRITON: dict[str, Kernel] = {"cuda": "trl"}
_VARIABLE = "TRL_CMDP_KERNEL"
_logger = logging.getLogger(__name__)


def kernel_of(device: torch.device) -> Kernel:
    """
    Kernel of a device: `"torch"`, the operations of torch, on every device but CUDA, where it is `"triton"`, our own; or
    what the environment variable `TRL_CMDP_KERNEL` says. Where Triton is missing it is `"trl"` on CUDA: TRL's kernels,
    which then are operations of torch too. They stand in `teachers`, and leave to ours what they do not cover.

    Raises:
        ValueError: If the environment variable names another kernel, or Triton's on a CPU without its interpreter.
    """
    kernel = os.environ.get(_VARIABLE, _DEFAULTS.get(device.type, "torch"))
    if kernel not in get_args(Kernel):
        raise ValueError(f"{_VARIABLE} must be one of {', '.join(get_args(Kernel))}, got {kernel!r}.")
    if kernel == "torch" or (kernel == "trl" and device.type != "cuda"):
        return kernel  # type: ignore[return-value]
    if not _has_triton():
        return _WITHOUT_TRITON.get(device.type, "torch")
    if kernel == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"{_VARIABLE}=triton cannot be computed on a CPU. Unset {_VARIABLE}: the default is right on every device. "
            "(`TRITON_INTERPRET=1` runs Triton's interpreter, which is for tests.)"
        )
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
