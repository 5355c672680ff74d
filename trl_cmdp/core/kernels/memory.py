"""
The vocabulary-sized memory of a call.

A tile, n rows by the vocabulary, is stored vocabulary first, `(V, n)`: a block of it is contiguous, its product with
the head's rows is faster than the other way round, and what belongs to a row broadcasts from `(n,)`.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch


# Elements of a block. On a CPU the few blocks in use at once stay in cache, and the products are still at full speed.
_BLOCK_ELEMENTS = {"cpu": 2**20}
_DEFAULT_BLOCK_ELEMENTS = 2**22
# On a CPU the products of more rows are hardly faster, and the memory is better left alone.
_MAX_ROWS = {"cpu": 128}
_CPU_MEMORY_MB = 256.0
_CUDA_SHARE = 1 / 8


def default_memory_mb(device: torch.device) -> float:
    """
    Bound in MiB where none is given: 256, and on a CUDA device an eighth of the memory that is free, rounded down to a
    power of two, so that a little more or less of it changes neither the tiles nor the rounding.
    """
    if device.type != "cuda":
        return _CPU_MEMORY_MB
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return 2.0 ** math.floor(math.log2(_CUDA_SHARE * (free + unused) / 2**20))


class Blocks(NamedTuple):
    """A block of the vocabulary, `(v, n)` each: of the student, of the teacher, and two to work in."""

    student: torch.Tensor
    teacher: torch.Tensor
    gap: torch.Tensor
    spare: torch.Tensor


class Workspace:
    """
    The vocabulary-sized memory of a call, made once: blocks, and with `keep_tiles` both models' tiles while their rows
    are processed. The bound `memory_mb` includes the casts of the weights.
    """

    def __init__(
        self,
        num_rows: int,
        vocab_size: int,
        keep_tiles: bool,
        device: torch.device,
        dtype: torch.dtype,
        memory_mb: float,
    ):
        # A quarter at most for the blocks and an eighth for casts; a block may always hold one row.
        num_blocks = len(Blocks._fields)
        elements = int(memory_mb * 2**20 // dtype.itemsize)
        block_elements = min(
            _BLOCK_ELEMENTS.get(device.type, _DEFAULT_BLOCK_ELEMENTS), max(elements // (4 * num_blocks), vocab_size)
        )
        fitting = (elements * 7 // 8 - num_blocks * block_elements) // ((2 if keep_tiles else 1) * vocab_size)
        useful = max(_MAX_ROWS.get(device.type, num_rows), block_elements // vocab_size)
        self.num_rows = max(1, min(num_rows, fitting, useful))
        self._block_size = max(1, min(vocab_size, block_elements // self.num_rows))
        self._tiles = torch.empty((2 * keep_tiles, vocab_size * self.num_rows), device=device, dtype=dtype)
        self._blocks = torch.empty((num_blocks, self._block_size * self.num_rows), device=device, dtype=dtype)

    def student_tile(self, vocab_size: int, num_rows: int) -> torch.Tensor:
        """The student's tile, (V, n)."""
        return self._tiles[0, : vocab_size * num_rows].view(vocab_size, num_rows)

    def teacher_tile(self, vocab_size: int, num_rows: int) -> torch.Tensor:
        """The teacher's tile, (V, n)."""
        return self._tiles[1, : vocab_size * num_rows].view(vocab_size, num_rows)

    def blocks(self, tokens: slice, num_rows: int) -> Blocks:
        """All blocks, cut to the tokens and rows."""
        size = tokens.stop - tokens.start
        return Blocks(*self._blocks[:, : size * num_rows].view(-1, size, num_rows))

    def vocabulary(self, start: int, stop: int) -> Iterator[slice]:
        """The vocabulary from `start` to `stop` in blocks."""
        return slices(start, stop, self._block_size)


def slices(start: int, stop: int, size: int) -> Iterator[slice]:
    """From `start` to `stop` in steps of `size`."""
    return (slice(first, min(first + size, stop)) for first in range(start, stop, size))
