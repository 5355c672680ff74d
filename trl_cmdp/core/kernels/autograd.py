"""One pass over both heads: log-probabilities, entropy, divergence, and the gradient of what is known of the loss."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .measures import zero_where_impossible_
from .memory import Workspace
from .projection import Projection
from .softmax import add_at_tokens_
from .tiles import HeadPair


# Coefficients that differ by no more than this many roundings are the same.
_ROUNDINGS = 8


def fused_heads(
    pair: HeadPair,
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_rows: torch.Tensor,
    weights: torch.Tensor,
    token_ids: torch.Tensor | None = None,
    log_prob_grad: torch.Tensor | None = None,
) -> tuple[Any, Any, torch.Tensor, torch.Tensor]:
    """
    `log_probs` (N,), `entropy` (N,), `loss` () and `costs` (M,) of [`chunked_policy_divergence`]; without tokens the
    first two are `None`. `teacher_rows` (M,) are the rows that the teacher's hidden states belong to.
    """
    outputs: tuple[Any, Any, torch.Tensor, torch.Tensor] = _FusedHeads.apply(  # type: ignore[no-untyped-call]
        student_hidden,
        pair.student.head.weight,
        pair.student.head.bias,
        teacher_hidden,
        teacher_rows,
        weights.detach(),
        token_ids,
        None if log_prob_grad is None else log_prob_grad.detach(),
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
        log_prob_grad,
        pair: HeadPair,
        grad_enabled: bool,
    ):
        ctx.set_materialize_grads(False)
        num_rows, policy = student_hidden.shape[0], token_ids is not None
        workspace = pair.workspace(num_rows, 2 if len(teacher_rows) else int(log_prob_grad is not None))

        weights = weights.to(device=student_hidden.device, dtype=pair.student.dtype)  # (N,)
        log_prob_grad = None if log_prob_grad is None else log_prob_grad.to(weights)  # (N,)
        costs = weights.new_empty(len(teacher_rows))  # (M,)
        log_probs, entropy, reference, normalizer = (torch.empty_like(weights) for _ in range(4))  # (N,)
        position = teacher_rows.new_full((num_rows,), -1)  # of each row among the teacher's
        position[teacher_rows] = torch.arange(len(teacher_rows), device=position.device)
        has_grad = weights != 0 if log_prob_grad is None else (weights != 0) | (log_prob_grad != 0)
        needs_grad = ctx.needs_input_grad[:3] if grad_enabled else (False, False, False)
        if not any(needs_grad):
            has_grad = torch.zeros_like(has_grad)

        gradients = None
        # Autocast would round the products to half precision, which the heads decide for themselves.
        with torch.autocast(student_hidden.device.type, enabled=False):
            for with_teacher, with_grad in ((True, True), (True, False), (False, True), (False, False)):
                for rows in _batches((position >= 0) == with_teacher, has_grad == with_grad, workspace=workspace):
                    statistics = pair.statistics(
                        workspace,
                        student_hidden[rows],
                        teacher_hidden[position[rows]] if with_teacher else None,
                        token_ids[rows] if policy else None,
                        entropy=policy,
                        keep=with_teacher or with_grad,
                    )
                    if statistics.log_probs is not None and statistics.entropy is not None:
                        log_probs[rows], entropy[rows] = statistics.log_probs, statistics.entropy
                        reference[rows], normalizer[rows] = statistics.reference, statistics.log_normalizer
                    if statistics.teacher is not None:
                        costs[position[rows]] = statistics.teacher.costs
                    if with_grad:
                        gradients = gradients or Gradients(pair.student, num_rows, needs_grad)
                        grad_logits = pair.gradient(
                            workspace,
                            statistics,
                            weights[rows] if with_teacher else None,
                            None if log_prob_grad is None else log_prob_grad[rows],
                        )
                        gradients.add(rows, statistics.rows, grad_logits)

        if policy:
            ctx.save_for_backward(
                student_hidden, student_weight, token_ids, log_prob_grad, reference, normalizer, entropy
            )
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
            raise RuntimeError(
                "Trying to backward through the graph a second time: the gradients that the forward pass formed are "
                "handed over, also where the graph is retained. Run the forward pass again."
            )
        gradients, ctx.gradients, ctx.consumed = ctx.gradients, None, True
        factor = 0.0 if grad_loss is None else grad_loss.item()
        if gradients is None:
            gradients = Gradients(ctx.pair.student, ctx.num_rows, ctx.needs_input_grad[:3])
        gradients.scale_(factor)
        if ctx.policy:
            _correct(gradients, ctx.pair, ctx.saved_tensors, factor, grad_log_probs, grad_entropy)
        grads = [
            None if grad is None else grad.to(dtype)
            for grad, dtype in zip((gradients.hidden, gradients.weight, gradients.bias), ctx.dtypes, strict=True)
        ]
        return (*grads, *(None,) * 7)


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


def _correct(
    gradients: Gradients,
    pair: HeadPair,
    saved: tuple[torch.Tensor, ...],
    factor: float,
    grad_log_probs: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
) -> None:
    """Adds what log-probabilities and entropies get beyond factor·log_prob_grad, projecting those rows alone."""
    # The weight is among them so that a change of it since the forward pass is an error; `pair` has it.
    hidden, _, token_ids, log_prob_grad, reference, normalizer, entropy = saved
    actual = torch.zeros_like(normalizer) if grad_log_probs is None else grad_log_probs.to(normalizer.dtype)
    expected = torch.zeros_like(actual) if log_prob_grad is None else factor * log_prob_grad
    missing = actual - expected  # (N,)
    rounding = _ROUNDINGS * torch.finfo(actual.dtype).eps * torch.maximum(actual.abs(), expected.abs())
    needed = ~(missing.abs() <= rounding)  # NaN is needed too
    if grad_entropy is not None:
        needed |= grad_entropy != 0
    workspace = pair.workspace(len(actual), 0)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in _batches(needed, workspace=workspace):
            rows_hidden = pair.student.rows(hidden[rows])
            grad_logits = _policy_gradient(
                pair.student,
                workspace,
                rows_hidden,
                token_ids[rows].unsqueeze(0),
                reference[rows],
                normalizer[rows],
                entropy[rows],
                missing[rows],
                None if grad_entropy is None else grad_entropy[rows].to(actual.dtype),
            )
            gradients.add(rows, rows_hidden, grad_logits)


def _policy_gradient(
    student: Projection,
    workspace: Workspace,
    hidden: torch.Tensor,
    token_ids: torch.Tensor,
    reference: torch.Tensor,
    normalizer: torch.Tensor,
    entropy: torch.Tensor,
    grad_log_probs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Gradient by the head's output, in blocks (v, n): dlog π(a)/dz = 1{a} − π and dH/dz = −π·(log π + H)."""
    softcap = student.head.softcap
    grad_log_probs = student.slope * grad_log_probs
    for tokens in workspace.vocabulary(0, student.head.vocab_size):
        blocks = workspace.blocks(tokens, len(hidden))
        logits = student.project(hidden, tokens, blocks.student)
        if softcap is not None:
            softcap_slope = student.softcap_slope_(blocks.spare.copy_(logits))
        logps = logits.sub_(reference).sub_(normalizer)
        probs = torch.exp(logps, out=blocks.gap)
        if grad_entropy is None:
            grad = probs.mul_(-grad_log_probs)
        else:
            grad = logps.add_(entropy).mul_(-student.slope * grad_entropy).sub_(grad_log_probs).mul_(probs)
            zero_where_impossible_(grad)
        add_at_tokens_(grad, token_ids, tokens, grad_log_probs)
        if softcap is not None:
            grad.mul_(softcap_slope)
        yield tokens, grad


def _batches(*conditions: torch.Tensor, workspace: Workspace) -> Iterator[torch.Tensor]:
    """Indices (n,) of the rows that meet all conditions (N,), as many at a time as the workspace holds."""
    rows = torch.stack(conditions).all(0).nonzero().squeeze(-1)
    return (rows[start : start + workspace.num_rows] for start in range(0, len(rows), workspace.num_rows))
