"""Intervals for rates and means: Wilson, Clopper-Pearson also of clusters, and bootstraps over clusters and levels."""

from collections.abc import Sequence

import torch
from scipy.special import betaincinv, ndtri, stdtrit


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
    z, rate = _normal_quantile(confidence), k / n
    centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (rate * (1 - rate) / n + z**2 / (4 * n**2)) ** 0.5
    # At k = 0 and k = n one bound is exactly 0 or 1; rounding must not move it past the rate itself.
    return (0.0 if k == 0 else centre - half), (1.0 if k == n else centre + half)


def clopper_pearson_interval(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """
    Clopper-Pearson interval for a binomial rate (1934): coverage is at least the confidence level, always.

    Each bound solves its binomial tail equation, a quantile of the beta distribution. For a one-sided bound at level α
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
    return _beta_interval(k, n - k, confidence)


def clustered_rate_interval(
    successes: torch.Tensor, trials: torch.Tensor, confidence: float = 0.95
) -> tuple[float, float]:
    """
    Interval for the rate of trials that are independent between clusters only, such as the rollouts of a prompt:
    Clopper-Pearson on an effective number of independent trials (Korn and Graubard 1998).

    The effective number is p(1 − p) over the estimated variance of the rate. It lies between what clusters give whose
    trials all agree, (Σn)²/Σn² (the number of clusters, where they are of one size), and the number of trials. Near 0
    and 1 a handful of clusters decides the estimate, and the correction of Korn and Graubard, (z/t)² with as many
    degrees of freedom as there are clusters, is too weak. Ours multiplies the part above the lower end by (z/t_ν)⁴,
    ν the degrees of freedom of the variance estimate itself (Satterthwaite 1946); where no cluster differs from another
    nothing is left of it. The exponent is our choice: with 2 and 3 coverage falls below 94% near the boundary.
    `benchmarks/results/intervals.json` has the coverage by simulation.

    Args:
        successes (`torch.Tensor`):
            Successes of each cluster, of shape `(C,)`.
        trials (`torch.Tensor`):
            Trials of each cluster, at least 1, of shape `(C,)`.
        confidence (`float`, *optional*, defaults to `0.95`):
            Two-sided confidence level.

    Returns:
        `tuple[float, float]`: Lower and upper bound.

    Raises:
        ValueError: If the counts are not those of a rate, or there is no cluster.
    """
    if successes.dim() != 1 or successes.shape != trials.shape or len(trials) == 0:
        raise ValueError(
            "`successes` and `trials` must be non-empty vectors of one length, got shapes "
            f"{tuple(successes.shape)} and {tuple(trials.shape)}."
        )
    if not bool(((successes >= 0) & (successes <= trials) & (trials >= 1)).all()):
        raise ValueError("Each cluster needs 0 <= successes <= trials and at least one trial.")
    k, n = int(successes.sum()), int(trials.sum())
    _check_counts(k, n, confidence)
    effective = _effective_trials(successes.double(), trials.double(), confidence)
    return _beta_interval(k / n * effective, (n - k) / n * effective, confidence)


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
    _check_confidence(confidence)
    values = values.double()
    if clusters is None:
        clusters = torch.arange(values.numel())
    index = torch.unique(clusters, return_inverse=True)[1]  # (N,)
    num_clusters = int(index.max()) + 1
    sums = torch.zeros(num_clusters, dtype=torch.float64).index_add_(0, index, values)
    sizes = torch.zeros(num_clusters, dtype=torch.float64).index_add_(0, index, torch.ones_like(values))
    generator = torch.Generator().manual_seed(seed)
    of_one_size = bool((sizes == sizes[0]).all())
    means = []
    batch = max(1, 2**22 // num_clusters)  # bounded memory, however many clusters there are
    for start in range(0, num_resamples, batch):
        shape = (min(batch, num_resamples - start), num_clusters)
        draws = torch.randint(num_clusters, shape, generator=generator, dtype=torch.int32).flatten()
        total = sums.index_select(0, draws).view(shape).sum(-1)
        trials = num_clusters * sizes[0] if of_one_size else sizes.index_select(0, draws).view(shape).sum(-1)
        means.append(total / trials)
    return _percentiles(torch.cat(means), confidence)


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
    _check_confidence(confidence)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(groups), (num_resamples, len(groups)), generator=generator)  # (R, S)
    means = torch.empty(num_resamples, len(groups), dtype=torch.float64)
    for index, values in enumerate(groups):
        positions = (drawn == index).nonzero()  # where this group was drawn, (K, 2)
        batch = max(1, 2**22 // values.numel())  # bounded memory, however many observations there are
        for start in range(0, len(positions), batch):
            resamples, slots = positions[start : start + batch].unbind(1)
            shape = (len(resamples), values.numel())
            draws = torch.randint(values.numel(), shape, generator=generator, dtype=torch.int32).flatten()
            means[resamples, slots] = values.double().index_select(0, draws).view(shape).mean(1)
    return _percentiles(means.mean(1), confidence)


def _effective_trials(successes: torch.Tensor, trials: torch.Tensor, confidence: float) -> float:
    """Number of independent trials that say as much about the rate as the clusters do."""
    num_clusters, n = len(trials), trials.sum().item()
    least = n**2 / trials.square().sum().item()
    rate = successes.sum().item() / n
    squares = (successes - rate * trials).square()  # (C,)
    total = squares.sum().item()
    if total <= 1e-12 * n:  # no cluster differs, or there is only one: nothing to estimate from
        return float(least)
    variance = num_clusters / (num_clusters - 1) * total / n**2
    estimate = min(max(rate * (1 - rate) / variance, least), n)
    # Twice the squared mean of a variance over its own variance.
    spread = squares.square().sum().item() - total**2 / num_clusters
    degrees = min(max(2 * total**2 / max(spread, 1e-6 * total**2), 1.0), 1e6)
    ratio = _normal_quantile(confidence) / stdtrit(degrees, 0.5 + confidence / 2)
    return float(least + (estimate - least) * ratio**4)


def _normal_quantile(confidence: float) -> float:
    """z, where the standard normal distribution has `confidence` of its mass between −z and z."""
    return float(ndtri(0.5 + confidence / 2))


def _beta_interval(successes: float, failures: float, confidence: float) -> tuple[float, float]:
    """Clopper-Pearson bounds of counts, which need not be whole."""
    alpha = (1 - confidence) / 2
    # P(X >= k | p) is the distribution function of Beta(k, n - k + 1) at p; for P(X <= k | p) count the failures.
    lower = 0.0 if successes == 0 else float(betaincinv(successes, failures + 1, alpha))
    upper = 1.0 if failures == 0 else 1 - float(betaincinv(failures, successes + 1, alpha))
    return lower, upper


def _percentiles(resampled: torch.Tensor, confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = resampled.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def _check_counts(k: int, n: int, confidence: float) -> None:
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"A rate needs 0 <= k <= n and n >= 1, got k={k}, n={n}.")
    _check_confidence(confidence)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must lie in (0, 1), got {confidence}.")
