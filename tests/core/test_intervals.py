"""Wilson, Clopper-Pearson and the clustered interval: bounds and coverage; the bootstraps: coverage, clusters, levels and seed."""

import itertools
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import beta, binom, binomtest
from scipy.stats import t as student_t

from trl_cmdp.core import (
    bootstrap_interval,
    clopper_pearson_interval,
    clustered_rate_interval,
    two_level_bootstrap_interval,
    wilson_interval,
)


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COUNTS = [(k, n) for n in (1, 2, 7, 30) for k in range(n + 1)]
COUNTS += [(k, 512) for k in (0, 1, 13, 256, 511, 512)] + [(k, 100_000) for k in (0, 1, 50_000, 99_999, 100_000)]


@pytest.mark.parametrize("confidence", [0.5, 0.95, 1 - 1e-6])
def test_wilson_equals_scipy(confidence):
    """Exactly 0 at k = 0 and exactly 1 at k = n."""
    for k, n in COUNTS:
        expected = binomtest(k, n).proportion_ci(confidence, "wilson")
        low, high = wilson_interval(k, n, confidence)
        assert (low, high) == pytest.approx((expected.low, expected.high), rel=1e-7, abs=1e-12)
        assert (low == 0, high == 1) == (k == 0, k == n)


@pytest.mark.parametrize("confidence", [0.5, 0.95, 1 - 1e-6])
def test_clopper_pearson_solves_the_binomial_tails(confidence):
    """
    At the lower bound k successes or more, and at the upper k or fewer, have the probability α/2, so that it covers.
    Exactly 0 at k = 0 and exactly 1 at k = n.
    """
    tail = pytest.approx((1 - confidence) / 2, rel=1e-7)
    for k, n in COUNTS:
        low, high = clopper_pearson_interval(k, n, confidence)
        assert k == 0 or binom.sf(k - 1, n, low) == tail
        assert k == n or binom.cdf(k, n, high) == tail
        assert (low == 0, high == 1) == (k == 0, k == n)


VALID = {
    wilson_interval: (1, 5),
    clopper_pearson_interval: (1, 5),
    clustered_rate_interval: (torch.tensor([1]), torch.tensor([2])),
    bootstrap_interval: (torch.ones(3),),
    two_level_bootstrap_interval: ([torch.ones(3)],),
}


@pytest.mark.parametrize("interval", VALID)
@pytest.mark.parametrize("confidence", [0.0, 1.0])
def test_a_confidence_level_lies_within_0_and_1(interval, confidence):
    with pytest.raises(ValueError, match="confidence"):
        interval(*VALID[interval], confidence=confidence)


@pytest.mark.parametrize("interval", [wilson_interval, clopper_pearson_interval])
@pytest.mark.parametrize(("k", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_counts_that_are_no_rate(interval, k, n):
    with pytest.raises(ValueError, match=f"k={k}, n={n}"):
        interval(k, n)


@pytest.mark.parametrize(("successes", "trials"), [([], []), ([1], [1, 2]), ([3], [2]), ([-1], [2]), ([0], [0])])
def test_clusters_that_are_no_rate(successes, trials):
    with pytest.raises(ValueError, match="trial"):
        clustered_rate_interval(torch.tensor(successes).long(), torch.tensor(trials).long())


@pytest.mark.parametrize("values", [[], [[1.0]]])
def test_observations_are_a_vector(values):
    with pytest.raises(ValueError, match="`values`"):
        bootstrap_interval(torch.tensor(values))
    with pytest.raises(ValueError, match="`groups`"):
        two_level_bootstrap_interval([torch.ones(1), torch.tensor(values)])
    with pytest.raises(ValueError, match="`groups`"):
        two_level_bootstrap_interval([])


def test_bootstrap_coverage():
    """Over repeated experiments of 40 clusters, the interval holds the true mean about as often as it says."""
    generator = torch.Generator().manual_seed(0)
    clusters = torch.arange(40).repeat_interleave(4)
    held = held_without = 0
    for trial in range(200):
        values = torch.randn(40, generator=generator).repeat_interleave(4) + 0.3 * torch.randn(
            160, generator=generator
        )
        low, high = bootstrap_interval(values, clusters, confidence=0.9, num_resamples=400, seed=trial)
        held += low <= 0 <= high
        low, high = bootstrap_interval(values, confidence=0.9, num_resamples=400, seed=trial)
        held_without += low <= 0 <= high
    assert 0.83 <= held / 200 <= 0.95
    assert held_without / 200 < 0.7  # what ignoring the clusters would claim


def test_bootstrap_resamples_whole_clusters():
    """Duplicating every observation within its cluster adds nothing; unequal clusters weigh by their size."""
    generator = torch.Generator().manual_seed(0)
    values, clusters = torch.randn(30, generator=generator), torch.arange(30)
    once = bootstrap_interval(values, clusters, num_resamples=500)
    labels = (clusters.repeat_interleave(3) * 7 - 5).flip(0)  # any integers, in any order
    assert bootstrap_interval(values.repeat_interleave(3).flip(0), labels, num_resamples=500) == pytest.approx(once)
    assert bootstrap_interval(values, num_resamples=500) == once
    # Of the clusters {1} and {0, 0, 0}, resamples have means 1, 1/4 and 0 with probabilities 1/4, 1/2 and 1/4.
    low, high = bootstrap_interval(
        torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([0, 1, 1, 1]), confidence=0.4, num_resamples=2000
    )
    assert (low, high) == (0.25, 0.25)


def test_bootstrap_is_deterministic():
    """The same seed gives the same interval, another seed another, and the global generator is not touched."""
    values = torch.randn(50)
    state = torch.get_rng_state()
    first = bootstrap_interval(values, num_resamples=1500, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert bootstrap_interval(values, num_resamples=1500, seed=3) == first
    assert bootstrap_interval(values, num_resamples=1500, seed=4) != first
    assert bootstrap_interval(torch.full((5,), 0.25)) == (0.25, 0.25)


def test_two_levels_of_constant_groups_are_the_bootstrap_of_their_means():
    """Of two groups, all 0 and all 1, resamples have means 0, 1/2 and 1 with probabilities 1/4, 1/2 and 1/4."""
    groups = [torch.zeros(7), torch.ones(300)]  # each group counts once, whatever its size
    assert two_level_bootstrap_interval(groups, confidence=0.4) == (0.5, 0.5)
    assert two_level_bootstrap_interval(groups, confidence=0.6) == (0.0, 1.0)
    assert two_level_bootstrap_interval([torch.full((3,), 0.25)] * 2) == (0.25, 0.25)


def test_two_levels_add_their_variances():
    """mean ± z·sqrt(between/S + within/(S·N)) where both levels matter; either alone would be too narrow."""
    generator = torch.Generator().manual_seed(0)
    offsets = torch.randn(60, generator=generator, dtype=torch.float64)
    groups = list(offsets[:, None] + 4 * torch.randn(60, 16, generator=generator, dtype=torch.float64))
    low, high = two_level_bootstrap_interval(groups, confidence=0.9, num_resamples=8000)
    means = torch.stack(groups).mean(1)
    within = torch.stack(groups).var(1, unbiased=False).mean() / 16
    half = 1.645 * ((means.var(unbiased=False) + within) / 60).sqrt().item()
    assert low == pytest.approx(means.mean().item() - half, abs=0.1 * half)
    assert high == pytest.approx(means.mean().item() + half, abs=0.1 * half)


def test_two_levels_draw_the_same_resamples_for_every_quantity():
    """So a shifted quantity has the shifted interval, and the global generator is not touched."""
    groups = list(torch.randn(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    state = torch.get_rng_state()
    first = two_level_bootstrap_interval(groups, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    shifted = two_level_bootstrap_interval([2 * values + 1 for values in groups], seed=3)
    assert shifted == pytest.approx([2 * bound + 1 for bound in first])
    assert two_level_bootstrap_interval(groups, seed=4) != first


@pytest.fixture(scope="module")
def simulation():
    """`benchmarks/intervals.py`: the simulation, for all repetitions at once."""
    return SimpleNamespace(**runpy.run_path(str(BENCHMARKS / "intervals.py")))


def test_clustered_interval_covers(simulation):
    """
    At 95%, between 93% and 98% for rates of 0.5 to 0.95, and at least 94% from there to 1, over clustered rollouts.
    Of the whole grid this is a sample, each rate and each correlation twice or more; the committed simulation has all.
    """
    rng = np.random.default_rng(1)
    correlations = [(1, 0.0), (2, 0.3), (4, 0.0), (32, 0.6), (2, 0.9), (4, "mixture"), (32, 0.0), (32, 1.0)]
    rates = [0.5, 0.8, 0.95, 0.97, 0.99, 0.995, 1.0]
    for (k, correlation), rate in zip(2 * correlations, itertools.cycle(rates)):
        case = rate, correlation, k, 200
        assert simulation.same_as_the_function(*case, rng), case
        coverage = simulation.coverage(*case, 4000, rng)
        assert coverage >= (0.93 if rate <= 0.95 else 0.94), case
        assert coverage <= 0.98 or rate > 0.95, case


def test_the_committed_simulation_covers(simulation):
    """The whole grid, as it was run."""
    record = json.loads((BENCHMARKS / "results" / "intervals.json").read_text())
    assert [tuple(row[:-1]) for row in record["rows"]] == simulation.GRID
    assert record["repetitions"] >= 5000
    for rate, *_, coverage in record["rows"]:
        assert coverage >= (0.93 if rate <= 0.95 else 0.94)
        assert coverage <= 0.98 or rate > 0.95


def test_clusters_that_agree_count_once():
    """One trial in each is Clopper-Pearson; eight equal outcomes of a prompt are one; so they are where none differs."""
    for k, n in [(0, 5), (3, 7), (40, 41), (512, 512)]:
        expected = pytest.approx(clopper_pearson_interval(k, n), rel=1e-12)
        assert clustered_rate_interval((torch.arange(n) < k).long(), torch.ones(n, dtype=torch.long)) == expected
    outcomes = (torch.arange(50) < 30).long()
    expected = pytest.approx(clopper_pearson_interval(30, 50), rel=1e-9)
    assert clustered_rate_interval(8 * outcomes, torch.full((50,), 8)) == expected
    full = torch.full((50,), 8)
    assert clustered_rate_interval(full, full) == pytest.approx(clopper_pearson_interval(50, 50), rel=1e-9)
    assert clustered_rate_interval(torch.tensor([3]), torch.tensor([6])) == pytest.approx(
        (beta.ppf(0.025, 0.5, 1.5), beta.ppf(0.975, 1.5, 0.5)), rel=1e-9
    )


def test_clustered_interval_of_unequal_clusters():
    """The formula, with SciPy's quantiles: variance of a ratio, its degrees of freedom, and the discount."""
    generator = torch.Generator().manual_seed(0)
    trials = torch.randint(1, 9, (120,), generator=generator)
    rates = torch.rand(120, generator=generator) ** 0.5
    successes = torch.binomial(trials.double(), rates.double(), generator=generator).long()
    n, rate = trials.sum().item(), (successes.sum() / trials.sum()).item()
    squares = (successes.double() - rate * trials).square().numpy()
    estimate = rate * (1 - rate) / (120 / 119 * squares.sum() / n**2)
    least = n**2 / trials.square().sum().item()
    assert least < estimate < n
    degrees = 2 * squares.sum() ** 2 / ((squares**2).sum() - squares.sum() ** 2 / 120)
    effective = least + (estimate - least) * (1.959964 / student_t.ppf(0.975, degrees)) ** 4
    expected = (
        beta.ppf(0.025, rate * effective, (1 - rate) * effective + 1),
        beta.ppf(0.975, rate * effective + 1, (1 - rate) * effective),
    )
    assert clustered_rate_interval(successes, trials) == pytest.approx(expected, rel=1e-5)
    order = torch.randperm(120, generator=generator)
    assert clustered_rate_interval(successes[order], trials[order]) == pytest.approx(expected, rel=1e-5)
    low, high = clustered_rate_interval(trials - successes, trials)
    assert (1 - high, 1 - low) == pytest.approx(expected, rel=1e-5)
