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
from torch.autograd.function import once_differentiable

from ..comparison import Comparison
from .memory import slices
from .projection import Projection, add_product_
from .tiles import SECOND_BACKWARD, HeadPair


# A row's logits are read in steps of this many, and a program of the gradient writes as many.
_BLOCK = 1024
# Products of more rows are hardly faster. At a vocabulary of 151,936 in half precision these are tiles of 384 rows.
_TILE_MB = 640.0
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
    """

    pair: HeadPair
    hidden: torch.Tensor
    teacher_hidden: torch.Tensor
    token_ids: torch.Tensor | None
    statistics: torch.Tensor = field(init=False)  # the fields of `RowStatistics` by N
    _kept: dict[int, Tile] = field(default_factory=dict, init=False)  # by their first row
    _workspace: dict[str, torch.Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.statistics = self.hidden.new_empty((len(RowStatistics._fields), len(self.hidden)), dtype=torch.float32)
        vocab_size, grad_dtype = self.pair.student.head.vocab_size, self.pair.student.rounding
        self._stride = -(-vocab_size // _ALIGNMENT) * _ALIGNMENT
        memory = self.pair.student.memory_mb * 2**20
        row_bytes = self._stride * (2 * torch.float32.itemsize + grad_dtype.itemsize)
        fitting = int(min(memory, _TILE_MB * 2**20) // row_bytes)
        unit = next(size for size in (_ALIGNMENT, 8, 1) if fitting >= size or size == 1)
        self._tile_rows = max(1, fitting - fitting % unit)
        self._keepable_rows = int(memory // row_bytes) - self._tile_rows

    def tiles(self, keep: bool = False) -> Iterator[Tile]:
        """All rows, projected by both heads: what was kept before as it is, and with `keep` as many as memory takes."""
        compared, total = len(self.teacher_hidden), len(self.hidden)
        for rows in (*slices(0, compared, self._tile_rows), *slices(compared, total, self._tile_rows)):
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
        )

    def gradient(self, tile: Tile, coefficients: torch.Tensor) -> torch.Tensor:
        """
        Second step: gradient of Σ a·cost + b·log_prob + c·entropy by the outputs of the student's head, (n, V), from the
        coefficients (3, N).
        """
        from .triton_kernels import gradient_kernel

        vocab_size, num_rows = self.pair.student.head.vocab_size, len(tile.student)
        grad = self._tile_memory("gradient", num_rows, self.pair.student.rounding)
        gradient_kernel[(num_rows, -(-vocab_size // _BLOCK))](
            *self._inputs(tile),
            self.statistics[:, tile.rows],
            coefficients[:, tile.rows],
            grad,
            self.statistics.shape[1],
            **self._constants(tile),
        )
        return grad[:, :vocab_size]

    def _project(self, rows: slice, own: bool) -> Tile:
        num_rows, compared = rows.stop - rows.start, rows.start < len(self.teacher_hidden)
        student = self._tile_memory(None if own else "student", num_rows)
        self.pair.student.outputs(self.hidden[rows], self.pair.student.head.vocab_size, student)
        if not compared:
            return Tile(rows, student, None)
        teacher = self._tile_memory(None if own else "teacher", num_rows)
        self.pair.teacher.outputs(self.teacher_hidden[rows], self.pair.vocab_size, teacher)
        return Tile(rows, student, teacher)

    def _tile_memory(self, name: str | None, num_rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """(n, stride), in memory that later tiles take too if it has a name."""
        if name is None:
            return self.hidden.new_empty((num_rows, self._stride), dtype=dtype)
        if name not in self._workspace:
            most = min(self._tile_rows, len(self.hidden))
            self._workspace[name] = self.hidden.new_empty((most, self._stride), dtype=dtype)
        return self._workspace[name][:num_rows]

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
            "BLOCK": _BLOCK,
        }


class TritonHeads(torch.autograd.Function):
    """
    The function of `fused_heads`. Without sampled tokens the weights are all that the gradient depends on, and it is
    formed with the costs. With them it is formed in backward, once for all parts, from logits that are kept as far as
    memory goes and projected again beyond.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        student_hidden,
        student_weight,
        student_bias,
        teacher_hidden,
        teacher_rows,
        weights,
        token_ids,
        pair: HeadPair,
        grad_enabled: bool,
    ):
        ctx.set_materialize_grads(False)
        policy, num_compared = token_ids is not None, len(teacher_hidden)
        differentiated = grad_enabled and any(ctx.needs_input_grad)
        order = _compared_first(teacher_rows, len(student_hidden))
        rows = _tiled_rows(pair, student_hidden[order], teacher_hidden, token_ids[order] if policy else None)
        weights = weights.to(device=student_hidden.device, dtype=torch.float32)[order]  # (N,)
        gradients = None
        with torch.autocast(student_hidden.device.type, enabled=False):
            if differentiated and not policy:
                gradients = _Gradients(rows, ctx.needs_input_grad, weights.expand(3, -1))
            for tile in rows.tiles(keep=differentiated and policy):
                rows.read(tile)
                if gradients is not None:
                    gradients.add(tile)
        statistics = RowStatistics(*rows.statistics)
        if differentiated:
            if policy:
                # The weight is among them so that a change of it since is an error.
                ctx.save_for_backward(student_hidden, student_weight)
                ctx.rows, ctx.order, ctx.weights = rows, order, weights
            ctx.gradients, ctx.policy, ctx.consumed = gradients, policy, False
            ctx.dtypes = [None if x is None else x.dtype for x in (student_hidden, student_weight, student_bias)]
        costs, weights = statistics.cost[:num_compared].clone(), weights[:num_compared]  # (M,)
        ctx.mark_non_differentiable(costs)
        loss = torch.where(weights != 0, weights * costs, 0.0).sum()
        if not policy:
            return None, None, loss, costs
        log_probs, entropy = (
            torch.empty_like(values).index_copy_(0, order, values)
            for values in (statistics.log_prob, statistics.entropy)
        )
        return log_probs, entropy, loss, costs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_log_probs, grad_entropy, grad_loss, _):  # type: ignore[no-untyped-def]
        if ctx.consumed:
            raise RuntimeError(SECOND_BACKWARD)
        ctx.consumed, gradients, ctx.gradients = True, ctx.gradients, None
        factor, order = grad_loss, None
        if ctx.policy:
            _ = ctx.saved_tensors
            rows, ctx.rows, order = ctx.rows, None, ctx.order
            unasked = torch.zeros_like(ctx.weights)
            of_cost = unasked if grad_loss is None else ctx.weights * grad_loss
            others = (unasked if grad is None else grad.float()[order] for grad in (grad_log_probs, grad_entropy))
            gradients = _Gradients(rows, ctx.needs_input_grad, torch.stack([of_cost, *others]))
            with torch.autocast(of_cost.device.type, enabled=False):
                for tile in rows.tiles():
                    gradients.add(tile)
            factor = torch.ones((), device=of_cost.device)
        return (*gradients.finished(factor, order, ctx.dtypes), *(None,) * 6)


def triton_scores(
    pair: HeadPair, hidden: torch.Tensor, teacher_hidden: torch.Tensor, token_ids: torch.Tensor | None
) -> RowStatistics:
    """Statistics of all rows (N,), without gradient."""
    rows = _tiled_rows(pair, hidden, teacher_hidden, token_ids)
    with torch.autocast(hidden.device.type, enabled=False):
        for tile in rows.tiles():
            rows.read(tile)
    return RowStatistics(*rows.statistics)


def _tiled_rows(
    pair: HeadPair, hidden: torch.Tensor, teacher_hidden: torch.Tensor, token_ids: torch.Tensor | None
) -> TiledRows:
    """The rows, of which the first are compared, and heads as the products take them: cast once where a copy fits."""
    student, teacher = _rounded(pair.student), _rounded(pair.teacher)
    return TiledRows(
        replace(pair, student=student, teacher=teacher),
        hidden.to(student.rounding),
        teacher_hidden.to(teacher.rounding),
        token_ids,
    )


def _rounded(projection: Projection) -> Projection:
    weight = projection.head.weight
    copied = weight.numel() * projection.rounding.itemsize
    if weight.dtype == projection.rounding or copied > projection.memory_mb * 2**20 / 4:
        return projection
    return replace(projection, head=replace(projection.head, weight=weight.to(projection.rounding)))


class _Gradients:
    """
    Gradients of the student's hidden states (N, H_s), head weight (V, H_s) and head bias (V,), in float32, from the
    coefficients (3, N) of the rows. These are divided by the largest of them, which half precision could not hold the
    products of otherwise, and `finished` multiplies by it.
    """

    def __init__(self, rows: TiledRows, needed: tuple[bool, ...], coefficients: torch.Tensor):
        hidden, weight = rows.hidden, rows.pair.student.head.weight
        self._rows, tiny = rows, torch.finfo(torch.float32).tiny
        finite = coefficients.abs().nan_to_num(0.0, 0.0)
        self._largest = torch.nn.functional.pad(finite, (0, 1), value=tiny).amax()
        self._coefficients = coefficients / self._largest
        self._asked = (coefficients != 0).any(0).unsqueeze(-1)  # (N, 1)
        shapes = (hidden.shape, weight.shape, weight.shape[:1])
        self._hidden, self._weight, self._bias = (
            torch.zeros(shape, device=weight.device) if needs else None
            for shape, needs in zip(shapes, needed[:3], strict=True)
        )

    def add(self, tile: Tile) -> None:
        """Adds what the rows of a tile give."""
        rows, student = tile.rows, self._rows.pair.student
        grad = self._rows.gradient(tile, self._coefficients)  # (n, V)
        if self._hidden is not None:
            student.add_by_rows(grad, self._hidden[rows])
        if self._weight is not None:
            # A row that nothing is asked of may not be finite.
            hidden = self._rows.hidden[rows].masked_fill(~self._asked[rows], 0.0)
            add_product_(self._weight, grad.t(), hidden)
        if self._bias is not None:
            self._bias += grad.sum(0, dtype=torch.float32)

    def finished(
        self, factor: torch.Tensor, order: torch.Tensor | None, dtypes: list[torch.dtype | None]
    ) -> tuple[torch.Tensor | None, ...]:
        """All of them times a factor, in their dtypes, the rows at their indices in the call."""
        factor = factor.float() * self._largest
        if self._hidden is not None and order is not None:
            self._hidden = torch.empty_like(self._hidden).index_copy_(0, order, self._hidden)
        return tuple(
            None if grad is None or dtype is None else _scaled(grad, factor, dtype)
            for grad, dtype in zip((self._hidden, self._weight, self._bias), dtypes, strict=True)
        )


def _scaled(values: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """values·factor in a dtype, 0 where the factor is; in place where the dtype is their own."""
    from .triton_kernels import scale_kernel

    out = values if values.dtype == dtype else torch.empty_like(values, dtype=dtype)
    if values.numel() > 0:
        scale_kernel[(-(-values.numel() // _BLOCK),)](values, factor, out, values.numel(), BLOCK=_BLOCK)
    return out


def _compared_first(teacher_rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Indices (N,) of all rows: those that are compared, in order, and then the others."""
    compared = torch.zeros(num_rows, dtype=torch.int8, device=teacher_rows.device).index_fill_(0, teacher_rows, 1)
    return compared.argsort(descending=True, stable=True)


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
