"""A rate is its count, and its interval is Wilson's."""

import torch

from trl_cmdp.core import clustered_rate_interval, wilson_interval
from trl_cmdp.evaluation import Rate


def test_rate_counts_outcomes():
    rate = Rate.of(x > 2 for x in range(10))
    assert (rate.k, rate.n, rate.value) == (7, 10, 0.7)
    assert rate.interval == wilson_interval(7, 10, 0.95)


def test_rate_of_clusters():
    rate = Rate.of_clusters([[True, False], [True, True, True], [False]])
    assert (rate.k, rate.n, rate.clusters) == (4, 6, ((1, 2), (3, 3), (0, 1)))
    assert rate.interval == clustered_rate_interval(torch.tensor([1, 3, 0]), torch.tensor([2, 3, 1]), 0.95)
