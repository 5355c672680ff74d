"""
Layers that bitsandbytes keeps in 8 bits, and in 4 on CPUs with AVX512-BF16.

There `Linear4bit` packs its weights for a faster kernel in its first forward in eval mode. The kernel is outside
autograd, so from then on no gradient passes through the layer, in training mode either. It also takes only some shapes
(an assertion fails for others) and rounds to bfloat16. A switch of each layer allows it.
"""

import sys
from collections.abc import Iterator
from typing import Any, Literal

import torch


_PACKED_ROWS = 32  # of a weight in one block of the packed format


def keep_differentiable(model: torch.nn.Module) -> None:
    """
    Keep the 4-bit layers of a model on the path that gradients pass through, for a model that trains or may train later.

    Layers that an earlier evaluation packed are unpacked. Their scales keep the precision of bfloat16 that packing left
    them, so a model that was never packed is more exact.

    Args:
        model (`torch.nn.Module`):
            Model, changed in place. Without 4-bit layers nothing happens.
    """
    for layer in _layers(model, bits=4):
        layer.support_avx512bf16_for_cpu = False
        state = layer.weight.quant_state
        if state is not None and _has_packed_scales(state):
            layer.state_dict()  # unpacks the weight in place
            # bitsandbytes 0.50 leaves the scales in the packed order, unless they are quantised themselves.
            if _has_packed_scales(state):
                state.absmax = state.absmax.T.reshape(-1).float()


def allow_fast_kernel(model: torch.nn.Module) -> None:
    """
    Leave the 4-bit layers of a frozen model the faster kernel where it takes their shape, and only there.

    Args:
        model (`torch.nn.Module`):
            Model that will not train, changed in place. Without 4-bit layers nothing happens.
    """
    for layer in _layers(model, bits=4):
        if layer.out_features % _PACKED_ROWS or layer.in_features % layer.weight.blocksize:
            layer.support_avx512bf16_for_cpu = False


def keeps_outliers_apart(model: torch.nn.Module) -> bool:
    """
    Whether 8-bit layers of a model leave the features that are large in any row of a batch unquantised (LLM.int8,
    2208.07339). What they say of a row then depends on the rows beside it.

    Args:
        model (`torch.nn.Module`):
            Model.

    Returns:
        `bool`: Never true of a model whose `llm_int8_threshold` is 0.
    """
    return any(layer.state.threshold > 0 for layer in _layers(model, bits=8))


def _layers(model: torch.nn.Module, bits: Literal[4, 8]) -> Iterator[Any]:
    if "bitsandbytes" not in sys.modules:  # it is optional, and a model with its layers has imported it
        return
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    kind = Linear4bit if bits == 4 else Linear8bitLt
    yield from (module for module in model.modules() if isinstance(module, kind))


def _has_packed_scales(state) -> bool:
    return state.absmax.dim() == 2  # (blocks of a row, rows); one vector otherwise
