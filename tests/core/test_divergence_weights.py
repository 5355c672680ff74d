"""Where the divergence is differentiated because the reward is silent, against loops over groups and rollouts."""

import math

import pytest
import torch
from core_reference import SCOPES, batches, tensors
from hypothesis import given
from hypothesis import strategies as st

from trl_cmdp.core import RewardRange, rollout_cost, unrewarded_weights


NAN = math.nan
GROUP = 4


def weight_of(own: float, group: list[float], cost: float, limit: float) -> float:
    """One rollout's weight: 1 less the group's success, 0.3 at least and where it did better within the limit, times d/C."""
    scored = [success for success in group if not math.isnan(success)]
    mean = sum(scored) / len(scored) if scored else 0.0
    better = not math.isnan(own) and own > min(scored) and own > mean
    weight = 0.0 if better and cost <= limit else 1 - mean
    return max(weight, 0.3) * limit / max(cost, limit)


@pytest.mark.parametrize("scope", SCOPES)
@given(batch=batches(), data=st.data())
def test_equals_the_loops(scope, batch, data):
    """Every token that counts has its rollout's weight."""
    costs, mask = tensors(*batch[:2])
    limit, rows = batch[2], len(costs) // GROUP * GROUP
    costs, mask = costs[:rows], mask[:rows]
    values = st.sampled_from([0.0, 0.1, 0.5, 1.0, NAN])
    success = data.draw(st.lists(values, min_size=rows, max_size=rows))
    expected = torch.zeros_like(costs)
    for row, own in enumerate(success):
        cost = rollout_cost(costs[row : row + 1], mask[row : row + 1], scope).item()
        expected[row] = weight_of(own, success[row // GROUP * GROUP :][:GROUP], cost, limit) * (mask[row] != 0)
    weights = unrewarded_weights(torch.tensor(success, dtype=torch.float64), costs, mask, GROUP, limit, scope)
    torch.testing.assert_close(weights, expected)


def test_by_hand():
    """All wrong; half correct, one of them at twice the limit; all correct, one at twice the limit; one not scored; one
    value, whose mean rounds."""
    success = torch.tensor([0, 0, 0, 0, 1, 0, 1, 0, 1, 1, 1, 1, 0, NAN, 1, 0, 0.1, 0.1, 0.1, 0.1])
    costs, mask = torch.zeros(20, 1), torch.ones(20, 1)
    costs[6] = costs[8] = 2.0
    weights = unrewarded_weights(success, costs, mask, GROUP, 1.0).flatten()
    expected = [1, 1, 1, 1, 0.3, 0.5, 0.25, 0.5, 0.15, 0.3, 0.3, 0.3, 2 / 3, 2 / 3, 0.3, 2 / 3, 0.9, 0.9, 0.9, 0.9]
    torch.testing.assert_close(weights, torch.tensor(expected))


class TestRewardRange:
    def test_success_is_where_a_reward_stands_between_the_extremes_of_the_run(self):
        seen = RewardRange()
        seen.update(torch.tensor([-2.0, NAN, 2.0]))
        seen.update(torch.tensor([0.0, 1.0]))
        assert (seen.low, seen.high) == (-2.0, 2.0)
        torch.testing.assert_close(
            seen.success(torch.tensor([-2.0, 0.0, 2.0, NAN, 5.0])),
            torch.tensor([0.0, 0.5, 1.0, NAN, 1.0]),
            equal_nan=True,
        )

    @pytest.mark.parametrize("rewards", [[], [NAN, NAN], [1.0, 1.0], [0.0, NAN]])
    def test_one_value_is_no_success(self, rewards):
        """Nobody knows whether it is high or low, until the run has seen another."""
        seen = RewardRange()
        seen.update(torch.tensor(rewards))
        torch.testing.assert_close(seen.success(torch.tensor([1.0, NAN])), torch.tensor([0.0, NAN]), equal_nan=True)

    def test_batch_that_is_right_as_a_whole(self):
        """What was learned of the scale before still holds."""
        seen = RewardRange()
        seen.update(torch.tensor([0.0, 1.0]))
        seen.update(torch.ones(4))
        assert seen.success(torch.ones(4)).tolist() == [1.0] * 4

    @given(st.lists(st.sampled_from([0.0, 1.0, 3.0]), min_size=2), st.sampled_from([0.01, 100.0]), st.integers(-5, 5))
    def test_neither_scale_nor_shift_of_a_reward_matters(self, values, scale, shift):
        rewards = torch.tensor(values, dtype=torch.float64)
        plain, moved = RewardRange(), RewardRange()
        plain.update(rewards)
        moved.update(scale * rewards + shift)
        torch.testing.assert_close(plain.success(rewards), moved.success(scale * rewards + shift))
