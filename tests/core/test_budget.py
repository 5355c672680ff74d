"""Costs of rollouts and prefixes, infeasible steps and divergence weights, against loops over single tokens."""

import math

import pytest
import torch
from core_reference import SCOPES, batches, cost_of, rollout, tensors
from hypothesis import given

from trl_cmdp.core import infeasible_steps, prefix_cost, rollout_cost, violation_weights


@pytest.mark.parametrize("scope", SCOPES)
@given(batch=batches())
def test_equals_the_loops(scope, batch):
    """
    C(y) over the tokens that count, whatever lies between and behind them; P_t, the cost of the counted tokens before
    t. A step is infeasible with P_t > d before the last counted token, with C > d at it, and never where it is masked.
    """
    costs, mask, limit, _ = batch
    whole, prefixes, infeasible, violating = [], [], [], []
    for c, m in zip(costs, mask, strict=True):
        tokens, positions = rollout(c, m)
        whole.append(cost_of(tokens, scope))
        prefixes.append([cost_of(rollout(c[:t], m[:t])[0], scope) for t in range(len(c))])
        judged = [whole[-1] if positions[-1:] == [t] else cost for t, cost in enumerate(prefixes[-1])]
        infeasible.append([bool(counts) and cost > limit for counts, cost in zip(m, judged, strict=True)])
        violating.append([float(counts and whole[-1] > limit) for counts in m])
    arguments = (*tensors(costs, mask), limit, scope)
    assert rollout_cost(*tensors(costs, mask), scope).tolist() == whole
    assert prefix_cost(*tensors(costs, mask), scope).tolist() == prefixes
    assert infeasible_steps(*arguments).tolist() == infeasible
    assert violation_weights(*arguments).tolist() == violation_weights(*arguments, "trajectory").tolist() == violating
    assert violation_weights(*arguments, "token").bool().tolist() == infeasible


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
def test_any_mask_dtype(scope, dtype):
    """Bool, integer and float masks are the same mask."""
    costs, mask = torch.rand(5, 8), torch.rand(5, 8) < 0.6
    for function, *settings in ((rollout_cost, scope), (prefix_cost, scope), (infeasible_steps, 0.5, scope)):
        assert torch.equal(function(costs, mask.to(dtype), *settings), function(costs, mask.long(), *settings))


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
