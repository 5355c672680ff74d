"""Satisfaction of the latest rollouts, counted by prompt, so that a model card can give its interval."""

from collections import deque
from dataclasses import dataclass

import torch

from ...core import clustered_rate_interval


LOGGED_STEPS = 10  # that the card's figure of the training rollouts is made of


@dataclass(frozen=True)
class MeasuredSatisfaction:
    """Satisfaction of rollouts, which are independent between prompts only."""

    mode: str  # `"train"` or `"eval"`
    rate: float  # share of rollouts within the limit
    low: float  # bounds of its 95% interval
    high: float  # bounds of its 95% interval
    rollouts: int  # rollouts that were judged
    groups: int  # groups of rollouts, each of one prompt
    first_step: int  # optimizer steps done when the first and the last of them were logged
    last_step: int  # optimizer steps done when the first and the last of them were logged
    logged_steps: int  # times that they were logged


class SatisfactionCounts:
    """Counts of the last logged steps of training, and of the last evaluation."""

    def __init__(self):
        self._open: dict[str, list[torch.Tensor]] = {"train": [], "eval": []}
        self._logged: dict[str, deque[tuple[int, torch.Tensor]]] = {
            "train": deque(maxlen=LOGGED_STEPS),
            "eval": deque(maxlen=1),
        }

    def add(self, mode: str, feasible: torch.Tensor, judged: torch.Tensor, num_generations: int) -> None:
        """Count rollouts, whole groups after one another: whether each is feasible and judged, of shape `(B,)`."""
        counts = torch.stack([feasible & judged, judged]).view(2, -1, num_generations).sum(-1).cpu()  # (2, groups)
        self._open[mode].append(counts[:, counts[1] > 0])

    def close(self, mode: str, step: int) -> None:
        """What was counted since the last time is logged now."""
        if self._open[mode]:
            self._logged[mode].append((step, torch.cat(self._open[mode], 1)))
            self._open[mode].clear()

    def measured(self, mode: str) -> MeasuredSatisfaction | None:
        """Satisfaction in `"train"` or `"eval"`, `None` while there is none."""
        logged = self._logged[mode]
        counts = torch.cat([torch.zeros(2, 0, dtype=torch.long), *(counts for _, counts in logged)], 1)
        satisfied, rollouts = counts.sum(1).tolist()
        if rollouts == 0:
            return None
        low, high = clustered_rate_interval(*counts)
        return MeasuredSatisfaction(
            mode, satisfied / rollouts, low, high, rollouts, counts.size(1), logged[0][0], logged[-1][0], len(logged)
        )

    def all_measured(self) -> list[MeasuredSatisfaction]:
        """What there is of both, the evaluation first."""
        return [value for mode in ("eval", "train") if (value := self.measured(mode)) is not None]
