"""Short fingerprints of what decides a result, equal in every process and on every machine."""

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor


_SAMPLES = 64  # values of each tensor, spread over it


def plain(value: Any) -> Any:
    """A value as JSON has it. Sets are sorted, and anything else is its text, without its address in memory."""
    return json.loads(json.dumps(value, default=_text))


def fingerprint(value: Any) -> str:
    """Of a value, as [`plain`] has it."""
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()[:16]


def fingerprint_of_rows(rows: Iterable[Any]) -> str:
    """Of the rows of a table, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(fingerprint(row).encode())
    return digest.hexdigest()[:16]


def fingerprint_of_weights(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """
    Of named tensors: names, shapes, dtypes, and a few values of each. Of a tensor that is sharded over processes no value
    counts, as each process holds others.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if isinstance(tensor, DTensor) or tensor.numel() == 0:
            continue
        count = min(_SAMPLES, tensor.numel())
        index = torch.arange(count, device=tensor.device) * (tensor.numel() - 1) // max(1, count - 1)
        values = tensor.detach().flatten()[index].double().cpu()
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]


def _text(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))
