"""What is restated of TRL's policy loss, in this one place: `GRPOTrainer._compute_loss`, tested against it."""

from typing import Any

import torch
from trl import GRPOTrainer


def loss_mask(inputs: dict[str, Any]) -> torch.Tensor:
    """Mask (B, T) of the completion tokens that the loss counts."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def policy_token_weight(trainer: GRPOTrainer, mask: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
    """Factor of each token in TRL's policy loss Σ factor·mask·per_token_loss, of shape (B, 1) or ()."""
    training = trainer.model.training
    accumulation = trainer.current_gradient_accumulation_steps if training else 1
    num_rows, loss_type = mask.size(0), trainer.loss_type
    if loss_type in ("grpo", "sapo"):
        return 1 / (mask.sum(-1, keepdim=True).clamp(min=1.0) * num_rows * accumulation)
    if loss_type == "bnpo":
        return 1 / (mask.sum().clamp(min=1.0) * accumulation)
    if loss_type == "dr_grpo":
        return torch.tensor(1 / (num_rows * trainer.max_completion_length * accumulation), device=mask.device)
    if loss_type == "luspo":
        return torch.tensor(1 / (num_rows * accumulation), device=mask.device)
    if loss_type in ("cispo", "dapo", "vespo"):
        normalizer = num_items_in_batch.clamp(min=1.0) / trainer.accelerator.num_processes
        return 1 / (normalizer * accumulation / trainer.args.steps_per_generation if training else normalizer)
    raise ValueError(f"Unknown loss type: {loss_type}")
