"""
Language-model heads in tiles: n rows by the whole vocabulary, worked on in blocks of the vocabulary.

A tile is stored vocabulary first, `(V, n)`: a block of it is contiguous, its product with the head's rows is faster
than the other way round, and what belongs to a row broadcasts from `(n,)`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch


# Elements of a block. On a CPU the few blocks in use at once stay in cache, and the products are still at full speed.
_BLOCK_ELEMENTS = {"cpu": 2**20}
_DEFAULT_BLOCK_ELEMENTS = 2**22
# On a CPU the products of more rows are hardly faster, and the memory is better left alone.
_MAX_ROWS = {"cpu": 128}
_NUM_BLOCKS = 4


def accumulation_dtype(*tensors: torch.Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Dtype whose rounding the projection's inputs take: autocast's where it is on, as in the models' own heads."""
    device_type = hidden.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype


@dataclass(frozen=True)
class Head:
    """
    Logits z = softcap·tanh(scale·(W·h + b) / softcap) / temperature.

    Args:
        weight (`torch.Tensor`):
            Weight W of shape `(V, H)`.
        bias (`torch.Tensor` or `None`):
            Bias b of shape `(V,)`.
        scale (`float`):
            Factor on the logits.
        softcap (`float` or `None`):
            Soft cap of the scaled logits.
        temperature (`float`):
            Temperature.
        dtype (`torch.dtype`):
            Dtype whose rounding hidden states and weight take before the product.
        accumulation (`torch.dtype`):
            Dtype of the logits and of every sum.
        memory_mb (`float`):
            Bound that the casts of the weight keep to an eighth of, in MiB.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None
    temperature: float
    dtype: torch.dtype
    accumulation: torch.dtype
    memory_mb: float

    @property
    def slope(self) -> float:
        """dz/d(W·h + b), up to the soft cap's own."""
        return self.scale / self.temperature

    @property
    def _mixed(self) -> bool:
        # CUDA multiplies half precision into float32 by itself; elsewhere the rounded inputs are widened first.
        return self.weight.device.type == "cuda" and self.dtype in (torch.float16, torch.bfloat16)

    def rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (n, H) as the product takes them."""
        rounded = hidden.to(self.dtype)
        return rounded if self._mixed else rounded.to(self.accumulation)

    def project(self, rows: torch.Tensor, tokens: slice, out: torch.Tensor) -> torch.Tensor:
        """Logits z of the rows on a block of the vocabulary, (v, n), into `out`."""
        factor = self.slope if self.softcap is None else self.scale / self.softcap
        for part in self._castable(tokens):
            weight, target = (
                self.weight[part].to(self.dtype),
                out[part.start - tokens.start : part.stop - tokens.start],
            )
            if self._mixed:
                torch.mm(weight, rows.t(), out_dtype=self.accumulation, out=target)
                if factor != 1.0:
                    target.mul_(factor)
            else:
                torch.addmm(target, weight.to(self.accumulation), rows.t(), beta=0, alpha=factor, out=target)
        if self.bias is not None:
            out.add_(self.bias[tokens].to(self.accumulation).unsqueeze(-1), alpha=factor)
        if self.softcap is not None:
            out.tanh_().mul_(self.softcap / self.temperature)
        return out

    def softcap_slope_(self, logits: torch.Tensor) -> torch.Tensor:
        """1 − tanh² of the soft cap, from its logits z, in place."""
        assert self.softcap is not None
        return logits.mul_(self.temperature / self.softcap).square_().neg_().add_(1.0)

    def accumulate_product(self, grad_logits: torch.Tensor, tokens: slice, out: torch.Tensor) -> None:
        """out (n, H) += grad_logitsᵀ · W on a block of the vocabulary."""
        for part in self._castable(tokens):
            weight = self.weight[part].to(self.dtype).to(self.accumulation)
            out.addmm_(grad_logits[part.start - tokens.start : part.stop - tokens.start].t(), weight)

    def _castable(self, tokens: slice) -> Iterator[slice]:
        """Parts of a block that may be cast as a whole. Nothing is cast where the dtypes agree."""
        size = tokens.stop - tokens.start
        if not self.weight.dtype == self.dtype == self.accumulation:
            row_bytes = self.weight.shape[1] * (self.accumulation.itemsize + self.dtype.itemsize)
            size = min(size, max(1, int(self.memory_mb * 2**20 / 8 // row_bytes)))
        return _slices(tokens.start, tokens.stop, size)


class Workspace:
    """
    The vocabulary-sized memory of a call, made once: a few blocks, and the tiles that are kept while their rows are
    processed.

    Args:
        num_rows (`int`):
            Rows to process, at least one at a time.
        vocab_size (`int`):
            Vocabulary size V.
        num_tiles (`int`):
            Number of tiles (V, n) that are kept: 0 where blocks suffice, 1 for one model, 2 for both.
        device (`torch.device`):
            Device.
        dtype (`torch.dtype`):
            Dtype.
        memory_mb (`float`):
            Bound in MiB, the casts of the weights included.
    """

    def __init__(
        self,
        num_rows: int,
        vocab_size: int,
        num_tiles: int,
        device: torch.device,
        dtype: torch.dtype,
        memory_mb: float,
    ):
        if memory_mb <= 0:
            raise ValueError(f"`memory_mb` must be positive, got {memory_mb}.")
        # A quarter at most for the blocks and an eighth for casts; a block may always hold one row.
        elements = int(memory_mb * 2**20 // dtype.itemsize)
        block_elements = min(
            _BLOCK_ELEMENTS.get(device.type, _DEFAULT_BLOCK_ELEMENTS), max(elements // (4 * _NUM_BLOCKS), vocab_size)
        )
        fitting = (elements * 7 // 8 - _NUM_BLOCKS * block_elements) // (max(num_tiles, 1) * vocab_size)
        useful = max(_MAX_ROWS.get(device.type, num_rows), block_elements // vocab_size)
        self.num_rows = max(1, min(num_rows, fitting, useful))
        self._block_size = max(1, min(vocab_size, block_elements // self.num_rows))
        self._tiles = torch.empty((num_tiles, vocab_size * self.num_rows), device=device, dtype=dtype)
        self._blocks = torch.empty((_NUM_BLOCKS, self._block_size * self.num_rows), device=device, dtype=dtype)

    def tile(self, index: int, vocab_size: int, num_rows: int) -> torch.Tensor:
        """One of the tiles, as (V, n)."""
        return self._tiles[index, : vocab_size * num_rows].view(vocab_size, num_rows)

    def block(self, index: int, tokens: slice, num_rows: int) -> torch.Tensor:
        """One of the blocks, as (v, n)."""
        size = tokens.stop - tokens.start
        return self._blocks[index, : size * num_rows].view(size, num_rows)

    def batches(self, num_rows: int) -> Iterator[slice]:
        """The rows, as many at a time as there is memory for."""
        return _slices(0, num_rows, self.num_rows)

    def vocabulary(self, start: int, stop: int) -> Iterator[slice]:
        """The vocabulary from `start` to `stop` in blocks."""
        return _slices(start, stop, self._block_size)


class OnlineSoftmax:
    """
    Log-normaliser, logits of chosen tokens and entropy of n rows, from one block of logits after the other (the online
    softmax, 1805.02867). The logits are left relative to the maximum of their row's first block: the normaliser of
    large logits would carry their rounding error into every entry.

    Args:
        token_ids (`torch.Tensor`, *optional*):
            Tokens whose logits are kept, of shape `(k, n)`.
        entropy (`bool`, *optional*, defaults to `False`):
            Sum what [`~OnlineSoftmax.entropy`] needs.
    """

    def __init__(self, token_ids: torch.Tensor | None = None, entropy: bool = False):
        self._token_ids, self._with_entropy = token_ids, entropy
        self.reference: torch.Tensor  # (n,), what the logits are relative to
        self._maximum: torch.Tensor  # (n,)
        self._total: torch.Tensor  # (n,), Σ exp(z − maximum)
        self._moment: torch.Tensor  # (n,), Σ (z − maximum)·exp(z − maximum)
        self._chosen: torch.Tensor  # (k, n)

    def add(self, logits: torch.Tensor, tokens: slice, workspace: Workspace) -> None:
        """Takes a block of logits, (v, n), and makes it relative in place."""
        if tokens.start == 0:
            self._start(logits)
        logits.sub_(self.reference)
        maximum = torch.maximum(self._maximum, logits.amax(0))  # (n,)
        step = self._maximum - maximum
        shifted = torch.sub(logits, maximum, out=workspace.block(1, tokens, logits.shape[1]))  # (v, n)
        if self._with_entropy:
            probs = torch.exp(shifted, out=workspace.block(2, tokens, logits.shape[1]))
            moment = zero_where_impossible_(shifted.mul_(probs)).sum(0)
            self._moment.add_(step * self._total).mul_(step.exp()).add_(moment)
        else:
            probs = shifted.exp_()
        self._total.mul_(step.exp()).add_(probs.sum(0))
        self._maximum = maximum
        if self._token_ids is not None:
            local, inside = _local_tokens(self._token_ids, tokens)
            self._chosen = torch.where(inside, logits.gather(0, local), self._chosen)

    def add_vocabulary(
        self,
        head: Head,
        rows: torch.Tensor,
        workspace: Workspace,
        start: int,
        stop: int,
        tile: torch.Tensor | None = None,
    ) -> None:
        """Projects the rows on the vocabulary from `start` to `stop`, into the tile (V, n) if it is to be kept."""
        for tokens in workspace.vocabulary(start, stop):
            block = workspace.block(0, tokens, rows.shape[0]) if tile is None else tile[tokens]
            self.add(head.project(rows, tokens, block), tokens, workspace)

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


def zero_where_impossible_(products: torch.Tensor) -> torch.Tensor:
    """
    Probability times log-probability, in place: 0·∞ of an impossible token is 0, and ∞ stays. The caller marks the rows
    that have no distribution. On a CPU a mask would take ten times as long.
    """
    return products.nan_to_num_(0.0, math.inf, -math.inf)


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, stop)) for first in range(start, stop, size))
