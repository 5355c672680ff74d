"""The head of a language model."""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, eq=False)
class Head:
    """
    What turns hidden states into logits: `softcap · tanh(logit_scale · (h Wᵀ + b) / softcap)`.

    Args:
        weight (`torch.Tensor`):
            Weight W of shape `(V, H)`.
        bias (`torch.Tensor`, *optional*):
            Bias b of shape `(V,)`.
        logit_scale (`float`, *optional*, defaults to `1.0`):
            Factor on the logits (Cohere, Granite, Falcon-H1).
        softcap (`float`, *optional*):
            Soft cap on the scaled logits (Gemma).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        """Vocabulary size V, padding included."""
        return self.weight.shape[0]

    def first(self, vocab_size: int) -> "Head":
        """The head of the first tokens of the vocabulary."""
        if vocab_size == self.vocab_size:  # a slice of everything would cost its backward a copy of the gradient
            return self
        return replace(
            self, weight=self.weight[:vocab_size], bias=None if self.bias is None else self.bias[:vocab_size]
        )

    def to(self, target: torch.device | torch.dtype) -> "Head":
        """The head on a device or in a dtype."""
        return replace(self, weight=self.weight.to(target), bias=None if self.bias is None else self.bias.to(target))


def as_head(head: Head | torch.Tensor) -> Head:
    """A plain weight `(V, H)` in a head's place is a head without bias."""
    return Head(head) if isinstance(head, torch.Tensor) else head
