"""Rows projected by both heads, their divergence, and its gradient."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ._head import Head, OnlineSoftmax, Workspace, accumulation_dtype, add_at_tokens_, compute_dtype
from ._measures import Measure, check_divergence, with_prob_floor


@dataclass(frozen=True)
class Heads:
    """
    Student's and teacher's head, what is compared, and whether the student's head is trained.

    The vocabularies share their first tokens; the student's may be the longer one.
    """

    student: Head
    teacher: Head
    measure: Measure
    needs_hidden: bool = False
    needs_weight: bool = False
    needs_bias: bool = False

    @property
    def needs_grad(self) -> bool:
        return self.needs_hidden or self.needs_weight or self.needs_bias

    @property
    def vocab_size(self) -> int:
        return min(self.student.weight.shape[0], self.teacher.weight.shape[0])

    def workspace(self, num_rows: int, num_tiles: int) -> Workspace:
        """Memory for tiles of the student's vocabulary."""
        weight = self.student.weight
        return Workspace(
            num_rows,
            weight.shape[0],
            num_tiles,
            weight.device,
            self.student.accumulation,
            self.student.memory_mb,
        )


class Tile:
    """
    Some rows, projected once by the student and, where there are teacher rows, once by the teacher.

    Args:
        heads ([`Heads`]):
            Both heads.
        workspace ([`Workspace`]):
            Memory. The tile is valid until the next one is made in it.
        hidden (`torch.Tensor`):
            Student's hidden states, of shape `(n, H_s)`.
        teacher_hidden (`torch.Tensor`, *optional*):
            Teacher's hidden states, of shape `(n, H_t)`.
        token_ids (`torch.Tensor`, *optional*):
            Tokens whose log-probabilities are wanted, of shape `(n,)`.
        entropy (`bool`, *optional*, defaults to `False`):
            Whether the student's entropy is wanted.
        keep (`bool`, *optional*, defaults to `True`):
            Keep the student's logits, for [`~Tile.costs`] and [`~Tile.gradient`].
    """

    def __init__(
        self,
        heads: Heads,
        workspace: Workspace,
        hidden: torch.Tensor,
        teacher_hidden: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
        entropy: bool = False,
        keep: bool = True,
    ):
        self._heads, self._workspace, self._num_rows = heads, workspace, hidden.shape[0]
        self._token_ids = None if token_ids is None else token_ids.unsqueeze(0)  # (1, n)
        self.hidden = heads.student.rows(hidden)
        vocab, student_vocab = heads.vocab_size, heads.student.weight.shape[0]

        self.student = OnlineSoftmax(self._token_ids, entropy)
        self._logits = workspace.tile(0, student_vocab, self._num_rows) if keep else None
        self.student.add_vocabulary(heads.student, self.hidden, workspace, 0, vocab, self._logits)
        self._shared_normalizer = self.student.log_normalizer
        self.student.add_vocabulary(heads.student, self.hidden, workspace, vocab, student_vocab, self._logits)
        self._normalizer = self.student.log_normalizer

        self._teacher_logits = None
        if teacher_hidden is not None:
            self.teacher = OnlineSoftmax(self._token_ids)
            self._teacher_logits = workspace.tile(1, vocab, self._num_rows)
            rows = heads.teacher.rows(teacher_hidden)
            self.teacher.add_vocabulary(heads.teacher, rows, workspace, 0, vocab, self._teacher_logits)
            self._teacher_normalizer = self.teacher.log_normalizer

    def costs(self) -> torch.Tensor:
        """The divergence of each row, (n,), in nats."""
        costs, self._centre = torch.zeros_like(self._normalizer), torch.zeros_like(self._normalizer)
        for tokens in self._workspace.vocabulary(0, self._heads.vocab_size):
            spare = self._block(2, tokens), self._block(3, tokens)
            cost, centre = self._heads.measure.costs(*self._shared_logps(tokens), *spare)
            costs += cost
            self._centre += centre
        # An impossible token counts nothing, but a row that has no distribution must not look as if it had one.
        self._undefined = self._shared_normalizer.isnan() | self._teacher_normalizer.isnan()
        return costs.masked_fill_(self._undefined, torch.nan)

    def gradient(
        self, weights: torch.Tensor | None, log_prob_grad: torch.Tensor | None
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """
        Gradient of Σ weights·costs + Σ log_prob_grad·log_probs, (n,) both, by the head's output, in blocks (v, n). The
        first part needs [`~Tile.costs`] to have run.
        """
        heads, slope = self._heads, self._heads.student.slope
        if weights is not None:
            factor = weights * (slope * heads.measure.coefficient)
            factor = factor.masked_fill_(self._undefined, torch.nan)
            share = (self._shared_normalizer - self._normalizer).exp_()  # of π on the shared tokens
        if log_prob_grad is not None:
            log_prob_grad = slope * log_prob_grad
        for tokens in self._vocabulary():
            logits = self._kept(tokens)
            if weights is not None and tokens.stop <= heads.vocab_size:
                grad, probs = heads.measure.gradient(*self._shared_logps(tokens), self._centre)
                grad.mul_(factor)
                if log_prob_grad is not None:
                    grad.addcmul_(probs, log_prob_grad * share, value=-1.0)
            elif log_prob_grad is not None:
                grad = torch.sub(logits, self._normalizer, out=self._block(0, tokens)).exp_().mul_(-log_prob_grad)
            else:  # padding of the vocabulary
                continue
            if log_prob_grad is not None and self._token_ids is not None:
                add_at_tokens_(grad, self._token_ids, tokens, log_prob_grad)
            if heads.student.softcap is not None:
                logits = torch.add(logits, self.student.reference, out=self._block(2, tokens))
                grad.mul_(heads.student.softcap_slope_(logits))
            yield tokens, grad

    def _shared_logps(self, tokens: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities log π and log μ over the shared tokens, (v, n), in the first two blocks."""
        assert self._teacher_logits is not None
        logps = torch.sub(self._kept(tokens), self._shared_normalizer, out=self._block(0, tokens))
        teacher_logps = torch.sub(self._teacher_logits[tokens], self._teacher_normalizer, out=self._block(1, tokens))
        measure, vocab = self._heads.measure, self._heads.vocab_size
        return logps, with_prob_floor(teacher_logps, measure.teacher_prob_floor, vocab, out=teacher_logps)

    def _vocabulary(self) -> Iterator[slice]:
        """The student's vocabulary in blocks, of which none crosses the end of the teacher's."""
        vocab, student_vocab = self._heads.vocab_size, self._heads.student.weight.shape[0]
        yield from self._workspace.vocabulary(0, vocab)
        yield from self._workspace.vocabulary(vocab, student_vocab)

    def _kept(self, tokens: slice) -> torch.Tensor:
        assert self._logits is not None
        return self._logits[tokens]

    def _block(self, index: int, tokens: slice) -> torch.Tensor:
        return self._workspace.block(index, tokens, self._num_rows)


class Gradients:
    """
    Gradients of the student's hidden states (N, H_s), head weight (V, H_s) and head bias (V,), in the accumulation
    dtype, `None` where not needed.
    """

    def __init__(self, heads: Heads, num_rows: int):
        weight, dtype = heads.student.weight, heads.student.accumulation

        def zeros(needed: bool, *shape: int) -> torch.Tensor | None:
            return torch.zeros(shape, device=weight.device, dtype=dtype) if needed else None

        self._head = heads.student
        self.hidden = zeros(heads.needs_hidden, num_rows, weight.shape[1])
        self.weight = zeros(heads.needs_weight, *weight.shape)
        self.bias = zeros(heads.needs_bias, weight.shape[0])

    def add(self, rows: torch.Tensor, hidden: torch.Tensor, grad_logits: Iterator[tuple[slice, torch.Tensor]]) -> None:
        """Adds what follows from the gradient of the head's output, in blocks (v, n), at rows (n,)."""
        wide = hidden.to(self._head.accumulation)  # (n, H_s)
        grad_hidden = torch.zeros_like(wide)
        for tokens, grad in grad_logits:
            if self.hidden is not None:
                self._head.accumulate_product(grad, tokens, grad_hidden)
            if self.weight is not None:
                self.weight[tokens].addmm_(grad, wide)
            if self.bias is not None:
                self.bias[tokens].add_(grad.sum(1))
        if self.hidden is not None:
            self.hidden[rows] += grad_hidden

    def scale_(self, factor: float) -> None:
        for grad in (self.hidden, self.weight, self.bias):
            if grad is None or factor == 1.0:
                continue
            if factor == 0.0:
                grad.zero_()  # what is not asked for is 0, whatever it is
            else:
                grad.mul_(factor)


def make_heads(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    student_bias: torch.Tensor | None,
    student_scale: float,
    student_softcap: float | None,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    teacher_bias: torch.Tensor | None,
    teacher_scale: float,
    teacher_softcap: float | None,
    beta: float,
    temperature: float,
    teacher_prob_floor: float,
    cross_entropy: bool,
    memory_mb: float,
) -> Heads:
    """Both heads, from arguments that are checked here. What needs a gradient is settled outside of `forward`."""
    check_divergence(beta, temperature, teacher_prob_floor)
    dtype = accumulation_dtype(student_hidden, teacher_hidden)
    rounding = compute_dtype(student_hidden), compute_dtype(teacher_hidden)
    return Heads(
        Head(student_weight, student_bias, student_scale, student_softcap, temperature, rounding[0], dtype, memory_mb),
        Head(teacher_weight, teacher_bias, teacher_scale, teacher_softcap, temperature, rounding[1], dtype, memory_mb),
        Measure(beta, teacher_prob_floor, cross_entropy),
        *(
            torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
            for tensor in (student_hidden, student_weight, student_bias)
        ),
    )
