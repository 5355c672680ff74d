"""Curves are drawn from a log history alone."""

import pytest

from trl_cmdp.reports import plot_training_curves


def entry(step, **metrics):
    return {"step": step, "reward": 0.5 + step / 100, **metrics}


CONSTRAINT = {"constraint/cost": 0.4, "constraint/limit": 0.3, "constraint/satisfaction_rate": 0.8}


@pytest.mark.parametrize("metrics", [CONSTRAINT, {}])
def test_a_png_is_written(tmp_path, metrics):
    history = [entry(step, **metrics) for step in range(1, 6)] + [{"step": 5, "train_runtime": 1.0}]
    plot_training_curves(history, tmp_path / "curves.png", "title")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_history_without_rewards_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="logging_steps"):
        plot_training_curves([{"step": 1, "loss": 0.1}], tmp_path / "curves.png", "title")
