"""What every teacher can be asked, in training and in evaluation alike."""

from typing import Protocol

import torch

from ..core import Head


class Teacher(Protocol):
    """
    A teacher of batches of rollouts.

    Attributes:
        exact (`bool`): Whether it has hidden states and a head, and so the divergence over the full vocabulary. One that
            is not knows log-probabilities alone.
        vocab_size (`int`): Number of token ids that it can read.
        max_length (`int` or `None`): Length of the longest sequence that it can read, `None` if nothing here bounds it.
        ahead (`int`): Number of rollouts that it is asked for before they are needed: of a server ([`ServerTeacher.ask`]),
            whose answers take their time, and 0 of a model in this process.
    """

    exact: bool
    vocab_size: int
    max_length: int | None
    ahead: int

    def hidden_states(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, mask: torch.Tensor, **images: torch.Tensor
    ) -> torch.Tensor:
        """
        Hidden states that predict the completion tokens of a mask.

        Args:
            input_ids (`torch.Tensor`):
                Prompts, padded on the left, and completions, padded on the right, of shape `(B, P + T)`.
            attention_mask (`torch.Tensor`):
                Mask of shape `(B, P + T)`.
            mask (`torch.Tensor`):
                Booleans of shape `(B, T)`, the N completion tokens asked for.
            images (`torch.Tensor`):
                What else the model reads where there are images, by the names of its inputs: `pixel_values` and others.

        Returns:
            `torch.Tensor`: Hidden states of shape `(N, H_t)`, in row-major order and the teacher's dtype.
        """
        ...

    def head(self) -> Head:
        """The teacher's head, on the device of the hidden states."""
        ...

    def fingerprint(self) -> str:
        """Short text that another teacher does not share."""
        ...
