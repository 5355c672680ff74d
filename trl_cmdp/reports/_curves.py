"""Curves over the optimizer steps."""

import math
from collections.abc import Sequence
from typing import Any

from ..evaluation import Rate
from ..evaluation._lines import LARGEST


SMOOTHED_STEPS = 5
_MAX_POINTS = 200


def trailing_means(values: Sequence[float], window: int = SMOOTHED_STEPS) -> list[float]:
    """Means of each value and those before it, up to `window` of them."""
    windows = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
    return [sum(window) / len(window) for window in windows]


def logged(history: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values where a metric was logged as a finite number, and one that can be drawn."""
    entries = [entry for entry in history if _finite(entry.get(key)) and _finite(entry.get("step"))]
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]


def rate_band(rates: Sequence[float], batch_size: int, window: int) -> tuple[list[int], list[float], list[float]]:
    """
    95% intervals of a logged rate over the last `window` logged values, which are the clusters.

    Each rate is taken to be of `batch_size` rollouts; where it is of more, the interval is wider than it need be.
    Returned are at most 200 indices into `rates`, at even distances, and the lower and upper bounds there.
    """
    # Whole successes of each value. What rounding takes from one it gives to the next, so that their sum is kept.
    total, successes = 0.0, []
    for rate in rates:
        successes.append(math.floor(total + rate * batch_size + 0.5) - math.floor(total + 0.5))
        total += rate * batch_size
    step = math.ceil(len(rates) / _MAX_POINTS)
    indices = list(range((len(rates) - 1) % step, len(rates), step))
    bounds = []
    for index in indices:
        clusters = tuple((k, batch_size) for k in successes[max(0, index + 1 - window) : index + 1])
        bounds.append(Rate(sum(k for k, _ in clusters), batch_size * len(clusters), clusters).interval)
    return indices, [low for low, _ in bounds], [high for _, high in bounds]


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) <= LARGEST
