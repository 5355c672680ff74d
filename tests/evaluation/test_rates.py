"""A rate is its count, and its interval is Wilson's."""

from trl_cmdp.core import wilson_interval
from trl_cmdp.evaluation import Rate


def test_rate_counts_outcomes():
    rate = Rate.of(x > 2 for x in range(10))
    assert (rate.k, rate.n, rate.value) == (7, 10, 0.7)
    assert rate.interval == wilson_interval(7, 10, 0.95)
