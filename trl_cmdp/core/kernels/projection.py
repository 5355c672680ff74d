"""The product of hidden states with a head, in blocks of the vocabulary."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..head import Head
from .memory import slices


def accumulation_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Dtype of logits and sums: float64 where an input is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Dtype whose rounding the projection's inputs take: autocast's where it is on, as in the models' own heads."""
    device_type = hidden.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype


def is_mixed(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a product with it in this dtype has sums of float32: CUDA's of half precision have."""
    return tensor.device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)


def add_product_(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, keep: bool = True) -> None:
    """out += left·right, or without `keep` out = left·right, whose sums are in the dtype of `out`."""
    if not is_mixed(left, left.dtype):
        torch.addmm(out, left.to(out.dtype), right.to(out.dtype), beta=int(keep), out=out)
    elif keep:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


@dataclass(frozen=True)
class Projection:
    """Logits z of a [`Head`] over a temperature."""

    head: Head
    temperature: float
    rounding: torch.dtype  # whose rounding hidden states and weight take before the product
    dtype: torch.dtype  # of the logits and of every sum
    memory_mb: float  # of which the casts of the weight take an eighth at most

    def __post_init__(self) -> None:
        if self.memory_mb <= 0:
            raise ValueError(f"`memory_mb` must be positive, got {self.memory_mb}.")

    @property
    def slope(self) -> float:
        """dz/d(W·h + b), up to the soft cap's own."""
        return self.head.logit_scale / self.temperature

    @property
    def _mixed(self) -> bool:
        # CUDA multiplies half precision into float32 by itself; elsewhere the rounded inputs are widened first.
        return is_mixed(self.head.weight, self.rounding)

    def rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (n, H) as the product takes them."""
        rounded = hidden.to(self.rounding)
        return rounded if self._mixed else rounded.to(self.dtype)

    def project(self, rows: torch.Tensor, tokens: slice, out: torch.Tensor) -> torch.Tensor:
        """Logits z of the rows on a block of the vocabulary, (v, n), into `out`."""
        bias, softcap = self.head.bias, self.head.softcap
        factor = self.slope if softcap is None else self.head.logit_scale / softcap
        for part in self._castable(tokens):
            weight = self.head.weight[part].to(self.rounding)
            target = out[part.start - tokens.start : part.stop - tokens.start]
            if self._mixed:
                torch.mm(weight, rows.t(), out_dtype=self.dtype, out=target)
                if factor != 1.0:
                    target.mul_(factor)
            else:
                torch.addmm(target, weight.to(self.dtype), rows.t(), beta=0, alpha=factor, out=target)
        if bias is not None:
            out.add_(bias[tokens].to(self.dtype).unsqueeze(-1), alpha=factor)
        if softcap is not None:
            out.tanh_().mul_(softcap / self.temperature)
        return out

    def softcap_slope_(self, logits: torch.Tensor) -> torch.Tensor:
        """1 − tanh² of the soft cap, from its logits z, in place."""
        assert self.head.softcap is not None
        return logits.mul_(self.temperature / self.head.softcap).square_().neg_().add_(1.0)

    def accumulate_product(self, grad_logits: torch.Tensor, tokens: slice, out: torch.Tensor) -> None:
        """out (n, H) += grad_logitsᵀ · W on a block of the vocabulary."""
        for part in self._castable(tokens):
            weight = self.head.weight[part].to(self.rounding).to(self.dtype)
            out.addmm_(grad_logits[part.start - tokens.start : part.stop - tokens.start].t(), weight)

    def outputs(self, rows: torch.Tensor, vocab_size: int, out: torch.Tensor) -> None:
        """What the head makes of rows (n, H) on the first tokens, h·Wᵀ + b, into the first columns of `out`."""
        dtype, bias = self.rounding if self._mixed else self.dtype, self.head.bias
        for part in self._castable(slice(0, vocab_size), dtype):
            add_product_(out[:, part], rows, self.head.weight[part].to(self.rounding).t(), keep=False)
        if bias is not None:
            out[:, :vocab_size] += bias[:vocab_size]

    def add_by_rows(self, grad_outputs: torch.Tensor, out: torch.Tensor) -> None:
        """out (n, H) += grad_outputs·W, of the gradient (n, V) of the outputs."""
        dtype = self.rounding if self._mixed else self.dtype
        for part in self._castable(slice(0, grad_outputs.shape[1]), dtype):
            add_product_(out, grad_outputs[:, part], self.head.weight[part].to(self.rounding))

    def _castable(self, tokens: slice, dtype: torch.dtype | None = None) -> Iterator[slice]:
        """Parts of a block that may be cast as a whole to a product's dtype. Nothing is cast where the dtypes agree."""
        size, weight = tokens.stop - tokens.start, self.head.weight
        if not weight.dtype == self.rounding == (dtype or self.dtype):
            row_bytes = weight.shape[1] * (self.dtype.itemsize + self.rounding.itemsize)
            size = min(size, max(1, int(self.memory_mb * 2**20 / 8 // row_bytes)))
        return slices(tokens.start, tokens.stop, size)
