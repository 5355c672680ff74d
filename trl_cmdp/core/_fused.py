"""One pass over both heads: log-probabilities, entropy, divergence, and the gradient of what is known of the loss."""

from collections.abc import Iterator

import torch
from torch.autograd.function import once_differentiable

from ._head import Head, Workspace, add_at_tokens_, zero_where_impossible_
from ._tiles import Gradients, Heads, Tile


# Coefficients that differ by no more than this many roundings are the same.
_ROUNDINGS = 8


class FusedHeads(torch.autograd.Function):
    """
    `log_probs` (N,), `entropy` (N,), `loss` () and `costs` (M,) of [`chunked_policy_divergence`]; without tokens the
    last two alone. `teacher_rows` (M,) are the rows that the teacher's hidden states belong to.
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
        log_prob_grad,
        heads: Heads,
    ):
        ctx.set_materialize_grads(False)
        num_rows, policy = student_hidden.shape[0], token_ids is not None
        workspace = heads.workspace(num_rows, 2 if len(teacher_rows) else int(log_prob_grad is not None))

        weights = weights.to(device=student_hidden.device, dtype=heads.student.accumulation)  # (N,)
        log_prob_grad = None if log_prob_grad is None else log_prob_grad.to(weights)  # (N,)
        costs = weights.new_empty(len(teacher_rows))  # (M,)
        log_probs, entropy, reference, normalizer = (torch.empty_like(weights) for _ in range(4))  # (N,)
        position = teacher_rows.new_full((num_rows,), -1)  # of each row among the teacher's
        position[teacher_rows] = torch.arange(len(teacher_rows), device=position.device)
        has_grad = weights != 0 if log_prob_grad is None else (weights != 0) | (log_prob_grad != 0)
        if not heads.needs_grad:
            has_grad = torch.zeros_like(has_grad)

        gradients = None
        # Autocast would round the products to half precision, which the heads decide for themselves.
        with torch.autocast(student_hidden.device.type, enabled=False):
            for with_teacher, with_grad in ((True, True), (True, False), (False, True), (False, False)):
                for rows in _batches((position >= 0) == with_teacher, has_grad == with_grad, workspace=workspace):
                    tile = Tile(
                        heads,
                        workspace,
                        student_hidden[rows],
                        teacher_hidden[position[rows]] if with_teacher else None,
                        token_ids[rows] if policy else None,
                        entropy=policy,
                        keep=with_teacher or with_grad,
                    )
                    if policy:
                        log_probs[rows], entropy[rows] = tile.student.log_probs[0], tile.student.entropy
                        reference[rows], normalizer[rows] = tile.student.reference, tile.student.log_normalizer
                    if with_teacher:
                        costs[position[rows]] = tile.costs()
                    if with_grad:
                        gradients = gradients or Gradients(heads, num_rows)
                        grad_logits = tile.gradient(
                            weights[rows] if with_teacher else None,
                            None if log_prob_grad is None else log_prob_grad[rows],
                        )
                        gradients.add(rows, tile.hidden, grad_logits)

        if policy:
            ctx.save_for_backward(
                student_hidden, student_weight, token_ids, log_prob_grad, reference, normalizer, entropy
            )
        # Not among the saved tensors, as backward gives them away.
        ctx.gradients, ctx.consumed = gradients, False
        ctx.heads, ctx.num_rows, ctx.policy = heads, num_rows, policy
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
            gradients = Gradients(ctx.heads, ctx.num_rows)
        gradients.scale_(factor)
        if ctx.policy:
            _correct(gradients, ctx.heads, ctx.saved_tensors, factor, grad_log_probs, grad_entropy)
        grads = [
            None if grad is None else grad.to(dtype)
            for grad, dtype in zip((gradients.hidden, gradients.weight, gradients.bias), ctx.dtypes, strict=True)
        ]
        return (*grads, *(None,) * 6)


def _correct(
    gradients: Gradients,
    heads: Heads,
    saved: tuple[torch.Tensor, ...],
    factor: float,
    grad_log_probs: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
) -> None:
    """Adds what log-probabilities and entropies get beyond factor·log_prob_grad, projecting those rows alone."""
    # The weight is among them so that a change of it since the forward pass is an error; `heads` has it.
    hidden, _, token_ids, log_prob_grad, reference, normalizer, entropy = saved
    actual = torch.zeros_like(normalizer) if grad_log_probs is None else grad_log_probs.to(normalizer.dtype)
    expected = torch.zeros_like(actual) if log_prob_grad is None else factor * log_prob_grad
    missing = actual - expected  # (N,)
    rounding = _ROUNDINGS * torch.finfo(actual.dtype).eps * torch.maximum(actual.abs(), expected.abs())
    needed = ~(missing.abs() <= rounding)  # NaN is needed too
    if grad_entropy is not None:
        needed |= grad_entropy != 0
    workspace = heads.workspace(len(actual), 0)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in _batches(needed, workspace=workspace):
            rows_hidden = heads.student.rows(hidden[rows])
            grad_logits = _policy_gradient(
                heads.student,
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
    head: Head,
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
    grad_log_probs = head.slope * grad_log_probs
    for tokens in workspace.vocabulary(0, head.weight.shape[0]):
        logits, probs, spare = (workspace.block(index, tokens, len(hidden)) for index in range(3))
        head.project(hidden, tokens, logits)
        if head.softcap is not None:
            softcap_slope = head.softcap_slope_(spare.copy_(logits))
        logps = logits.sub_(reference).sub_(normalizer)
        torch.exp(logps, out=probs)
        if grad_entropy is None:
            grad = probs.mul_(-grad_log_probs)
        else:
            grad = logps.add_(entropy).mul_(-head.slope * grad_entropy).sub_(grad_log_probs).mul_(probs)
            zero_where_impossible_(grad)
        add_at_tokens_(grad, token_ids, tokens, grad_log_probs)
        if head.softcap is not None:
            grad.mul_(softcap_slope)
        yield tokens, grad


def _batches(*conditions: torch.Tensor, workspace: Workspace) -> Iterator[torch.Tensor]:
    """Indices (n,) of the rows that meet all conditions (N,), as many at a time as the workspace holds."""
    rows = torch.stack(conditions).all(0).nonzero().squeeze(-1)
    return (rows[start : start + workspace.num_rows] for start in range(0, len(rows), workspace.num_rows))
