"""Figures from records alone: each equals what it says, by hand; differences are paired."""

from dataclasses import replace

import pytest
import torch
from helpers import make_rollout, make_settings

from trl_cmdp.core import bootstrap_interval, clopper_pearson_interval, clustered_rate_interval
from trl_cmdp.evaluation import compare_evaluations, summarize
from trl_cmdp.reports import difference_table, evaluation_table, strata_table


SETTINGS = make_settings(num_problems=3)


def record(problem, sample, costs, right=False, greedy=False, difficulty=None):
    changes = {"right": right, "greedy": greedy, "difficulty": difficulty, "truncated": len(costs) >= 8}
    return make_rollout(problem, sample, costs, **changes)


RECORDS = [
    record(0, 0, [0.1, 0.3], True, difficulty="2 steps"),  # mean 0.2, worst prefix 0.2
    record(0, 1, [0.5, 0.1], True, difficulty="2 steps"),  # mean 0.3, worst prefix 0.5
    record(1, 0, [0.4], False, difficulty="10 steps"),
    record(1, 1, [0.0] * 8, True, difficulty="10 steps"),
    record(2, 0, [0.25], False, difficulty="2 steps"),  # on the limit is within it
    record(2, 1, [0.2, 0.0, 0.1], False, difficulty="2 steps"),  # mean 0.1, worst prefix 0.2
    record(0, 0, [0.0], True, True, "2 steps"),
    record(1, 0, [1.0], False, True, "10 steps"),
    record(2, 0, [0.0], True, True, "2 steps"),
]
COSTS = [0.2, 0.3, 0.4, 0.0, 0.25, 0.1]


def clustered(*successes):
    return clustered_rate_interval(torch.tensor(successes), torch.full((len(successes),), 2))


def test_figures_are_what_they_say():
    summary = summarize(SETTINGS, RECORDS[::-1])  # in any order
    assert (summary.cost_limit, summary.cost_scope, summary.num_missing) == (0.25, "mean", 0)
    sampled, costs = summary.sampled, summary.sampled.costs
    assert (sampled.right.value, sampled.right.num_rollouts, sampled.right.num_problems) == (0.5, 6, 3)
    assert (sampled.right.low, sampled.right.high) == clustered(2, 1, 0)
    assert costs.satisfaction.value == 4 / 6
    assert (costs.satisfaction.low, costs.satisfaction.high) == clustered(1, 1, 2)
    # Of sample 0 of each problem one in three exceeds the limit.
    assert costs.violation_bound == clopper_pearson_interval(1, 3, 0.9)[1]
    assert costs.mean.value == pytest.approx(sum(COSTS) / 6)
    problem = torch.tensor([0, 0, 1, 1, 2, 2])
    expected = bootstrap_interval(torch.tensor(COSTS, dtype=torch.float64), problem)
    assert (costs.mean.low, costs.mean.high) == pytest.approx(expected)
    assert costs.quantiles["0.5"] == pytest.approx(0.225)
    assert list(costs.quantiles) == ["0.5", "0.9", "0.95", "0.99"]
    assert costs.quantiles["0.9"] == pytest.approx(0.35)
    assert costs.max == pytest.approx(0.4)
    # Every token weighs alike.
    assert costs.divergence.value == pytest.approx(1.95 / 17)
    assert costs.divergence.low <= costs.divergence.value <= costs.divergence.high
    assert costs.divergence.num_rollouts == 6
    assert sampled.length.value == pytest.approx(17 / 6)
    assert sampled.truncated.value == 1 / 6


def test_greedy_rollouts_are_apart():
    greedy = summarize(SETTINGS, RECORDS).greedy
    assert (greedy.right.value, greedy.right.num_rollouts) == (2 / 3, 3)
    assert greedy.costs.max == 1.0
    assert summarize(SETTINGS, RECORDS[:6]).greedy is None
    assert summarize(SETTINGS, RECORDS[6:]).sampled is None
    assert summarize(SETTINGS, RECORDS[6:]).num_missing == 6


def test_any_limit_and_scope_can_be_asked_of_the_same_records():
    assert summarize(SETTINGS, RECORDS, cost_limit=0.3).sampled.costs.satisfaction.value == 5 / 6
    assert summarize(SETTINGS, RECORDS, cost_limit=0.35, cost_scope="sum").sampled.costs.satisfaction.value == 3 / 6
    worst = summarize(SETTINGS, RECORDS, cost_scope="worst_prefix")
    assert (worst.cost_scope, worst.sampled.costs.max) == ("worst_prefix", 0.5)
    with pytest.raises(ValueError, match="cost_scope"):
        summarize(SETTINGS, RECORDS, cost_scope="median")


def test_strata_come_in_the_order_of_their_numbers():
    strata = summarize(SETTINGS, RECORDS).sampled.strata
    assert list(strata) == ["2 steps", "10 steps"]
    assert (strata["2 steps"].right.value, strata["10 steps"].right.value) == (0.5, 0.5)
    assert strata["10 steps"].costs.mean.value == pytest.approx(0.2)
    assert strata["10 steps"].strata == {}
    assert summarize(SETTINGS, [replace(one, difficulty=None) for one in RECORDS]).sampled.strata == {}


def test_without_a_teacher_there_is_no_cost():
    summary = summarize(replace(SETTINGS, teacher=None), [replace(one, costs=None) for one in RECORDS])
    assert summary.sampled.costs is None
    assert summary.sampled.right.value == 0.5
    assert "| – |" in evaluation_table([summary])


def test_no_records_are_an_error():
    with pytest.raises(ValueError, match="no rollouts"):
        summarize(SETTINGS, [])


def test_differences_are_paired_by_problem():
    """Where the one is always right on what the other is right on as well, every resample says the same."""
    problems = range(40)
    ours = [record(problem, 0, [0.1], right=problem % 2 == 0) for problem in problems]
    theirs = [record(problem, sample, [0.6], right=problem % 2 == 0) for problem in problems for sample in (0, 1)]
    settings = replace(SETTINGS, num_problems=40)
    other = replace(settings, name="other", num_samples=2)
    difference = compare_evaluations((settings, ours), (other, theirs[::-1]))
    assert (difference.name, difference.reference) == ("student", "other")
    assert (difference.right.value, difference.right.low, difference.right.high) == (0, 0, 0)
    assert (difference.right.num_problems, difference.right.num_rollouts) == (40, 120)
    assert difference.satisfaction.value == 1
    assert difference.cost.value == pytest.approx(-0.5)
    assert compare_evaluations((settings, ours), (other, theirs), cost_limit=1.0).satisfaction.value == 0
    # Another problem right in the one alone.
    more = [replace(ours[0], problem=1, answer="2", right=True) if one.problem == 1 else one for one in ours]
    difference = compare_evaluations((settings, more), (other, theirs)).right
    assert difference.value == pytest.approx(1 / 40)
    assert difference.low == 0
    assert 0.05 <= difference.high <= 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"seed": 1}, "`seed`"), ({"task": "other"}, "`task`"), ({"cost_limit": 1.0}, "limits")],
)
def test_other_problems_or_limits_do_not_compare(changes, message):
    with pytest.raises(ValueError, match=message):
        compare_evaluations((SETTINGS, RECORDS), (replace(SETTINGS, **changes), RECORDS))


def test_other_answers_and_no_common_rollouts_do_not_compare():
    others = [replace(one, answer="7") for one in RECORDS]
    with pytest.raises(ValueError, match="answers of problem 0"):
        compare_evaluations((SETTINGS, RECORDS), (SETTINGS, others))
    with pytest.raises(ValueError, match="no greedy rollouts"):
        compare_evaluations((SETTINGS, RECORDS), (SETTINGS, RECORDS[:6]), greedy=True)


def test_tables_show_the_figures():
    summary = summarize(replace(SETTINGS, name="a|b"), RECORDS)
    lines = evaluation_table([summary]).splitlines()
    assert lines[2].startswith("| a/b | 6 | 3 | 50.0 [")
    assert lines[3].startswith("| a/b, greedy | 3 | 3 | 66.7 [")
    assert len({line.count("|") for line in lines[:4]}) == 1
    strata = strata_table([summary]).splitlines()
    assert [line.split(" | ")[1] for line in strata[2:]] == ["2 steps", "10 steps"] * 2
    assert strata_table([summarize(SETTINGS, [replace(one, difficulty=None) for one in RECORDS])]) == ""
    difference = compare_evaluations((SETTINGS, RECORDS), (SETTINGS, RECORDS))
    assert "+0.0 [+0.0, +0.0]" in difference_table([difference])
    assert "3 of a" in evaluation_table([summarize(replace(SETTINGS, name="a"), RECORDS[:6])])
