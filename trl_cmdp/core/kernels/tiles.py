"""Rows projected by both heads: what their vocabularies say of them, and from that the gradient."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..comparison import Comparison
from ..head import Head
from .choice import kernel_of
from .measures import block_costs, block_gradient, gradient_factor, with_prob_floor, zero_where_impossible_
from .memory import Blocks, Workspace, default_memory_mb
from .projection import Projection, accumulation_dtype, compute_dtype
from .softmax import OnlineSoftmax, add_at_tokens_


SECOND_BACKWARD = (
    "Trying to backward through the graph a second time: the gradients that the forward pass formed are handed over, also "
    "where the graph is retained. Run the forward pass again."
)


class Tile(NamedTuple):
    """Logits `(V, n)` relative to a reference `(n,)`, kept with their log-normaliser `(n,)`."""

    logits: torch.Tensor
    reference: torch.Tensor
    log_normalizer: torch.Tensor


@dataclass(frozen=True)
class Compared:
    """
    What both models say of n rows on the tokens that their vocabularies share. The divergence's gradient takes this and
    nothing else. The tiles are valid until the next statistics in the same workspace.
    """

    rows: torch.Tensor  # the student's hidden states (n, H_s), as the product takes them
    student: Tile
    teacher: Tile
    teacher_log_probs: torch.Tensor | None  # (n,), of the chosen tokens
    costs: torch.Tensor  # (n,)
    centre: torch.Tensor  # (n,), what the divergence's gradient is taken about


@dataclass(frozen=True)
class Statistics:
    """What the student says of n rows, `(n,)` each, over its whole vocabulary, and what the comparison says of them."""

    reference: torch.Tensor  # of the log-normaliser
    log_normalizer: torch.Tensor
    log_probs: torch.Tensor | None  # of the chosen tokens
    entropy: torch.Tensor | None
    compared: Compared | None


@dataclass(frozen=True)
class HeadPair:
    """
    Both heads as they are projected, and what is compared. The vocabularies share their first tokens; the student's may
    be the longer one.
    """

    student: Projection
    teacher: Projection
    comparison: Comparison
    triton: bool  # whether the Triton kernels take it

    @property
    def vocab_size(self) -> int:
        """Number of tokens that both vocabularies have."""
        return min(self.student.head.vocab_size, self.teacher.head.vocab_size)

    def workspace(self, num_rows: int, keep_tiles: bool) -> Workspace:
        """Memory for tiles of the student's vocabulary."""
        student, weight = self.student, self.student.head.weight
        return Workspace(num_rows, weight.shape[0], keep_tiles, weight.device, student.dtype, student.memory_mb)

    def statistics(
        self,
        workspace: Workspace,
        hidden: torch.Tensor,
        teacher_hidden: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
        *,
        entropy: bool = False,
    ) -> Statistics:
        """
        First step: project the rows (n, H_s), once by the student and, where they are compared, once by the teacher
        (n, H_t). `token_ids` (n,) and `entropy` ask for log-probabilities and entropies.
        """
        chosen = None if token_ids is None else token_ids.unsqueeze(0)  # (1, n)
        rows, softmax = self.student.rows(hidden), OnlineSoftmax(chosen, entropy)
        logits = None if teacher_hidden is None else workspace.student_tile(self.vocab_size, len(hidden))
        softmax.add_vocabulary(self.student, rows, workspace, 0, self.vocab_size, logits)
        compared = None
        if teacher_hidden is not None and logits is not None:
            student = Tile(logits, softmax.reference, softmax.log_normalizer)
            compared = self._compare(workspace, rows, student, teacher_hidden, chosen)
        softmax.add_vocabulary(self.student, rows, workspace, self.vocab_size, self.student.head.vocab_size)
        return Statistics(
            softmax.reference,
            softmax.log_normalizer,
            None if chosen is None else softmax.log_probs[0],
            softmax.entropy if entropy else None,
            compared,
        )

    def _compare(
        self,
        workspace: Workspace,
        rows: torch.Tensor,
        student: Tile,
        teacher_hidden: torch.Tensor,
        token_ids: torch.Tensor | None,
    ) -> Compared:
        softmax, logits = OnlineSoftmax(token_ids), workspace.teacher_tile(self.vocab_size, len(rows))
        teacher_rows = self.teacher.rows(teacher_hidden)
        softmax.add_vocabulary(self.teacher, teacher_rows, workspace, 0, self.vocab_size, logits)
        teacher = Tile(logits, softmax.reference, softmax.log_normalizer)
        log_probs = None
        if token_ids is not None:
            log_probs = with_prob_floor(softmax.log_probs[0], self.comparison.teacher_prob_floor, self.vocab_size)
        costs, centre = torch.zeros_like(student.reference), torch.zeros_like(student.reference)
        for tokens in workspace.vocabulary(0, self.vocab_size):
            cost, part = block_costs(self.comparison, *self._log_probs(workspace, student, teacher, tokens))
            costs += cost
            centre += part
        # An impossible token counts nothing, but a row that has no distribution must not look as if it had one.
        costs.masked_fill_(student.log_normalizer.isnan() | teacher.log_normalizer.isnan(), torch.nan)
        return Compared(rows, student, teacher, log_probs, costs, centre)

    def gradient(
        self, workspace: Workspace, compared: Compared, weights: torch.Tensor
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Second step: gradient of Σ weights·costs, (n,), by the output of the student's head, in blocks (v, n)."""
        factor = weights * (self.student.slope * gradient_factor(self.comparison))
        factor = factor.masked_fill_(compared.costs.isnan(), torch.nan)
        for tokens in workspace.vocabulary(0, self.vocab_size):
            blocks = self._log_probs(workspace, compared.student, compared.teacher, tokens)
            grad = block_gradient(self.comparison, blocks.student, blocks.teacher, compared.centre).mul_(factor)
            if self.student.head.softcap is not None:
                logits = torch.add(compared.student.logits[tokens], compared.student.reference, out=blocks.gap)
                grad.mul_(self.student.softcap_slope_(logits))
            yield tokens, grad

    def _log_probs(self, workspace: Workspace, student: Tile, teacher: Tile, tokens: slice) -> Blocks:
        """Blocks of which the student's and the teacher's hold log π and log μ over the shared tokens."""
        blocks = workspace.blocks(tokens, student.logits.shape[1])
        for tile, block in ((student, blocks.student), (teacher, blocks.teacher)):
            torch.sub(tile.logits[tokens], tile.log_normalizer, out=block)
        with_prob_floor(blocks.teacher, self.comparison.teacher_prob_floor, self.vocab_size, out=blocks.teacher)
        return blocks


def policy_gradient(
    student: Projection,
    workspace: Workspace,
    rows: torch.Tensor,
    token_ids: torch.Tensor,
    statistics: Statistics,
    grad_log_probs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """
    Gradient of Σ grad_log_probs·log_probs + Σ grad_entropy·entropy, (n,) each, by the output of the student's head, in
    blocks (v, n), from a projection of the rows: dlog π(a)/dz = 1{a} − π and dH/dz = −π·(log π + H).
    """
    softcap = student.head.softcap
    # Zeroing what is impossible must not hide a row that has no distribution.
    grad_log_probs = (student.slope * grad_log_probs).masked_fill_(statistics.log_normalizer.isnan(), torch.nan)
    for tokens in workspace.vocabulary(0, student.head.vocab_size):
        blocks = workspace.blocks(tokens, len(rows))
        logits = student.project(rows, tokens, blocks.student)
        if softcap is not None:
            softcap_slope = student.softcap_slope_(blocks.spare.copy_(logits))
        logps = logits.sub_(statistics.reference).sub_(statistics.log_normalizer)
        probs = torch.exp(logps, out=blocks.gap)
        if grad_entropy is None or statistics.entropy is None:
            grad = probs.mul_(-grad_log_probs)
        else:
            grad = logps.add_(statistics.entropy).mul_(-student.slope * grad_entropy).sub_(grad_log_probs).mul_(probs)
            zero_where_impossible_(grad)
        add_at_tokens_(grad, token_ids.unsqueeze(0), tokens, grad_log_probs)
        if softcap is not None:
            grad.mul_(softcap_slope)
        yield tokens, grad


def make_pair(
    student_hidden: torch.Tensor,
    student_head: Head,
    teacher_hidden: torch.Tensor,
    teacher_head: Head,
    comparison: Comparison,
    memory_mb: float | None,
) -> HeadPair:
    """Both heads with what their inputs settle: dtypes, autocast's among them, and memory."""
    dtype = accumulation_dtype(student_hidden, teacher_hidden)
    if memory_mb is None:
        memory_mb = default_memory_mb(student_hidden.device)
    student, teacher = (
        Projection(head, comparison.temperature, compute_dtype(hidden), dtype, memory_mb)
        for head, hidden in ((student_head, student_hidden), (teacher_head, teacher_hidden))
    )
    triton = kernel_of(student_hidden.device) == "triton" and dtype == torch.float32
    return HeadPair(student, teacher, comparison, triton)
