"""A rate and its interval, the one source of every rate that is reported."""

from collections.abc import Iterable
from dataclasses import dataclass

from ..core import wilson_interval


@dataclass(frozen=True)
class Rate:
    """
    Binomial rate.

    Args:
        k (`int`):
            Number of successes.
        n (`int`):
            Number of independent trials.
    """

    k: int
    n: int

    @classmethod
    def of(cls, outcomes: Iterable[bool]) -> "Rate":
        """Rate of the `True` among independent outcomes."""
        outcomes = list(outcomes)
        return cls(sum(outcomes), len(outcomes))

    @property
    def value(self) -> float:
        """The rate itself."""
        return self.k / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson interval."""
        return wilson_interval(self.k, self.n, 0.95)
