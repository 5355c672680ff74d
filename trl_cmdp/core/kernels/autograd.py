"""One pass over both heads as a differentiable function: log-probabilities, entropy and divergence."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .memory import Workspace, slices
from .projection import Projection
from .tiles import SECOND_BACKWARD, HeadPair, Statistics, policy_gradient
from .triton_heads import TritonHeads


def fused_heads(
    pair: HeadPair,
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_rows: torch.Tensor,
    weights: torch.Tensor,
    token_ids: torch.Tensor | None = None,
) -> tuple[Any, Any, torch.Tensor, torch.Tensor]:
    """
    `log_probs` (N,), `entropy` (N,), `loss` () and `costs` (M,) of [`chunked_policy_divergence`]; without tokens the
    first two are `None`. `teacher_rows` (M,) are the rows that the teacher's hidden states belong to.
    """
    function = TritonHeads if pair.triton else _FusedHeads
    outputs: tuple[Any, Any, torch.Tensor, torch.Tensor] = function.apply(  # type: ignore[no-untyped-call]
        student_hidden,
        pair.student.head.weight,
        pair.student.head.bias,
        teacher_hidden,
        teacher_rows,
        weights.detach(),
        token_ids,
        pair,
        torch.is_grad_enabled(),  # which is off inside
    )
    return outputs


class _FusedHeads(torch.autograd.Function):
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
        num_rows, policy = student_hidden.shape[0], token_ids is not None
        workspace = pair.workspace(num_rows, keep_tiles=len(teacher_rows) > 0)
        weights = weights.to(device=student_hidden.device, dtype=pair.student.dtype)  # (N,)
        costs = weights.new_empty(len(teacher_rows))  # (M,)
        log_probs, entropy, reference, normalizer = (torch.empty_like(weights) for _ in range(4))  # (N,)
        position = teacher_rows.new_full((num_rows,), -1)  # of each row among the teacher's
        position[teacher_rows] = torch.arange(len(teacher_rows), device=position.device)

        compared, weighted = position >= 0, weights != 0
        if not (grad_enabled and any(ctx.needs_input_grad)):
            weighted = torch.zeros_like(weighted)
        gradients = None
        # Autocast would round the products to half precision, which the heads decide for themselves.
        with torch.autocast(student_hidden.device.type, enabled=False):
            for with_teacher, with_grad in ((True, True), (True, False), (False, False)):
                for rows in _batches((compared == with_teacher) & (weighted == with_grad), workspace):
                    statistics = pair.statistics(
                        workspace,
                        student_hidden[rows],
                        teacher_hidden[position[rows]] if with_teacher else None,
                        token_ids[rows] if policy else None,
                        entropy=policy,
                    )
                    reference[rows], normalizer[rows] = statistics.reference, statistics.log_normalizer
                    if statistics.log_probs is not None and statistics.entropy is not None:
                        log_probs[rows], entropy[rows] = statistics.log_probs, statistics.entropy
                    if statistics.compared is not None:
                        costs[position[rows]] = statistics.compared.costs
                        if with_grad:
                            gradients = gradients or Gradients(pair.student, num_rows, ctx.needs_input_grad[:3])
                            grad_logits = pair.gradient(workspace, statistics.compared, weights[rows])
                            gradients.add(rows, statistics.compared.rows, grad_logits)

        if policy:
            ctx.save_for_backward(student_hidden, student_weight, token_ids, reference, normalizer, entropy)
        # Not among the saved tensors, as backward gives them away.
        ctx.gradients, ctx.consumed = gradients, False
        ctx.pair, ctx.num_rows, ctx.policy = pair, num_rows, policy
        ctx.dtypes = [None if x is None else x.dtype for x in (student_hidden, student_weight, student_bias)]
        ctx.mark_non_differentiable(costs)
        teacher_weights = weights[teacher_rows]
        loss = torch.where(teacher_weights != 0, teacher_weights * costs, 0.0).sum()
        return (log_probs, entropy, loss, costs) if policy else (None, None, loss, costs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_log_probs, grad_entropy, grad_loss, _):  # type: ignore[no-untyped-def]
        if ctx.consumed:
            raise RuntimeError(SECOND_BACKWARD)
        gradients, ctx.gradients, ctx.consumed = ctx.gradients, None, True
        if gradients is None:
            gradients = Gradients(ctx.pair.student, ctx.num_rows, ctx.needs_input_grad[:3])
        gradients.scale_(0.0 if grad_loss is None else grad_loss.item())
        if ctx.policy:
            _add_policy_gradient(gradients, ctx.pair, ctx.saved_tensors, grad_log_probs, grad_entropy)
        grads = [
            None if grad is None else grad.to(dtype)
            for grad, dtype in zip((gradients.hidden, gradients.weight, gradients.bias), ctx.dtypes, strict=True)
        ]
        return (*grads, *(None,) * 6)


class Gradients:
    """
    Gradients of the student's hidden states (N, H_s), head weight (V, H_s) and head bias (V,), in the dtype of its sums,
    `None` where not needed.
    """

    def __init__(self, student: Projection, num_rows: int, needed: tuple[bool, bool, bool]):
        weight, dtype = student.head.weight, student.dtype
        shapes = ((num_rows, weight.shape[1]), weight.shape, weight.shape[:1])
        self._student = student
        self.hidden, self.weight, self.bias = (
            torch.zeros(shape, device=weight.device, dtype=dtype) if needs else None
            for shape, needs in zip(shapes, needed, strict=True)
        )

    def add(self, rows: torch.Tensor, hidden: torch.Tensor, grad_logits: Iterator[tuple[slice, torch.Tensor]]) -> None:
        """Adds what follows from the gradient of the head's output, in blocks (v, n), at rows (n,)."""
        wide = hidden.to(self._student.dtype)  # (n, H_s)
        grad_hidden = torch.zeros_like(wide)
        for tokens, grad in grad_logits:
            if self.hidden is not None:
                self._student.accumulate_product(grad, tokens, grad_hidden)
            if self.weight is not None:
                self.weight[tokens].addmm_(grad, wide)
            if self.bias is not None:
                self.bias[tokens].add_(grad.sum(1))
        if self.hidden is not None:
            self.hidden[rows] += grad_hidden

    def scale_(self, factor: float) -> None:
        """Multiplies all of them. What is not asked for is 0, whatever it is."""
        for grad in (self.hidden, self.weight, self.bias):
            if grad is None or factor == 1.0:
                continue
            if factor == 0.0:
                grad.zero_()
            else:
                grad.mul_(factor)


def _add_policy_gradient(
    gradients: Gradients,
    pair: HeadPair,
    saved: tuple[torch.Tensor, ...],
    grad_log_probs: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
) -> None:
    """Adds the gradient of log-probabilities and entropies, projecting once more the rows that have any."""
    # The weight is among them so that a change of it since the forward pass is an error; `pair` has it.
    hidden, _, token_ids, reference, normalizer, entropy = saved
    of_log_probs, of_entropy = (
        None if grad is None else grad.to(normalizer.dtype) for grad in (grad_log_probs, grad_entropy)
    )
    if of_log_probs is None:
        of_log_probs = torch.zeros_like(normalizer)
    needed = of_log_probs != 0 if of_entropy is None else (of_log_probs != 0) | (of_entropy != 0)
    workspace = pair.workspace(len(normalizer), keep_tiles=False)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in _batches(needed, workspace):
            rows_hidden = pair.student.rows(hidden[rows])
            grad_logits = policy_gradient(
                pair.student,
                workspace,
                rows_hidden,
                token_ids[rows],
                Statistics(reference[rows], normalizer[rows], None, entropy[rows], None),
                of_log_probs[rows],
                None if of_entropy is None else of_entropy[rows],
            )
            gradients.add(rows, rows_hidden, grad_logits)


def _batches(chosen: torch.Tensor, workspace: Workspace) -> Iterator[torch.Tensor]:
    """Indices (n,) of the chosen rows (N,), as many at a time as the workspace holds."""
    rows = chosen.nonzero().squeeze(-1)
    return (rows[part] for part in slices(0, len(rows), workspace.num_rows))
