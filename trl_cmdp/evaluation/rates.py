"""A value and its interval, the one form of every figure that is reported, and the rates of outcomes."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..core import clustered_rate_interval, wilson_interval


@dataclass(frozen=True)
class ValueWithInterval:
    """A value with its 95% interval."""

    value: float  # the value
    low: float  # lower bound
    high: float  # upper bound

    def text(self, form: str = ".3f", factor: float = 1.0) -> str:
        """`value [low, high]`, each times the factor in a format such as `"+.1f"`."""
        return "{:{form}} [{:{form}}, {:{form}}]".format(
            factor * self.value, factor * self.low, factor * self.high, form=form
        )


@dataclass(frozen=True)
class Rate:
    """Binomial rate."""

    k: int  # number of successes
    n: int  # number of trials
    # Successes and trials of each cluster, such as a prompt's rollouts. Trials are independent if `None`
    clusters: tuple[tuple[int, int], ...] | None = None

    @classmethod
    def of(cls, outcomes: Iterable[bool]) -> "Rate":
        """Rate of the `True` among independent outcomes."""
        outcomes = list(outcomes)
        return cls(sum(outcomes), len(outcomes))

    @classmethod
    def of_clusters(cls, clusters: Iterable[Iterable[bool]]) -> "Rate":
        """Rate of the `True` among outcomes that are independent between clusters only."""
        counts = tuple((sum(outcomes), len(outcomes)) for outcomes in map(list, clusters))
        return cls(sum(k for k, _ in counts), sum(n for _, n in counts), counts)

    @property
    def value(self) -> float:
        """The rate itself."""
        return self.k / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval: Wilson's, or of clusters [`~core.clustered_rate_interval`]."""
        if self.clusters is None:
            return wilson_interval(self.k, self.n, 0.95)
        successes, trials = torch.tensor(self.clusters).unbind(1)
        return clustered_rate_interval(successes, trials, 0.95)
