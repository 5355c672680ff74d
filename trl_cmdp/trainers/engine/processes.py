"""What all processes do together."""

import torch
from accelerate import Accelerator


def on_any_process(accelerator: Accelerator, condition: bool | torch.Tensor) -> bool:
    """Whether it holds anywhere: all processes must raise together, or the others would wait for ever."""
    return bool(accelerator.gather(torch.tensor([bool(condition)], device=accelerator.device)).any())


def gather_rows(accelerator: Accelerator, local: torch.Tensor) -> torch.Tensor:
    """(b, T) of this process to (B, T) of all, padded with 0 to the longest T."""
    # Padding makes booleans int64, on the processes alone that need it: the others would gather another dtype.
    rows = local.int() if local.dtype == torch.bool else local
    return accelerator.gather(accelerator.pad_across_processes(rows, dim=1)).to(local.dtype)
