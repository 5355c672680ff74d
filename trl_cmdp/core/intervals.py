"""Intervals for rates and means: Wilson, Clopper-Pearson, and bootstraps that respect clusters and levels."""

from collections.abc import Sequence
from statistics import NormalDist

import torch


def wilson_interval(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """
    Wilson score interval for a binomial rate (Wilson 1927). Approximate, with good coverage also near 0 and 1.

    Args:
        k (`int`):
            Number of successes.
        n (`int`):
            Number of independent trials.
        confidence (`float`, *optional*, defaults to `0.95`):
            Two-sided confidence level.

    Returns:
        `tuple[float, float]`: Lower and upper bound.
    """
    _check_counts(k, n, confidence)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = k / n
    centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (rate * (1 - rate) / n + z**2 / (4 * n**2)) ** 0.5
    # At k = 0 and k = n one bound is exactly 0 or 1; rounding must not move it past the rate itself.
    return (0.0 if k == 0 else centre - half), (1.0 if k == n else centre + half)


def clopper_pearson_interval(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """
    Clopper-Pearson interval for a binomial rate (1934): coverage is at least the confidence level, always.

    Each bound solves its binomial tail equation by bisection on the exact tail sum. For a one-sided bound at level α
    take the matching end of the interval at confidence 1 − 2α.

    Args:
        k (`int`):
            Number of successes.
        n (`int`):
            Number of independent trials.
        confidence (`float`, *optional*, defaults to `0.95`):
            Two-sided confidence level.

    Returns:
        `tuple[float, float]`: Lower and upper bound.
    """
    _check_counts(k, n, confidence)
    alpha = (1 - confidence) / 2
    lower = 0.0 if k == 0 else _bisect_tail(k, n, alpha)
    # P(X <= k | p) = alpha is P(n − X >= n − k | 1 − p) = alpha.
    upper = 1.0 if k == n else 1 - _bisect_tail(n - k, n, alpha)
    return lower, upper


def bootstrap_interval(
    values: torch.Tensor,
    clusters: torch.Tensor | None = None,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """
    Percentile bootstrap interval for a mean, an estimate. Give paired differences for a paired comparison.

    Args:
        values (`torch.Tensor`):
            Observations of shape `(N,)`.
        clusters (`torch.Tensor`, *optional*):
            Integer cluster of each observation, of shape `(N,)`, such as its prompt. Whole clusters are resampled.
            Every observation is its own cluster if `None`.
        confidence (`float`, *optional*, defaults to `0.95`):
            Two-sided confidence level.
        num_resamples (`int`, *optional*, defaults to `10_000`):
            Bootstrap samples.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resampling.

    Returns:
        `tuple[float, float]`: Lower and upper bound.
    """
    if values.dim() != 1 or values.numel() == 0:
        raise ValueError(f"`values` must be a non-empty vector, got shape {tuple(values.shape)}.")
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must lie in (0, 1), got {confidence}.")
    values = values.double()
    if clusters is None:
        clusters = torch.arange(values.numel())
    index = torch.unique(clusters, return_inverse=True)[1]  # (N,)
    num_clusters = int(index.max()) + 1
    sums = torch.zeros(num_clusters, dtype=torch.float64).index_add_(0, index, values)
    sizes = torch.zeros(num_clusters, dtype=torch.float64).index_add_(0, index, torch.ones_like(values))
    generator = torch.Generator().manual_seed(seed)
    means = []
    batch = max(1, 2**22 // num_clusters)  # bounded memory, however many clusters there are
    for start in range(0, num_resamples, batch):
        draws = torch.randint(num_clusters, (min(batch, num_resamples - start), num_clusters), generator=generator)
        means.append(sums[draws].sum(-1) / sizes[draws].sum(-1))
    tail = (1 - confidence) / 2
    low, high = torch.cat(means).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def two_level_bootstrap_interval(
    groups: Sequence[torch.Tensor], confidence: float = 0.95, num_resamples: int = 2_000, seed: int = 0
) -> tuple[float, float]:
    """
    Percentile bootstrap interval for the mean of group means, an estimate: groups are resampled, then the observations
    within each drawn group. Made for training seeds and the held-out problems of each.

    Groups of equal sizes get the same resamples at the same `seed`, whatever their values, so paired differences of
    the observations give a paired comparison. With a single group the interval says nothing about other groups, and
    with S groups the spread between them is understated by the factor (S − 1)/S of its variance.

    Args:
        groups (`Sequence[torch.Tensor]`):
            Observations of each group, of shape `(N_g,)`.
        confidence (`float`, *optional*, defaults to `0.95`):
            Two-sided confidence level.
        num_resamples (`int`, *optional*, defaults to `2_000`):
            Bootstrap samples.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resampling.

    Returns:
        `tuple[float, float]`: Lower and upper bound.

    Raises:
        ValueError: If there is no group, or one that is not a non-empty vector.
    """
    if not groups:
        raise ValueError("`groups` must hold at least one group of observations.")
    for values in groups:
        if values.dim() != 1 or values.numel() == 0:
            raise ValueError(f"Each of the `groups` must be a non-empty vector, got shape {tuple(values.shape)}.")
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must lie in (0, 1), got {confidence}.")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(groups), (num_resamples, len(groups)), generator=generator)  # (R, S)
    means = torch.empty(num_resamples, len(groups), dtype=torch.float64)
    for index, values in enumerate(groups):
        places = (drawn == index).nonzero()  # every place where this group was drawn, (K, 2)
        batch = max(1, 2**22 // values.numel())  # bounded memory, however many observations there are
        for start in range(0, len(places), batch):
            rows, columns = places[start : start + batch].unbind(1)
            draws = torch.randint(values.numel(), (len(rows), values.numel()), generator=generator)
            means[rows, columns] = values.double()[draws].mean(1)
    tail = (1 - confidence) / 2
    low, high = means.mean(1).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def _bisect_tail(k: int, n: int, alpha: float) -> float:
    """The p at which P(X >= k) = alpha for X ~ Binomial(n, p), 1 <= k <= n."""
    i = torch.arange(k, n + 1, dtype=torch.float64)
    total = torch.tensor(float(n), dtype=torch.float64)
    log_choose = torch.lgamma(total + 1) - torch.lgamma(i + 1) - torch.lgamma(total - i + 1)
    low, high = 0.0, 1.0
    for _ in range(60):  # past float64's resolution
        p = torch.tensor((low + high) / 2, dtype=torch.float64)
        tail = (log_choose + i * torch.log(p) + (total - i) * torch.log1p(-p)).exp().sum()
        low, high = (low, p.item()) if tail > alpha else (p.item(), high)
    return (low + high) / 2


def _check_counts(k: int, n: int, confidence: float) -> None:
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"A rate needs 0 <= k <= n and n >= 1, got k={k}, n={n}.")
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must lie in (0, 1), got {confidence}.")
