"""The one-file version runs, and its signal is the library's."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

from trl_cmdp.core import constrained_advantages, rollout_cost, unrewarded_weights, violation_weights


SCRIPT = Path(__file__).parents[2] / "examples" / "minimal_loop.py"


@pytest.mark.parametrize("unrewarded", [0.0, 1.0])
@pytest.mark.parametrize("width", [1.0, 1.5])
def test_its_signal_is_the_librarys(unrewarded, width):
    loop = runpy.run_path(str(SCRIPT))["advantages_and_weights"].__globals__
    loop["UNREWARDED_COEF"] = unrewarded
    torch.manual_seed(0)
    costs = torch.rand(24, 6) * 4 * loop["COST_LIMIT"]
    mask = torch.arange(6) < torch.randint(1, 7, (24, 1))
    rewards = torch.randint(0, 2, (24,)).float()
    limit = width * loop["COST_LIMIT"]
    advantages, weights = loop["advantages_and_weights"](rewards, rollout_cost(costs, mask), mask, limit)
    expected = constrained_advantages(rewards, costs, mask, loop["GROUP"], limit, loop["PENALTY"])
    assert 0 < weights.sum() < mask.sum()
    torch.testing.assert_close(advantages, expected)
    expected = loop["VIOLATION_COEF"] * violation_weights(costs, mask, limit)
    expected += unrewarded * unrewarded_weights(rewards, costs, mask, loop["GROUP"], loop["COST_LIMIT"])
    torch.testing.assert_close(weights, expected)


def test_it_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--steps", "2"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "step   1" in capsys.readouterr().out
