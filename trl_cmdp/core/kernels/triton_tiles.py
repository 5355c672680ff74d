"""
One pass over both heads for CUDA: products by cuBLAS, in half precision with float32 sums where the inputs are, and
between them one Triton kernel that reads a tile of logits and one that writes their gradient.

A tile is n rows by the vocabulary, `(n, V)`, of which a program takes a row. No step waits for the device: what depends
on values, as which rows have a weight or whether the loss was asked for, is decided by the kernels.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from ..comparison import Comparison
from .memory import slices
from .projection import Projection
from .tiles import HeadPair


# A row's logits are read in steps of so many, and a program of the gradient writes so many.
_STATISTICS_BLOCK, _GRADIENT_BLOCK = 2048, 1024
# The next steps' logits are on their way while one step is summed.
_STATISTICS_LAUNCH = {"num_warps": 8, "STAGES": 3}
# More are of little use. At a vocabulary of 151,936 in half precision these are tiles of 256 rows.
_TILE_MB = 640.0
# Tiles whose gradients of half precision are multiplied at once: each product reads and writes the head's whole gradient,
# which takes longer than the product itself where the rows are few. The second, where their memory is not the peak's.
_TILES_PER_PRODUCT, _MAX_TILES_PER_PRODUCT = 4, 8
_ALIGNMENT = 128  # of rows and of their stride, in elements, as the tensor cores' tiles want it


class RowStatistics(NamedTuple):
    """
    What `statistics_kernel` writes of n rows, `(n,)` each. Normalisers are relative to the references. The second to the
    sixth are over the tokens that both vocabularies have, and unset without a teacher; the next three are over the
    student's own, and unset without sampled tokens.
    """

    reference: torch.Tensor
    shared_log_normalizer: torch.Tensor
    teacher_reference: torch.Tensor
    teacher_log_normalizer: torch.Tensor
    cost: torch.Tensor
    centre: torch.Tensor  # what the divergence's gradient is taken about
    log_normalizer: torch.Tensor
    log_prob: torch.Tensor
    entropy: torch.Tensor
    teacher_log_prob: torch.Tensor


class Tile(NamedTuple):
    """Outputs of both heads `(n, stride)` for some of the rows; of the student alone where they are not compared."""

    rows: slice
    student: torch.Tensor
    teacher: torch.Tensor | None


@dataclass
class TiledRows:
    """
    The rows of a call, those that are compared first, and the two steps on their tiles.

    Args:
        pair ([`HeadPair`]):
            Both heads.
        hidden (`torch.Tensor`):
            Student's hidden states of shape `(N, H_s)`.
        teacher_hidden (`torch.Tensor`):
            Teacher's of shape `(M, H_t)`, of the first M rows.
        token_ids (`torch.Tensor`, *optional*):
            Sampled tokens of shape `(N,)`.
        gradient_dtype (`torch.dtype`):
            Dtype of the gradient of the student's head.
    """

    pair: HeadPair
    hidden: torch.Tensor
    teacher_hidden: torch.Tensor
    token_ids: torch.Tensor | None
    gradient_dtype: torch.dtype
    statistics: torch.Tensor = field(init=False)  # the fields of `RowStatistics` by N
    tile_rows: int = field(init=False)
    product_rows: int = field(init=False)  # whose gradients are multiplied at once
    sums_in_half: bool = field(init=False)  # whether the products add up to the head's gradient in its own bfloat16
    _kept: dict[int, Tile] = field(default_factory=dict, init=False)  # by their first row
    _workspace: dict[str, torch.Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.statistics = self.hidden.new_empty((len(RowStatistics._fields), len(self.hidden)), dtype=torch.float32)
        student, logit_bytes = self.pair.student, 2 * torch.float32.itemsize
        self._stride = -(-student.head.vocab_size // _ALIGNMENT) * _ALIGNMENT
        memory = student.memory_mb * 2**20 / self._stride  # for each token of the vocabulary
        tiles_per_product = _TILES_PER_PRODUCT if student.rounding.itemsize == 2 else 1
        row_bytes = logit_bytes + tiles_per_product * student.rounding.itemsize
        fitting = int(min(memory, _TILE_MB * 2**20 / self._stride) // row_bytes)
        unit = next(size for size in (_ALIGNMENT, 8, 1) if fitting >= size or size == 1)
        self.tile_rows = max(1, fitting - fitting % unit)
        self.product_rows = tiles_per_product * self.tile_rows
        spare = memory - self.tile_rows * row_bytes  # for logits that are kept, and more gradients
        policy, rounded = self.token_ids is not None, self.gradient_dtype == student.rounding == torch.bfloat16
        few = len(self.hidden) <= 2 * _MAX_TILES_PER_PRODUCT * self.tile_rows
        if tiles_per_product > 1 and (policy or (few and rounded)):
            gradient_bytes = self.tile_rows * student.rounding.itemsize
            unneeded = spare - len(self.hidden) * logit_bytes if policy else spare
            more = min(max(int(unneeded // gradient_bytes), 0), _MAX_TILES_PER_PRODUCT - tiles_per_product)
            self.product_rows += more * self.tile_rows
            spare -= more * gradient_bytes
        self._keepable_rows = int(spare // logit_bytes)
        # Each product has float32 sums, and of two the sum is rounded once more. bfloat16 alone has float32's range.
        self.sums_in_half = rounded and len(self.hidden) <= 2 * self.product_rows

    def tiles(self, keep: bool = False) -> Iterator[Tile]:
        """All rows, projected by both heads: what was kept before as it is, and with `keep` as many as memory takes."""
        compared, total = len(self.teacher_hidden), len(self.hidden)
        for rows in (*slices(0, compared, self.tile_rows), *slices(compared, total, self.tile_rows)):
            tile = self._kept.pop(rows.start, None)
            if tile is None:
                own = keep and rows.stop <= self._keepable_rows
                tile = self._project(rows, own)
                if own:
                    self._kept[rows.start] = tile
            yield tile
        self._workspace.clear()

    def read(self, tile: Tile) -> None:
        """First step: the statistics of a tile's rows."""
        from .triton_kernels import statistics_kernel

        statistics_kernel[(len(tile.student),)](
            *self._inputs(tile),
            self.statistics[:, tile.rows],
            self.statistics.shape[1],
            **self._constants(tile),
            **_STATISTICS_LAUNCH,
            BLOCK=_STATISTICS_BLOCK,
        )

    def write_gradient(self, tile: Tile, coefficients: torch.Tensor, first: int) -> None:
        """
        Second step: gradient of Σ a·cost + b·log_prob + c·entropy by the outputs of the student's head, from the
        coefficients (3, N), for [`gradient`] of the rows since the first that it has.
        """
        from .triton_kernels import gradient_kernel

        out = self._memory("gradient", self.product_rows, self.pair.student.rounding)[tile.rows.start - first :]
        gradient_kernel[(len(tile.student), -(-self.pair.student.head.vocab_size // _GRADIENT_BLOCK))](
            *self._inputs(tile),
            self.statistics[:, tile.rows],
            coefficients[:, tile.rows],
            out,
            self.statistics.shape[1],
            **self._constants(tile),
            BLOCK=_GRADIENT_BLOCK,
        )

    def gradient(self, rows: slice) -> torch.Tensor:
        """What was written for the rows, (n, V)."""
        return self._workspace["gradient"][: rows.stop - rows.start, : self.pair.student.head.vocab_size]

    def _project(self, rows: slice, own: bool) -> Tile:
        num_rows, compared = rows.stop - rows.start, rows.start < len(self.teacher_hidden)
        size = num_rows if own else self.tile_rows
        student = self._memory(None if own else "student", size)[:num_rows]
        self.pair.student.outputs(self.hidden[rows], self.pair.student.head.vocab_size, student)
        if not compared:
            return Tile(rows, student, None)
        teacher = self._memory(None if own else "teacher", size)[:num_rows]
        self.pair.teacher.outputs(self.teacher_hidden[rows], self.pair.vocab_size, teacher)
        return Tile(rows, student, teacher)

    def _memory(self, name: str | None, num_rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """(n, stride), in memory that later tiles take too if it has a name."""
        num_rows = min(num_rows, len(self.hidden))
        if name is None:
            return self.hidden.new_empty((num_rows, self._stride), dtype=dtype)
        if name not in self._workspace:
            self._workspace[name] = self.hidden.new_empty((num_rows, self._stride), dtype=dtype)
        return self._workspace[name]

    def _inputs(self, tile: Tile) -> tuple[torch.Tensor | None, ...]:
        teacher = tile.student if tile.teacher is None else tile.teacher
        return tile.student, teacher, None if self.token_ids is None else self.token_ids[tile.rows]

    def _constants(self, tile: Tile) -> dict[str, Any]:
        from .triton_kernels import NO_TEACHER

        pair, compared = self.pair, tile.teacher is not None
        return {
            "LAYOUT": (self._stride, pair.vocab_size if compared else 0, pair.student.head.vocab_size),
            "STUDENT": _shape(pair.student),
            "TEACHER": _shape(pair.teacher),
            "MEASURE": _measure(pair.comparison, pair.vocab_size) if compared else (NO_TEACHER.value, 0.0, 0.0, 0.0),
        }


def tiled_rows(
    pair: HeadPair, hidden: torch.Tensor, teacher_hidden: torch.Tensor, token_ids: torch.Tensor | None
) -> TiledRows:
    """The rows, of which the first are compared, and heads as the products take them: cast once where a copy fits."""
    student, teacher = _rounded(pair.student), _rounded(pair.teacher)
    return TiledRows(
        replace(pair, student=student, teacher=teacher),
        hidden.to(student.rounding),
        teacher_hidden.to(teacher.rounding),
        None if token_ids is None else token_ids.contiguous(),
        pair.student.head.weight.dtype,
    )


def _rounded(projection: Projection) -> Projection:
    weight = projection.head.weight
    copied = weight.numel() * projection.rounding.itemsize
    if weight.dtype == projection.rounding or copied > projection.memory_mb * 2**20 / 4:
        return projection
    return replace(projection, head=replace(projection.head, weight=weight.to(projection.rounding)))


def _shape(projection: Projection) -> tuple[float, float]:
    """(factor, inner): logits are factor·tanh(inner·y) of the head's outputs y, or factor·y."""
    softcap = projection.head.softcap
    if softcap is None:
        return projection.slope, 0.0
    return softcap / projection.temperature, projection.head.logit_scale / softcap


def _measure(comparison: Comparison, vocab_size: int) -> tuple[int, float, float, float]:
    from .triton_kernels import CROSS_ENTROPY, FORWARD_KL, JSD, REVERSE_KL

    kind = CROSS_ENTROPY if comparison.cross_entropy else {0.0: FORWARD_KL, 1.0: REVERSE_KL}.get(comparison.beta, JSD)
    floor = comparison.teacher_prob_floor
    logs = (math.log1p(-floor), math.log(floor / vocab_size)) if floor > 0.0 else (0.0, 0.0)
    return kind.value, comparison.beta, *logs
