"""The comparison's plots and table, from records alone, looked at through the figures' artists."""

import itertools
from dataclasses import replace

import pytest
from helpers import make_cell
from matplotlib.text import Text

from trl_cmdp.evaluation import compare_methods
from trl_cmdp.evaluation.rates import ValueWithInterval
from trl_cmdp.reports import comparison_table, plot_comparison_curves, plot_pareto
from trl_cmdp.reports.pareto import ParetoPoint, draw_pareto


def record(method, seed, right, cost, history=(), trainer="constrained"):
    outcomes = [(int(i < right), int(i < right), cost * (0.8 + 0.02 * i), 10) for i in range(20)]
    return make_cell(method, seed, outcomes, history=list(history), trainer=trainer)


def history(scale, **keys):
    return [{"step": step, "reward": scale, **dict.fromkeys(keys, scale * step)} for step in range(1, 9)]


@pytest.fixture
def records():
    constrained = {"cost": True, "satisfaction": True}
    cells = []
    for seed in (0, 1):
        cells += [
            record("constrained", seed, 18 + seed, 0.05, history(0.1 * (1 + seed), **constrained)),
            record("grpo", seed, 19, 0.6, history(0.2)),
            *(record(f"near-{i}", seed, 18 + seed, 0.05 + 0.001 * i, history(0.1, **constrained)) for i in range(10)),
            record("student", seed, 15, 1.5, trainer="none"),
            record("teacher", seed, 17, 0.0, trainer="none"),
        ]
    return cells


def points(axes):
    return {container.get_label(): container.lines[0] for container in axes.containers}


def test_pareto_fills_what_satisfies_the_limit_and_draws_the_limit(tmp_path, records):
    figure = plot_pareto(compare_methods(records), tmp_path / "pareto.png", "title")
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"  # 0.05 to 1.5 nats per token
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["limit"].get_xdata()) == [0.25, 0.25]
    assert list(lines["teacher"].get_ydata()) == [0.85, 0.85]
    drawn = points(axes)
    assert drawn["constrained"].get_markerfacecolor() == drawn["constrained"].get_color()
    assert drawn["grpo"].get_markerfacecolor() == "white"
    assert drawn["grpo"].get_marker() != drawn["untrained student"].get_marker()
    assert list(drawn["constrained"].get_ydata()) == [pytest.approx(0.925)]
    assert len({drawn[name].get_color() for name in drawn}) == len(drawn) == 13


def test_pareto_labels_every_point_without_overlap(tmp_path, records):
    figure = plot_pareto(compare_methods(records), tmp_path / "pareto.png", "title")
    texts = figure.axes[0].texts
    assert {"constrained", "grpo", "untrained student", "limit 0.25", "near-9"} <= {text.get_text() for text in texts}
    for one, other in itertools.combinations(texts, 2):
        boxes = [Text.get_window_extent(text) for text in (one, other)]
        assert not boxes[0].overlaps(boxes[1]), f"{one.get_text()} covers {other.get_text()}"


def test_no_label_lies_on_the_teachers_line():
    """Nor that of a method just below it, whose nearest place is there."""
    cost, *shares = (ValueWithInterval(value, value, value) for value in (0.05, 0.5, 0.0, 1.0))
    points = [ParetoPoint(f"method {index}", cost, share, True) for index, share in enumerate(shares)]
    axes = draw_pareto(points, 0.25, cost_label="cost", teacher_correct=0.51).axes[0]
    line = axes.transData.transform((0.25, 0.51))[1]
    for text in axes.texts:
        box = Text.get_window_extent(text)
        assert not box.y0 < line < box.y1, text.get_text()


def test_a_narrow_range_of_costs_is_drawn_on_a_linear_axis(tmp_path):
    comparison = compare_methods([record("a", 0, 18, 0.2), record("b", 0, 17, 0.3)])
    assert plot_pareto(comparison, tmp_path / "pareto.png", "title").axes[0].get_xscale() == "linear"


def test_curves_are_means_over_seeds_smoothed_over_five_steps(tmp_path, records):
    figure = plot_comparison_curves(records, tmp_path / "curves.png", "title")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    reward, cost, satisfaction = ({line.get_label(): line for line in axes.lines} for axes in figure.axes)
    assert list(reward["constrained"].get_ydata()) == pytest.approx([0.15] * 8)
    # The mean of seeds is 0.15 * step: at step 8 that of steps 4 to 8, at step 1 of itself alone.
    assert cost["constrained"].get_ydata()[[0, 7]] == pytest.approx([0.15, 0.15 * 6])
    assert list(satisfaction["constrained"].get_xdata()) == list(range(1, 9))
    assert list(cost["limit"].get_ydata()) == [0.25, 0.25]
    assert len(reward["grpo"].get_ydata()) == 8
    assert len(cost["grpo"].get_ydata()) == 0  # not logged without a teacher
    assert not {"student", "teacher"} & reward.keys()
    legend = {text.get_text() for text in figure.legends[0].get_texts()}
    assert legend == reward.keys() | {"limit"}


def test_curves_of_a_long_run_are_averaged_over_a_twentieth_of_it(tmp_path):
    steps = [{"step": step, "reward": float(step)} for step in range(1, 201)]
    figure = plot_comparison_curves([record("mine", 0, 18, 0.05, steps)], tmp_path / "curves.png", "title")
    (line,) = figure.axes[0].lines
    assert line.get_ydata()[-1] == pytest.approx(sum(range(191, 201)) / 10)


def test_the_reference_is_drawn_thick_above_the_others(tmp_path, records):
    figure = plot_comparison_curves(records, tmp_path / "curves.png", "title", "near-3")
    for axes in figure.axes:
        lines = {line.get_label(): line for line in axes.lines}
        own = lines.pop("near-3")
        assert all(own.get_linewidth() > line.get_linewidth() for line in lines.values())
        assert all(own.get_zorder() > line.get_zorder() for line in lines.values())


def test_a_method_of_fewer_seeds_says_so(tmp_path, records):
    fewer = [record for record in records if (record.method, record.seed) != ("grpo", 1)]
    figure = plot_comparison_curves(fewer, tmp_path / "curves.png", "title")
    legend = {text.get_text() for text in figure.legends[0].get_texts()}
    points = {text.get_text() for text in plot_pareto(compare_methods(fewer), tmp_path / "p.png", "").axes[0].texts}
    assert {"grpo (1 of 2 seeds)", "constrained", "near-9"} <= legend & points


def test_a_legend_of_long_names_stays_within_the_figure(tmp_path, records):
    named = [replace(one, method=f"a method with a name of its own, {one.method}") for one in records]
    figure = plot_comparison_curves(named, tmp_path / "curves.png", "title")
    box = figure.legends[0].get_window_extent(figure.canvas.get_renderer())
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    assert len(figure.legends) == 1


def test_only_references_still_draw(tmp_path):
    records = [record("student", 0, 15, 1.5, trainer="none"), record("teacher", 0, 17, 0.0, trainer="none")]
    plot_comparison_curves(records, tmp_path / "curves.png", "title")
    plot_pareto(compare_methods(records), tmp_path / "pareto.png", "title")


def test_the_table_has_a_row_for_each_method_by_rank(records):
    lines = comparison_table(compare_methods(records)).splitlines()
    assert lines[0].startswith("| rank | method |")
    assert len({line.count("|") for line in lines[:16]}) == 1
    assert lines[2].startswith("| 1 |")
    assert any(line.startswith("| 12 | grpo |") for line in lines)
    assert "| – | untrained student |" in "\n".join(lines)
    assert "limit 0.25" in lines[-1]


def test_the_table_has_columns_for_what_is_known():
    """Steps where they are checked, rewards where they say more than right and wrong, and the unit of the scope."""

    def columns(outcome, **settings):
        cell = make_cell("a", 0, [outcome] * 3, settings={"cost_limit": 0.25, **settings})
        header, *_, note = comparison_table(compare_methods([cell])).splitlines()
        return header, note

    assert "| correct [95%] | valid [95%] | satisfaction [95%] |" in columns((1, 1, 0.1, 3))[0]
    assert "| correct [95%] | satisfaction [95%] |" in columns((1, None, 0.1, 3))[0]
    assert "| correct [95%] | reward [95%] | satisfaction [95%] |" in columns((1, None, 0.1, 3, 0.5))[0]
    assert "| correct [95%] | reward [95%] | valid [95%] |" in columns((1, 1, 0.1, 3, 0.5))[0]
    assert "limit 0.25 nats per token." in columns((1, 1, 0.1, 3))[1]
    assert "limit 0.25 nats per rollout." in columns((1, 1, 0.1, 3), cost_scope="sum")[1]


def test_plots_name_the_unit_of_the_scope(tmp_path):
    cell = make_cell("a", 0, [(1, None, 0.1, 3)], settings={"cost_limit": 0.25, "cost_scope": "sum"})
    pareto = plot_pareto(compare_methods([cell]), tmp_path / "pareto.png", "title")
    assert "nats per rollout" in pareto.axes[0].get_xlabel()
    curves = plot_comparison_curves([cell], tmp_path / "curves.png", "title")
    assert [axes.get_ylabel() for axes in curves.axes][1] == "nats per rollout"
