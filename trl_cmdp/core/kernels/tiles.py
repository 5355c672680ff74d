"""Rows projected by both heads: what their vocabularies say of them, and from that the gradient."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..comparison import Comparison
from ..head import Head
from .measures import block_costs, block_gradient, gradient_factor, with_prob_floor
from .memory import Workspace, default_memory_mb
from .projection import Projection, accumulation_dtype, compute_dtype
from .softmax import OnlineSoftmax, add_at_tokens_


@dataclass(frozen=True)
class TeacherStatistics:
    """
    What the teacher says of n rows, `(n,)` each, and its logits `(V, n)`, on the tokens that both vocabularies share.
    `centre` is what the divergence's gradient is taken about.
    """

    logits: torch.Tensor
    log_normalizer: torch.Tensor
    log_probs: torch.Tensor | None  # of the chosen tokens
    costs: torch.Tensor
    centre: torch.Tensor


@dataclass(frozen=True)
class Statistics:
    """
    What the student says of n rows, `(n,)` each, and its logits `(V_s, n)`, where they are kept: relative to
    `reference`, and valid until the next statistics in the same workspace. A gradient takes nothing else.
    """

    rows: torch.Tensor  # hidden states (n, H_s), as the product takes them
    logits: torch.Tensor | None
    reference: torch.Tensor
    log_normalizer: torch.Tensor
    shared_log_normalizer: torch.Tensor  # over the tokens that both vocabularies share
    token_ids: torch.Tensor | None  # (1, n), the chosen tokens
    log_probs: torch.Tensor | None  # of the chosen tokens
    entropy: torch.Tensor | None
    teacher: TeacherStatistics | None


@dataclass(frozen=True)
class HeadPair:
    """
    Both heads as they are projected, and what is compared. The vocabularies share their first tokens; the student's may
    be the longer one.
    """

    student: Projection
    teacher: Projection
    comparison: Comparison

    @property
    def vocab_size(self) -> int:
        """Number of tokens that both vocabularies have."""
        return min(self.student.head.vocab_size, self.teacher.head.vocab_size)

    def workspace(self, num_rows: int, num_tiles: int) -> Workspace:
        """Memory for tiles of the student's vocabulary."""
        student, weight = self.student, self.student.head.weight
        return Workspace(num_rows, weight.shape[0], num_tiles, weight.device, student.dtype, student.memory_mb)

    def statistics(
        self,
        workspace: Workspace,
        hidden: torch.Tensor,
        teacher_hidden: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
        *,
        entropy: bool = False,
        keep: bool = True,
    ) -> Statistics:
        """
        First step: project the rows, once by the student and, where there are teacher rows, once by the teacher.

        Args:
            workspace ([`Workspace`]):
                Memory.
            hidden (`torch.Tensor`):
                Student's hidden states, of shape `(n, H_s)`.
            teacher_hidden (`torch.Tensor`, *optional*):
                Teacher's hidden states, of shape `(n, H_t)`.
            token_ids (`torch.Tensor`, *optional*):
                Tokens whose log-probabilities are wanted, of shape `(n,)`.
            entropy (`bool`, *optional*, defaults to `False`):
                Whether the student's entropy is wanted.
            keep (`bool`, *optional*, defaults to `True`):
                Keep the student's logits, which costs and gradient need.

        Returns:
            [`Statistics`]: Of the rows.
        """
        num_rows, student_vocab = len(hidden), self.student.head.vocab_size
        chosen = None if token_ids is None else token_ids.unsqueeze(0)  # (1, n)
        rows = self.student.rows(hidden)
        softmax = OnlineSoftmax(chosen, entropy)
        logits = workspace.student_tile(student_vocab, num_rows) if keep else None
        softmax.add_vocabulary(self.student, rows, workspace, 0, self.vocab_size, logits)
        shared = softmax.log_normalizer
        softmax.add_vocabulary(self.student, rows, workspace, self.vocab_size, student_vocab, logits)
        return Statistics(
            rows,
            logits,
            softmax.reference,
            softmax.log_normalizer,
            shared,
            chosen,
            None if chosen is None else softmax.log_probs[0],
            softmax.entropy if entropy else None,
            None if teacher_hidden is None else self._compare(workspace, logits, shared, teacher_hidden, chosen),
        )

    def _compare(
        self,
        workspace: Workspace,
        logits: torch.Tensor | None,
        log_normalizer: torch.Tensor,
        teacher_hidden: torch.Tensor,
        token_ids: torch.Tensor | None,
    ) -> TeacherStatistics:
        assert logits is not None
        softmax = OnlineSoftmax(token_ids)
        teacher_logits = workspace.teacher_tile(self.vocab_size, len(teacher_hidden))
        rows = self.teacher.rows(teacher_hidden)
        softmax.add_vocabulary(self.teacher, rows, workspace, 0, self.vocab_size, teacher_logits)
        student, teacher = (logits, log_normalizer), (teacher_logits, softmax.log_normalizer)
        costs, centre = torch.zeros_like(log_normalizer), torch.zeros_like(log_normalizer)
        for tokens in workspace.vocabulary(0, self.vocab_size):
            blocks = workspace.blocks(tokens, len(teacher_hidden))
            logps, teacher_logps = self._shared_logps(tokens, student, teacher, (blocks.student, blocks.teacher))
            cost, centre_part = block_costs(self.comparison, logps, teacher_logps, blocks.gap, blocks.spare)
            costs += cost
            centre += centre_part
        # An impossible token counts nothing, but a row that has no distribution must not look as if it had one.
        costs.masked_fill_(log_normalizer.isnan() | softmax.log_normalizer.isnan(), torch.nan)
        log_probs = None
        if token_ids is not None:
            log_probs = with_prob_floor(softmax.log_probs[0], self.comparison.teacher_prob_floor, self.vocab_size)
        return TeacherStatistics(teacher_logits, softmax.log_normalizer, log_probs, costs, centre)

    def gradient(
        self,
        workspace: Workspace,
        statistics: Statistics,
        weights: torch.Tensor | None,
        log_prob_grad: torch.Tensor | None,
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """
        Second step: gradient of Σ weights·costs + Σ log_prob_grad·log_probs, (n,) both, by the output of the student's
        head, in blocks (v, n).
        """
        num_rows, slope, teacher = len(statistics.rows), self.student.slope, statistics.teacher
        assert statistics.logits is not None
        if weights is not None and teacher is not None:
            factor = weights * (slope * gradient_factor(self.comparison))
            factor = factor.masked_fill_(teacher.costs.isnan(), torch.nan)
            share = (statistics.shared_log_normalizer - statistics.log_normalizer).exp_()  # of π on the shared tokens
            shared = statistics.logits, statistics.shared_log_normalizer
            of_teacher = teacher.logits, teacher.log_normalizer
        if log_prob_grad is not None:
            log_prob_grad = slope * log_prob_grad
        for tokens in self._vocabulary(workspace):
            logits, blocks = statistics.logits[tokens], workspace.blocks(tokens, num_rows)
            if weights is not None and teacher is not None and tokens.stop <= self.vocab_size:
                logps = self._shared_logps(tokens, shared, of_teacher, (blocks.student, blocks.teacher))
                grad, probs = block_gradient(self.comparison, *logps, teacher.centre)
                grad.mul_(factor)
                if log_prob_grad is not None:
                    grad.addcmul_(probs, log_prob_grad * share, value=-1.0)
            elif log_prob_grad is not None:
                grad = torch.sub(logits, statistics.log_normalizer, out=blocks.student).exp_().mul_(-log_prob_grad)
            else:  # padding of the vocabulary
                continue
            if log_prob_grad is not None and statistics.token_ids is not None:
                add_at_tokens_(grad, statistics.token_ids, tokens, log_prob_grad)
            if self.student.head.softcap is not None:
                capped = torch.add(logits, statistics.reference, out=blocks.gap)
                grad.mul_(self.student.softcap_slope_(capped))
            yield tokens, grad

    def _shared_logps(
        self,
        tokens: slice,
        student: tuple[torch.Tensor, torch.Tensor],
        teacher: tuple[torch.Tensor, torch.Tensor],
        out: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities log π and log μ over the shared tokens, (v, n), from logits and log-normalisers."""
        logps, teacher_logps = (
            torch.sub(logits[tokens], log_normalizer, out=block)
            for (logits, log_normalizer), block in zip((student, teacher), out, strict=True)
        )
        floor = self.comparison.teacher_prob_floor
        return logps, with_prob_floor(teacher_logps, floor, self.vocab_size, out=teacher_logps)

    def _vocabulary(self, workspace: Workspace) -> Iterator[slice]:
        """The student's vocabulary in blocks, of which none crosses the end of the teacher's."""
        yield from workspace.vocabulary(0, self.vocab_size)
        yield from workspace.vocabulary(self.vocab_size, self.student.head.vocab_size)


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
    return HeadPair(student, teacher, comparison)
