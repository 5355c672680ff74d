"""Curves are drawn from a log history alone."""

import pytest
from matplotlib.figure import Figure

from trl_cmdp.reports import plot_training_curves
from trl_cmdp.reports.runs import TrainingRun
from trl_cmdp.reports.training_curves import TRAINING_PANELS


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


def run(name, steps=12, batch_size=8, **metrics):
    history = [entry(step, **{**CONSTRAINT, **metrics}) for step in range(1, steps + 1)]
    return TrainingRun(name, "", history, batch_size, steps)


def drawn(name, runs):
    """Axes and caption of one panel."""
    panel = next(panel for panel in TRAINING_PANELS if panel.name == name)
    axes = Figure().subplots()
    panel.draw(axes, runs, dict.fromkeys([one.name for one in runs], "#123456"))
    return axes, panel.caption(runs)


def test_the_intervals_of_several_runs_stand_beside_one_another():
    """Bands would lie on one another."""
    axes, caption = drawn("satisfaction", [run("one")])
    assert len(axes.collections) == 1
    assert "Shaded: 95% intervals" in caption
    axes, caption = drawn("satisfaction", [run("a"), run("b", batch_size=None), run("c")])
    assert not axes.collections
    bars = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2]
    assert len({x[0] for x in bars}) == len(bars) == 2
    assert all(x[0] == x[1] > 12 for x in bars)
    assert "Bars at the end: 95% intervals" in caption


@pytest.mark.parametrize(
    ("name", "runs", "said", "unsaid"),
    [
        ("satisfaction", [run("a", batch_size=None)], "over 10 logged values.", "interval"),
        ("cost", [run("a")], "the limit dashed.", "dotted"),
        ("cost", [run("a", **{"constraint/scheduled_limit": 0.5})], "dashed, with the schedule", "dotted"),
        ("cost", [run("a", **{"constraint/cost_max": 1.0, "constraint/limit": None})], "dotted", "dashed"),
        ("reward", [run("a")], "Logged values, and their means", "Diamonds"),
        ("reward", [run("a"), run("b", eval_reward=0.5)], "Diamonds: evaluations", "Logged values, and"),
    ],
)
def test_a_caption_is_true_of_what_is_drawn(name, runs, said, unsaid):
    axes, caption = drawn(name, runs)
    assert said in caption
    assert unsaid not in caption
    labels = axes.get_legend_handles_labels()[1]
    assert ("limit" in labels) == ("dashed" in caption)
    assert ("largest of a rollout" in labels) == ("dotted" in caption)


def test_a_schedule_is_drawn_as_the_limit_is():
    axes, _ = drawn("cost", [run("a", **{"constraint/scheduled_limit": 0.5})])
    dashed = [set(line.get_ydata()) for line in axes.lines if line.get_linestyle() == "--" and len(line.get_ydata())]
    assert dashed == [{0.3}, {0.5}]


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_steps_are_whole(steps):
    axes, _ = drawn("reward", [run("a", steps)])
    axes.figure.draw_without_rendering()
    assert all(tick == round(tick) for tick in axes.get_xticks())
