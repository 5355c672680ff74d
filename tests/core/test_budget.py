"""Costs of rollouts and prefixes, infeasible steps and divergence weights, against loops over single tokens."""

import math

import pytest
import torch
from core_reference import SCOPES, batches, cost_of, rollout, tensors
from hypothesis import given

from trl_cmdp.core import infeasible_steps, prefix_cost, rollout_cost, violation_weights


@pytest.mark.parametrize("scope", SCOPES)
@given(batch=batches())
def test_rollout_cost(scope, batch):
    """C(y) over the tokens that count, whatever lies between and behind them."""
    costs, mask, _, _ = batch
    expected = [cost_of(rollout(c, m)[0], scope) for c, m in zip(costs, mask, strict=True)]
    assert rollout_cost(*tensors(costs, mask), scope).tolist() == expected


@pytest.mark.parametrize("scope", SCOPES)
@given(batch=batches())
def test_prefix_cost(scope, batch):
    """P_t at every position: the cost of the counted tokens before it, the position itself left out."""
    costs, mask, _, _ = batch
    expected = [
        [cost_of(rollout(c[:t], m[:t])[0], scope) for t in range(len(c))] for c, m in zip(costs, mask, strict=True)
    ]
    assert prefix_cost(*tensors(costs, mask), scope).tolist() == expected


@pytest.mark.parametrize("scope", SCOPES)
@given(batch=batches())
def test_infeasible_steps(scope, batch):
    """P_t > d before the last counted token, C > d at it, never on a masked position; at the limit is feasible."""
    costs, mask, limit, _ = batch
    expected = []
    for c, m in zip(costs, mask, strict=True):
        tokens, positions = rollout(c, m)
        row = [False] * len(c)
        for t, position in enumerate(positions):
            judged = tokens if t == len(tokens) - 1 else tokens[:t]
            row[position] = cost_of(judged, scope) > limit
        expected.append(row)
    assert infeasible_steps(*tensors(costs, mask), limit, scope).tolist() == expected


@pytest.mark.parametrize("scope", SCOPES)
@given(batch=batches())
def test_violation_weights(scope, batch):
    """w_t: 1 on every token of a violating rollout (trajectory), on the infeasible steps (token)."""
    costs, mask, limit, _ = batch
    expected = [
        [float(counts and cost_of(rollout(c, m)[0], scope) > limit) for counts in m]
        for c, m in zip(costs, mask, strict=True)
    ]
    arguments = (*tensors(costs, mask), limit, scope)
    assert violation_weights(*arguments).tolist() == expected
    assert violation_weights(*arguments, "trajectory").tolist() == expected
    assert violation_weights(*arguments, "token").tolist() == infeasible_steps(*arguments).double().tolist()


def test_scopes_by_hand():
    """Costs 1, 4, 1 with a tool's output between: mean 2, sum 6, worst prefix (1 + 4)/2."""
    costs = torch.tensor([[1.0, math.nan, 4.0, 1.0, math.inf]])
    mask = torch.tensor([[1, 0, 1, 1, 0]])
    assert [rollout_cost(costs, mask, scope).item() for scope in SCOPES] == [2.0, 6.0, 2.5]
    assert prefix_cost(costs, mask, "mean").tolist() == [[0.0, 1.0, 1.0, 2.5, 2.0]]
    assert prefix_cost(costs, mask, "sum").tolist() == [[0.0, 1.0, 1.0, 5.0, 6.0]]
    assert prefix_cost(costs, mask, "worst_prefix").tolist() == [[0.0, 1.0, 1.0, 2.5, 2.5]]


def test_negative_costs():
    """A sampled log-ratio can be negative: the worst prefix is then negative too, and an empty rollout still costs 0."""
    costs = torch.tensor([[-2.0, -1.0, -3.0], [-1.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    assert rollout_cost(costs, mask, "worst_prefix").tolist() == [-1.5, 0.0]
    assert prefix_cost(costs, mask, "worst_prefix").tolist() == [[0.0, -2.0, -1.5], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_any_mask_dtype_and_padding(scope, dtype):
    """Bool, integer and float masks are the same mask, and columns of padding change nothing."""
    costs, mask = torch.rand(5, 8), torch.rand(5, 8) < 0.6
    expected = rollout_cost(costs, mask, scope)
    padded = torch.cat([costs, torch.full((5, 3), torch.nan)], -1)
    padded_mask = torch.cat([mask, torch.zeros(5, 3, dtype=torch.bool)], -1).to(dtype)
    assert torch.equal(rollout_cost(padded, padded_mask, scope), expected)
    assert torch.equal(prefix_cost(padded, padded_mask, scope)[:, :8], prefix_cost(costs, mask, scope))
    assert torch.equal(
        infeasible_steps(padded, padded_mask, 0.5, scope)[:, :8], infeasible_steps(costs, mask, 0.5, scope)
    )


def test_unknown_words_are_named():
    """A misspelt scope or credit assignment is an error that shows it."""
    costs, mask = torch.ones(1, 2), torch.ones(1, 2)
    for function in (rollout_cost, prefix_cost):
        with pytest.raises(ValueError, match="median"):
            function(costs, mask, "median")
    with pytest.raises(ValueError, match="median"):
        infeasible_steps(costs, mask, 1.0, "median")
    with pytest.raises(ValueError, match="step"):
        violation_weights(costs, mask, 1.0, "mean", "step")
