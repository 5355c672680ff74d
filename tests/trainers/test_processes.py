"""Two and four processes over gloo on the CPU give what one gives on the same global batch (oracle 5)."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from helpers import METRICS, run_processes
from test_finite_gradients import all_finite, same

from trl_cmdp.trainers.engine.checkpoints import last_whole_checkpoint


SCRIPT = Path(__file__).parent / "scripts" / "several_processes.py"
JUDGED = [*METRICS, "frac_reward_zero_std"]
SETTINGS = runpy.run_path(str(SCRIPT))["SETTINGS"]
OF_SOME = ["lagrange_multiplier", "constraint/satisfaction_rate/first", "constraint/satisfaction_rate/second"]


def load(path: Path, processes: int) -> dict:
    by_setting = torch.load(path / "results.pt")
    assert all(result["processes"] == processes for result in by_setting.values())
    return by_setting


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory):
    path = tmp_path_factory.mktemp("one")
    runpy.run_path(str(SCRIPT))["main"](str(path))
    return load(path, 1)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def output(request, tmp_path_factory):
    """Folder with what several processes made of it, and how many they were."""
    path = tmp_path_factory.mktemp("several")
    run_processes(request.param, SCRIPT, path)
    return path, request.param


@pytest.fixture(scope="module")
def results(of_one_process, output):
    return of_one_process, load(*output)


@pytest.mark.parametrize("setting", SETTINGS)
def test_same_metrics_and_weights(results, setting):
    one, several = (result[setting] for result in results)
    if setting != "gkd":
        assert several["cost"] == pytest.approx(one["cost"], rel=1e-5)
    for step in range(3):
        logged = [name for name in ["loss", "grad_norm", *JUDGED, *OF_SOME] if name in one["history"][step]]
        assert len(logged) >= 5
        for name in logged:
            expected = one["history"][step][name]
            assert several["history"][step][name] == pytest.approx(expected, rel=1e-5, abs=1e-5), (name, step)
    for name in JUDGED:
        # Without `rollout_func` an evaluation samples, from a random state of each process.
        if setting != "gkd":
            expected = one["evaluation"][f"eval_{name}"]
            assert several["evaluation"][f"eval_{name}"] == pytest.approx(expected, rel=1e-4, abs=1e-6), name
    for name, value in one["weights"].items():
        torch.testing.assert_close(several["weights"][name], value, rtol=1e-5, atol=1e-5)


def test_limit_is_found(results):
    """The auto limit is a function of global costs, and this run does find it."""
    limits = [entry.get("constraint/limit") for entry in results[1]["auto_limit"]["history"][:3]]
    assert limits[:2] == [None, None]
    assert limits[2] > 0


def test_multiplier_is_the_same_on_every_process(output):
    """Digit for digit, and it does move."""
    path, processes = output
    logged = {(path / f"multiplier_{rank}.txt").read_text() for rank in range(processes)}
    assert len(logged) == 1
    assert len(set(json.loads(logged.pop()))) == 3


def test_each_process_had_one_teacher(results):
    """And the shares of both were logged, over all processes."""
    for entry in results[1]["several_teachers"]["history"][:3]:
        rates = [entry[f"constraint/satisfaction_rate/{name}"] for name in ("first", "second")]
        assert min(rates) - 1e-6 <= entry["constraint/satisfaction_rate"] <= max(rates) + 1e-6
    assert any(
        entry["constraint/satisfaction_rate/first"] != entry["constraint/satisfaction_rate/second"]
        for entry in results[1]["several_teachers"]["history"][:3]
    )


def test_one_process_had_nothing_to_distil(results):
    """Nor the other one a feasible rollout: it did not hang, and the other did distil."""
    one = results[0]["one_process_violates"]
    assert max(one["cost"][:8]) < 9 < min(one["cost"][8:])
    assert all(entry["distill_loss"] > 0 for entry in one["history"][:3])


def test_one_process_had_masked_tokens_only(results):
    """Its rollouts are not judged, and cost nothing; the others are trained on."""
    for by_setting in results:
        result = by_setting["one_process_masked"]
        assert result["cost"][:8] == [0.0] * 8
        assert min(result["cost"][8:]) > 0
        for entry in result["history"][:3]:
            assert entry["constraint/unjudged_frac"] >= 0.5
            assert entry["distill_loss"] > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("poisoned", "The teacher returned NaN or infinite values at step 1"),
        ("refused", "refused the request: HTTP 400|The teacher server failed another process"),
        (
            "beyond",
            "At step 0: (The student produced a token id beyond the teacher's 16|a rollout of another process does not)",
        ),
    ],
)
def test_error_of_one_process_is_raised_on_every_process(output, name, message):
    path, processes = output
    for rank in range(processes):
        assert re.search(message, (path / f"{name}_{rank}.txt").read_text())


def test_a_run_is_resumed_exactly(output):
    """In the middle of a generation cycle."""
    path, processes = output
    assert all((path / "resume" / f"same_{rank}").exists() for rank in range(processes))


def test_a_gradient_of_one_process_is_not_finite(output):
    """All skip the step, and all end with the error: the reduction spreads what is not finite."""
    path, processes = output[0] / "nonfinite", output[1]
    states = [torch.load(path / f"one_{rank}.pt") for rank in range(processes)]
    for first, skipped, third, last in states:
        assert same(skipped, first)
        assert not same(third[0], skipped[0])
        assert same(last[0], states[0][-1][0])
    assert all_finite(states[0][-1][0])
    for rank in range(processes):
        error = (path / f"many_{rank}.txt").read_text()
        assert "3 optimizer steps in a row, the last of them step 4" in error
    assert last_whole_checkpoint(path / "many") == str(path / "many" / "checkpoint-3")
