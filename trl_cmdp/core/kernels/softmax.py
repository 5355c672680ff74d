"""The softmax over a vocabulary, from one block of logits after the other."""

import math

import torch

from .measures import zero_where_impossible_
from .memory import Workspace
from .projection import Projection


class OnlineSoftmax:
    """
    Log-normaliser, logits of chosen tokens and entropy of n rows (the online softmax, 1805.02867). The logits are left
    relative to the maximum of their row's first block: the normaliser of large logits would carry their rounding error
    into every entry.
    """

    def __init__(self, token_ids: torch.Tensor | None = None, entropy: bool = False):  # tokens (k, n)
        self._token_ids, self._with_entropy = token_ids, entropy
        self.reference: torch.Tensor  # (n,), what the logits are relative to
        self._maximum: torch.Tensor  # (n,)
        self._total: torch.Tensor  # (n,), Σ exp(z − maximum)
        self._moment: torch.Tensor  # (n,), Σ (z − maximum)·exp(z − maximum)
        self._chosen: torch.Tensor  # (k, n)

    def add_vocabulary(
        self,
        projection: Projection,
        rows: torch.Tensor,
        workspace: Workspace,
        start: int,
        stop: int,
        tile: torch.Tensor | None = None,
    ) -> None:
        """Projects the rows on the vocabulary from `start` to `stop`, into the tile (V, n) if it is to be kept."""
        for tokens in workspace.vocabulary(start, stop):
            block = workspace.blocks(tokens, rows.shape[0]).student if tile is None else tile[tokens]
            self._add(projection.project(rows, tokens, block), tokens, workspace)

    def _add(self, logits: torch.Tensor, tokens: slice, workspace: Workspace) -> None:
        """Takes a block of logits, (v, n), and makes it relative in place."""
        if tokens.start == 0:
            self._start(logits)
        logits.sub_(self.reference)
        maximum = torch.maximum(self._maximum, logits.amax(0))  # (n,)
        step = self._maximum - maximum
        blocks = workspace.blocks(tokens, logits.shape[1])
        shifted = torch.sub(logits, maximum, out=blocks.gap)  # (v, n)
        if self._with_entropy:
            probs = torch.exp(shifted, out=blocks.spare)
            moment = zero_where_impossible_(shifted.mul_(probs)).sum(0)
            self._moment.add_(step * self._total).mul_(step.exp()).add_(moment)
        else:
            probs = shifted.exp_()
        self._total.mul_(step.exp()).add_(probs.sum(0))
        self._maximum = maximum
        if self._token_ids is not None:
            local, inside = _local_tokens(self._token_ids, tokens)
            self._chosen = torch.where(inside, logits.gather(0, local), self._chosen)

    def _start(self, logits: torch.Tensor) -> None:
        reference = logits.amax(0)
        self.reference = reference.masked_fill_(reference == -math.inf, 0.0)
        self._maximum = torch.full_like(reference, torch.finfo(logits.dtype).min)
        self._total, self._moment = torch.zeros_like(reference), torch.zeros_like(reference)
        if self._token_ids is not None:
            self._chosen = logits.new_full(self._token_ids.shape, math.nan)

    @property
    def log_normalizer(self) -> torch.Tensor:
        """log Σ exp of the relative logits so far, (n,)."""
        return self._maximum + self._total.log()

    @property
    def log_probs(self) -> torch.Tensor:
        """Log-probabilities of the chosen tokens, (k, n)."""
        return self._chosen - self.log_normalizer

    @property
    def entropy(self) -> torch.Tensor:
        """Entropy, (n,), in nats."""
        return self._total.log() - self._moment / self._total


def add_at_tokens_(block: torch.Tensor, token_ids: torch.Tensor, tokens: slice, values: torch.Tensor) -> None:
    """Adds values (n,) to a block (v, n) where the tokens (1, n) lie in it."""
    local, inside = _local_tokens(token_ids, tokens)
    block.scatter_add_(0, local, torch.where(inside, values, 0.0))


def _local_tokens(token_ids: torch.Tensor, tokens: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of tokens in a block, clamped to it, and whether they lie inside."""
    inside = (token_ids >= tokens.start) & (token_ids < tokens.stop)
    return (token_ids - tokens.start).clamp_(0, tokens.stop - tokens.start - 1), inside
