"""The completions table of Weights & Biases, with each token shaded by its cost."""

import html
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ...core.signal import Rollouts, Signal


TABLE = "completions_by_cost"
_COLUMNS = ["step", "prompt", "completion", "reward", "cost", "feasible"]
_DARKEST = 0.85  # opacity, at which the text can still be read


class ShadedCompletions:
    """The training rollouts since the last log."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._rows: list[list[Any]] = []

    def replace(self, prompts: Sequence[Any], ids: torch.Tensor, mask: torch.Tensor, of: Rollouts, by: Signal) -> None:
        """Keep these rollouts, with their completion tokens and mask (B, T), in place of the ones before."""
        self._rows = []
        if of.costs is None or "cost" not in by.columns:
            return
        scale = float(of.costs.max())
        rewards = [None if reward != reward else reward for reward in of.rewards.tolist()]
        for row, prompt in enumerate(prompts):
            kept = mask[row].bool()
            tokens = self._tokenizer.batch_decode([[token] for token in ids[row][kept].tolist()])
            shaded = shade_tokens(tokens, of.costs[row][kept].tolist(), scale)
            figures = [rewards[row], by.columns["cost"][row], by.columns["feasible"][row]]
            self._rows.append([str(prompt), shaded, *figures])

    def log(self, step: int) -> None:
        """Send them to the run of Weights & Biases that is on."""
        import wandb  # an optional dependency

        if self._rows and wandb.run is not None:
            data = [[step, prompt, wandb.Html(shaded, inject=False), *rest] for prompt, shaded, *rest in self._rows]
            wandb.log({TABLE: wandb.Table(columns=_COLUMNS, data=data)})
        self._rows = []


def shade_tokens(tokens: Sequence[str], costs: Sequence[float], scale: float) -> str:
    """Tokens as HTML, the redder the more they cost. The cost shows where the pointer rests on a token."""
    spans = []
    for token, cost in zip(tokens, costs, strict=True):
        opacity = _DARKEST * (max(0.0, cost) / scale) ** 0.5 if scale > 0 else 0.0  # of a root: costs have long tails
        style = f"background:rgba(214,69,65,{opacity:.2f})"
        spans.append(f'<span style="{style}" title="{cost:.3f} nats">{html.escape(token)}</span>')
    return f'<div style="white-space:pre-wrap;font-family:monospace">{"".join(spans)}</div>'
