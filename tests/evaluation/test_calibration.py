"""What a limit is chosen by: each figure equals what it says, from records made by hand."""

import pytest
import torch
from helpers import make_rollout, make_settings
from matplotlib.patches import Rectangle

from trl_cmdp.core import LimitRange, clustered_rate_interval
from trl_cmdp.evaluation import calibrate_limit
from trl_cmdp.reports.calibration_plot import plot_calibration


# Means 1, 2, 3 and 6; sums 2, 2, 6 and 6; worst prefixes 1.5, 2, 5 and 6. The greedy rollout does not count.
START = (
    make_settings(greedy=True),
    [
        make_rollout(1, 1, [6.0]),
        make_rollout(0, 0, [1.5, 0.5]),
        make_rollout(0, 1, [2.0]),
        make_rollout(1, 0, [5.0, 1.0]),
        make_rollout(0, 0, [99.0], greedy=True),
    ],
)
IMITATION = (
    make_settings(name="after", student="after", greedy=False),
    [make_rollout(problem, sample, [0.1 + 0.1 * sample]) for problem in (0, 1) for sample in (0, 1)],
)


def test_figures_are_what_they_say():
    calibration = calibrate_limit(START, IMITATION, limits=[2.5, 1.0, 0.15])
    assert calibration.cost_scope == "mean"
    assert calibration.limits == [0.15, 1.0, 2.5]
    start, imitation = calibration.start, calibration.imitation
    assert (start.num_rollouts, imitation.num_rollouts) == (4, 4)
    assert list(start.quantiles) == ["mean", "sum", "worst_prefix"]
    assert [quantiles["0.5"] for quantiles in start.quantiles.values()] == [2.5, 4.0, 3.5]
    assert start.quantiles["mean"]["0.95"] == pytest.approx(5.55)
    assert list(start.quantiles["sum"]) == ["0.05", "0.25", "0.5", "0.75", "0.9", "0.95"]
    assert [share.value for share in start.satisfaction] == [0.0, 0.25, 0.5]  # on the limit is within it
    expected = clustered_rate_interval(torch.tensor([2, 0]), torch.tensor([2, 2]))
    assert (start.satisfaction[2].low, start.satisfaction[2].high) == expected
    assert [share.value for share in imitation.satisfaction] == [0.5, 1.0, 1.0]
    assert calibration.suggestion == LimitRange("range", pytest.approx(0.2), 2.5)


def test_another_scope_and_limits_of_its_own():
    calibration = calibrate_limit(START, cost_scope="sum")
    assert calibration.cost_scope == "sum"
    assert calibration.imitation is None
    assert calibration.suggestion == LimitRange("start_only", None, 4.0)
    assert (calibration.limits[0], calibration.limits[-1]) == (2.0, 6.0)  # 5% and 95% of the sums
    assert calibrate_limit(START, IMITATION).limits[0] == 0.15  # the median after imitation


@pytest.mark.parametrize(
    ("start", "imitation", "message"),
    [
        (START, (make_settings(seed=1), IMITATION[1]), "their `seed` are 0 and 1"),
        (START, (make_settings(teacher="another"), IMITATION[1]), "their `teacher` are 'teacher' and 'another'"),
        ((make_settings(teacher=None), START[1]), None, "measured without a teacher"),
        ((START[0], START[1][-1:]), None, "no sampled rollouts"),
    ],
)
def test_what_cannot_be_calibrated_is_said(start, imitation, message):
    with pytest.raises(ValueError, match=message):
        calibrate_limit(start, imitation)


def test_a_students_own_base_is_the_same_teacher_after_imitation():
    start = make_settings(student="adapter", teacher="adapter, adapter base"), START[1]
    after = make_settings(student="out/imitation", teacher="out/imitation, adapter base"), IMITATION[1]
    assert calibrate_limit(start, after).suggestion.verdict == "range"


def test_the_plot_shades_the_range_and_marks_each_limit(tmp_path):
    calibration = calibrate_limit(START, IMITATION, limits=[0.15, 1.0])
    figure = plot_calibration(calibration, [START, IMITATION], tmp_path / "calibration.png")
    assert (tmp_path / "calibration.png").read_bytes().startswith(b"\x89PNG")
    histogram, satisfaction = figure.axes
    for axes in figure.axes:
        spans = [
            patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_label() == "suggested range"
        ]
        assert [(span.get_x(), span.get_x() + span.get_width()) for span in spans] == [pytest.approx((0.2, 2.5))]
    heights = [patch.get_height() for container in histogram.containers for patch in container]
    assert sum(heights) == pytest.approx(2)  # every rollout of both students is in a bin
    marks = [container.lines[0].get_xydata()[0].tolist() for container in satisfaction.containers]
    assert marks == [[0.15, 0.0], [1.0, 0.25], [0.15, 0.5], [1.0, 1.0]]


def test_the_plot_of_a_student_that_is_its_teacher(tmp_path):
    same = START[0], [make_rollout(problem, sample, [0.0]) for problem in (0, 1) for sample in (0, 1)]
    calibration = calibrate_limit(same)
    assert (calibration.suggestion.verdict, calibration.limits) == ("inert", [])
    plot_calibration(calibration, [same], tmp_path / "calibration.png")
    assert (tmp_path / "calibration.png").stat().st_size > 0
