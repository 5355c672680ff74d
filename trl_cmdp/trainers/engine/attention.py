"""The student's attention: which it is, and training without the backend whose backward returns NaN on some GPUs."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel


# https://github.com/pytorch/pytorch/issues/196678: with an explicit mask and a length that leaves 64 modulo 128. No
# release of torch is known to be free of it.
FAULTY_SINCE = (2, 11)
KEEP_VARIABLE = "TRL_CMDP_CUDNN_ATTENTION"

_logger = logging.getLogger(__name__)


def attention_of(model: torch.nn.Module) -> list[str]:
    """Names of the attention that the model and its parts run, such as "sdpa"."""
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return sorted({str(part.config._attn_implementation) for part in parts})


def describe_attention(model: torch.nn.Module, device: torch.device) -> str:
    """The attention, for messages."""
    backend = "on" if torch.backends.cuda.cudnn_sdp_enabled() else "off"
    on_cuda = f", cuDNN's backend {backend}" if device.type == "cuda" else ""
    return f"{', '.join(attention_of(model))} on {device.type}{on_cuda}"


@contextmanager
def cudnn_attention_off(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """
    Train without cuDNN's backend of `scaled_dot_product_attention` where it is faulty. Flash and memory-efficient
    attention take over. A user keeps it by the environment variable `TRL_CMDP_CUDNN_ATTENTION=1`, or by allowing no
    other backend (`torch.nn.attention.sdpa_kernel`).
    """
    backends = torch.backends.cuda
    others = backends.flash_sdp_enabled() or backends.mem_efficient_sdp_enabled() or backends.math_sdp_enabled()
    faulty = device.type == "cuda" and torch.__version__ >= FAULTY_SINCE and "sdpa" in attention_of(model)
    kept = os.environ.get(KEEP_VARIABLE) == "1" or not others
    if kept or not faulty or not backends.cudnn_sdp_enabled():
        yield
        return
    _logger.warning(
        "cuDNN's attention is switched off while training: on H100 and H200 its backward returns NaN for padded batches "
        f"of some lengths (pytorch#196678, torch {torch.__version__}). `{KEEP_VARIABLE}=1` keeps it."
    )
    backends.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        backends.enable_cudnn_sdp(True)
