"""The pass over both heads by the Triton kernels, as a differentiable function."""

from functools import partial

import torch
from torch.autograd.function import once_differentiable

from .projection import add_product_
from .tiles import SECOND_BACKWARD, HeadPair
from .triton_tiles import RowStatistics, Tile, TiledRows, tiled_rows


_SCALE_BLOCK = 1024
_EXPONENT = 0x7F800000  # bits of a float32 that are left of a power of two, by which nothing is rounded


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
        rows = tiled_rows(
            pair, _ordered(student_hidden, order), teacher_hidden, _ordered(token_ids, order) if policy else None
        )
        weights = _ordered(weights.to(device=student_hidden.device, dtype=torch.float32), order)  # (N,)
        gradients, formed = None, differentiated and not policy
        make_gradients = partial(_Gradients, rows, ctx.needs_input_grad, weights.expand(3, -1))
        with torch.autocast(student_hidden.device.type, enabled=False):
            for tile in rows.tiles(keep=differentiated and policy):
                rows.read(tile)
                if formed:
                    # Once the device has work to do.
                    gradients = gradients or make_gradients()
                    gradients.add(rows, tile)
        if formed and gradients is None:
            gradients = make_gradients()  # of no rows
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
        log_probs, entropy = (_unordered(values, order) for values in (statistics.log_prob, statistics.entropy))
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
            others = (
                unasked if grad is None else _ordered(grad.float(), order) for grad in (grad_log_probs, grad_entropy)
            )
            gradients = _Gradients(rows, ctx.needs_input_grad, torch.stack([of_cost, *others]))
            with torch.autocast(of_cost.device.type, enabled=False):
                for tile in rows.tiles():
                    gradients.add(rows, tile)
            factor = torch.ones((), device=of_cost.device)
        return (*gradients.finished(factor, order, ctx.dtypes), *(None,) * 6)


def triton_scores(
    pair: HeadPair, hidden: torch.Tensor, teacher_hidden: torch.Tensor, token_ids: torch.Tensor | None
) -> RowStatistics:
    """Statistics of all rows (N,), without gradient."""
    rows = tiled_rows(pair, hidden, teacher_hidden, token_ids)
    with torch.autocast(hidden.device.type, enabled=False):
        for tile in rows.tiles():
            rows.read(tile)
    return RowStatistics(*rows.statistics)


class _Gradients:
    """
    Gradients of the student's hidden states (N, H_s), head weight (V, H_s) and head bias (V,), from the coefficients
    (3, N) of the rows; in float32, the weight's also as [`TiledRows.sums_in_half`] says. The coefficients are divided by
    the size of the largest of them, as half precision could not hold the products otherwise, and `finished` multiplies
    by it.
    """

    def __init__(self, rows: TiledRows, needed: tuple[bool, ...], coefficients: torch.Tensor):
        hidden, weight = rows.hidden, rows.pair.student.head.weight
        self._first = 0  # row whose gradient has not been multiplied
        tiny = torch.finfo(torch.float32).tiny
        finite = coefficients.abs().nan_to_num(0.0, 0.0)
        largest = torch.nn.functional.pad(finite, (0, 1), value=tiny).amax()
        self._largest = (largest.view(torch.int32) & _EXPONENT).view(torch.float32)
        self._coefficients = coefficients / self._largest
        self._asked = (coefficients != 0).any(0).unsqueeze(-1)  # (N, 1)
        self._hidden = torch.zeros(hidden.shape, device=weight.device) if needed[0] else None
        make = torch.zeros if len(hidden) == 0 else torch.empty  # the first product writes it
        sums = torch.bfloat16 if rows.sums_in_half else torch.float32
        self._weight = make(weight.shape, device=weight.device, dtype=sums) if needed[1] else None
        self._bias = torch.zeros(len(weight), device=weight.device) if needed[2] else None

    def add(self, rows: TiledRows, tile: Tile) -> None:
        """Adds what the rows of a tile give. Tiles come in order."""
        stop = tile.rows.stop
        rows.write_gradient(tile, self._coefficients, self._first)
        if stop == len(rows.hidden) or stop + rows.tile_rows > self._first + rows.product_rows:
            self._multiply(rows, slice(self._first, stop))
            self._first = stop

    def _multiply(self, rows: TiledRows, part: slice) -> None:
        grad = rows.gradient(part)
        if self._hidden is not None:
            rows.pair.student.add_by_rows(grad, self._hidden[part])
        if self._weight is not None:
            # A row that nothing is asked of may not be finite.
            hidden = rows.hidden[part].masked_fill(~self._asked[part], 0.0)
            add_product_(self._weight, grad.t(), hidden, keep=part.start > 0)
        if self._bias is not None:
            self._bias += grad.sum(0, dtype=torch.float32)

    def finished(
        self, factor: torch.Tensor, order: torch.Tensor | None, dtypes: list[torch.dtype | None]
    ) -> tuple[torch.Tensor | None, ...]:
        """All of them times a factor, in their dtypes, the rows at their indices in the call."""
        factor = factor.float() * self._largest
        if self._hidden is not None:
            self._hidden = _unordered(self._hidden, order)
        return tuple(
            None if grad is None or dtype is None else _scaled(grad, factor, dtype)
            for grad, dtype in zip((self._hidden, self._weight, self._bias), dtypes, strict=True)
        )


def _scaled(values: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """values·factor in a dtype, 0 where the factor is; in place where the dtype is their own."""
    from .triton_kernels import scale_kernel

    out = values if values.dtype == dtype else torch.empty_like(values, dtype=dtype)
    if values.numel() > 0:
        grid = (-(-values.numel() // _SCALE_BLOCK),)
        scale_kernel[grid](values, factor, out, values.numel(), IN_PLACE=out is values, BLOCK=_SCALE_BLOCK)
    return out


def _compared_first(teacher_rows: torch.Tensor, num_rows: int) -> torch.Tensor | None:
    """Indices (N,) of all rows: those that are compared, in order, and then the others. `None` keeps them as they are."""
    if len(teacher_rows) in (0, num_rows):
        return None
    compared = torch.zeros(num_rows, dtype=torch.int8, device=teacher_rows.device).index_fill_(0, teacher_rows, 1)
    return compared.argsort(descending=True, stable=True)


def _ordered(values: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    return values if order is None else values[order]


def _unordered(values: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    return values if order is None else torch.empty_like(values).index_copy_(0, order, values)
