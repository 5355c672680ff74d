"""Calibration of a limit: quantiles, candidates, and the suggested range in each of its four cases."""

import pytest
import torch

from trl_cmdp.core import LimitRange, candidate_limits, cost_quantiles, suggested_limit_range


def test_quantiles_are_interpolated():
    costs = torch.tensor([4.0, 0.0, 1.0, 3.0, 2.0])
    assert cost_quantiles(costs, (0.0, 0.1, 0.5, 1.0)) == pytest.approx([0.0, 0.4, 2.0, 4.0])
    with pytest.raises(ValueError, match="non-empty"):
        cost_quantiles(torch.tensor([]), (0.5,))


def test_candidates_go_from_end_to_end_on_a_logarithmic_scale():
    assert candidate_limits(0.01, 10, 4) == [0.01, 0.1, 1.0, 10.0]
    assert candidate_limits(0.0123, 1.987) == [0.012, 0.029, 0.067, 0.16, 0.36, 0.85, 2.0]
    assert candidate_limits(0.0, 2.0, 2) == [0.002, 2.0]  # no logarithm of 0
    assert candidate_limits(1.0, 1.0) == [1.0]
    for low, high in ((0.0, 0.0), (2.0, 1.0)):
        with pytest.raises(ValueError, match="ascending"):
            candidate_limits(low, high)


@pytest.mark.parametrize(
    ("start", "imitation", "expected"),
    [
        ([1.0, 2.0, 9.0], [0.1, 0.1, 0.1], ("range", 0.1, 2.0)),
        ([1.0, 2.0, 9.0], None, ("start_only", None, 2.0)),
        ([1.0, 2.0, 9.0], [0.1, 2.0, 2.0], ("not_below", 2.0, 2.0)),  # its upper end is not below the median
        ([0.0, 0.001, 0.002], [0.0, 0.0, 0.0], ("inert", 0.0, 0.001)),
        ([0.0, 0.001, 0.002], None, ("inert", None, 0.001)),
        ([0.0, 0.001, 5.0], None, ("start_only", None, 0.001)),  # a tail that a limit would cut
    ],
)
def test_suggested_range(start, imitation, expected):
    imitated = None if imitation is None else torch.tensor(imitation, dtype=torch.float64)
    found = suggested_limit_range(torch.tensor(start, dtype=torch.float64), imitated)
    assert found == LimitRange(expected[0], pytest.approx(expected[1]) if imitation else None, expected[2])


def test_the_lower_end_is_the_upper_quantile_of_imitation():
    """A limit there is satisfied by as many rollouts after imitation as the quantile says."""
    imitation = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    found = suggested_limit_range(torch.full((5,), 2.0), imitation, quantile=0.9)
    assert found.verdict == "range"
    assert (imitation <= found.reached).double().mean().item() == pytest.approx(0.9, abs=1e-3)
