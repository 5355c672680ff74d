"""The modified reward, whole and by step, against loops over single tokens."""

import math

import pytest
import torch
from core_reference import SCOPES, batches, cost_of, rollout, step_rewards, tensors
from hypothesis import given
from hypothesis import strategies as st

from trl_cmdp.core import modified_reward, returns_to_go, token_modified_rewards


PENALTIES = (20.0, 2.5)


def rewards_of(rows):
    return [[1.0, 0.0, -0.5, 0.25][i % 4] for i in range(rows)]


@pytest.mark.parametrize("scope", SCOPES)
@given(batch=batches(), penalty=st.sampled_from(PENALTIES))
def test_modified_reward(scope, batch, penalty):
    """R̂ = R if C ≤ d, and −(n + C) otherwise."""
    costs, mask, limit, _ = batch
    rewards = rewards_of(len(costs))
    expected = []
    for reward, c, m in zip(rewards, costs, mask, strict=True):
        cost = cost_of(rollout(c, m)[0], scope)
        expected.append(reward if cost <= limit else -(penalty + cost))
    arguments = (torch.tensor(rewards).double(), *tensors(costs, mask), limit, penalty, scope)
    assert modified_reward(*arguments).tolist() == expected


@pytest.mark.parametrize("scope", SCOPES)
@given(batch=batches(), penalty=st.sampled_from(PENALTIES), horizon=st.integers(1, 12))
def test_token_modified_rewards(scope, batch, penalty, horizon):
    """R̂_t at every position and the sum after the end, for a horizon past, at and short of the length."""
    costs, mask, limit, _ = batch
    rewards = rewards_of(len(costs))
    expected = [
        step_rewards(reward, c, m, limit, penalty, scope, horizon)
        for reward, c, m in zip(rewards, costs, mask, strict=True)
    ]
    arguments = (torch.tensor(rewards).double(), *tensors(costs, mask), limit, penalty, scope)
    steps = token_modified_rewards(*arguments, horizon=horizon)
    torch.testing.assert_close(steps, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)

    to_go = returns_to_go(steps)
    assert to_go.shape == (len(costs), len(costs[0]))
    loops = [[sum(row[t:]) for t in range(len(row) - 1)] for row in expected]
    torch.testing.assert_close(to_go, torch.tensor(loops, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_steps_by_hand():
    """n = 10, H = 4, d = 1, scope mean, L = 3 with costs 0, 3, 3: P = 0, 0, 1.5 and C = 2."""
    costs, mask = torch.tensor([[0.0, 3.0, 3.0, 7.0]]), torch.tensor([[1, 1, 1, 0]])
    steps = token_modified_rewards(torch.tensor([5.0]), costs, mask, 1.0, 10.0, "mean", horizon=4)
    # The step that breaks the limit is not punished itself; the last one is judged by C, and one step falls after it.
    assert steps.tolist() == [[0.0, 0.0, -13 / 4, 0.0, -12 / 4]]
    assert returns_to_go(steps).tolist() == [[-6.25, -6.25, -6.25, -3.0]]


def test_a_violated_prefix_that_ends_inside_the_budget_is_paid():
    """Scope mean: P_2 > d punishes step 2, and C ≤ d still pays R at the end, with nothing after it."""
    costs, mask = torch.tensor([[2.0, 0.0, 0.0, 0.0]]), torch.ones(1, 4)
    steps = token_modified_rewards(torch.tensor([1.0]), costs, mask, 0.75, 8.0, "mean", horizon=8)
    assert steps.tolist() == [[0.0, -1.0, -1.0, 1.0, 0.0]]


def test_ending_early_does_not_escape():
    """From the violation on, every step of the horizon is paid for, so a shorter violated rollout gains nothing."""
    horizon, penalty = 8, 20.0
    totals = []
    for length in (2, 4, 8):
        costs, mask = torch.full((1, length), 3.0), torch.ones(1, length)
        steps = token_modified_rewards(torch.zeros(1), costs, mask, 0.5, penalty, "mean", horizon=horizon)
        totals.append(steps.sum().item())
    assert totals[0] == totals[1] == totals[2] == pytest.approx(-(penalty + 3) * (horizon - 1) / horizon)


def test_rewards_take_the_dtype_of_the_costs_and_stay_nan():
    """A reward that could not be scored stays NaN where it would be paid, and is unseen in a violating rollout."""
    costs, mask = torch.tensor([[0.0], [9.0]], dtype=torch.float32), torch.ones(2, 1)
    rewards = torch.tensor([math.nan, math.nan], dtype=torch.float64)
    whole = modified_reward(rewards, costs, mask, 1.0, 20.0)
    assert whole.dtype == torch.float32
    assert whole[0].isnan()
    assert whole[1] == -29.0
    steps = token_modified_rewards(rewards, costs, mask, 1.0, 20.0, horizon=1)
    assert steps.dtype == torch.float32
    assert steps[0, 0].isnan()
    assert steps[1].tolist() == [-29.0, 0.0]


@pytest.mark.parametrize("horizon", [0, -3])
def test_bad_horizon(horizon):
    """The horizon is a number of steps."""
    with pytest.raises(ValueError, match="horizon"):
        token_modified_rewards(torch.ones(1), torch.ones(1, 2), torch.ones(1, 2), 1.0, 20.0, horizon=horizon)
