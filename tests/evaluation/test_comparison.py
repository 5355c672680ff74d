"""Comparison of methods: known answers on hand-made records, ranking, pairing; records to JSON and back."""

import json
from dataclasses import replace

import pytest
from helpers import make_cell

from trl_cmdp.evaluation import CellRecord, compare_methods, read_records
from trl_cmdp.evaluation.comparison import steps_to_satisfaction


def outcomes(right, satisfied, n=20):
    """The first `right` of n answers correct; `satisfied` of n costs exactly at the limit, the others above."""
    return [(int(i < right), int(i < right), 0.25 if i < satisfied else 0.75, 10) for i in range(n)]


def row(comparison, method):
    return next(row for row in comparison.methods if row.method == method)


def satisfactions(*values):
    return [{"step": step, "reward": 0.5, "satisfaction": value} for step, value in enumerate(values, start=1)]


def test_means_over_seeds_with_their_intervals():
    summary = row(
        compare_methods([make_cell("a", 0, outcomes(20, 20)), make_cell("a", 1, outcomes(10, 19), wall_s=20)]), "a"
    )
    assert (summary.right.value, summary.right.by_seed) == (0.75, {0: 1.0, 1: 0.5})
    assert summary.satisfaction.value == pytest.approx(0.975)  # a cost at the limit satisfies it
    assert summary.cost.value == pytest.approx((0.25 + (19 * 0.25 + 0.75) / 20) / 2)
    assert summary.wall_s == 15
    assert summary.right.low < 0.5 < 0.75 < summary.right.high == 1.0  # seed 1 alone, and seed 0 alone
    certain = row(compare_methods([make_cell("a", 0, outcomes(20, 20))]), "a")
    assert (certain.right.low, certain.right.value, certain.right.high) == (1.0, 1.0, 1.0)


def test_feasibility_ranks_before_right_answers():
    comparison = compare_methods(
        [
            make_cell("student", 0, outcomes(20, 20), trainer="none"),
            make_cell("best-but-outside", 0, outcomes(20, 18)),
            make_cell("second", 0, outcomes(15, 20)),
            make_cell("first", 0, outcomes(16, 19)),
            make_cell("worst", 0, outcomes(3, 18)),
        ]
    )
    assert [(summary.method, summary.rank, summary.feasible) for summary in comparison.methods] == [
        ("first", 1, True),
        ("second", 2, True),
        ("best-but-outside", 3, False),
        ("worst", 4, False),
        ("student", None, True),
    ]


def test_differences_are_paired_by_problem_and_by_seed():
    """A method that is right on one problem more in each seed differs by exactly that, however the seeds differ."""
    ours, theirs = [outcomes(20, 20), outcomes(5, 20)], [outcomes(19, 20), outcomes(4, 20)]
    records = [make_cell("other", seed, cell) for seed, cell in enumerate(ours)]
    records += [make_cell("constrained", seed, cell) for seed, cell in enumerate(theirs)]
    comparison = compare_methods(records)
    assert comparison.reference == "constrained"
    difference = row(comparison, "other").right_difference
    assert difference.value == pytest.approx(0.05)
    assert difference.by_seed == pytest.approx({0: 0.05, 1: 0.05})
    # One problem of 20 in each seed: far narrower than the spread of the seeds, 1.0 to 0.25.
    assert 0 <= difference.low < 0.05 < difference.high <= 0.2
    same = row(comparison, "other").satisfaction_difference
    assert (same.low, same.value, same.high) == (0, 0, 0)
    assert row(comparison, "constrained").right_difference is None


def test_the_reference_is_the_first_trained_method_without_constrained():
    records = [
        make_cell("student", 0, outcomes(9, 9), trainer="none"),
        make_cell("b", 0, outcomes(9, 9)),
        make_cell("a", 0, outcomes(9, 9)),
    ]
    comparison = compare_methods(records)
    assert comparison.reference == "b"
    assert row(comparison, "student").right_difference is None
    assert row(comparison, "a").right_difference.value == 0
    assert compare_methods(records[:1]).reference is None


def test_a_reference_that_is_asked_for():
    records = [make_cell("constrained", 0, outcomes(5, 9)), make_cell("a", 0, outcomes(9, 9))]
    comparison = compare_methods(records, reference="a")
    assert comparison.reference == "a"
    assert row(comparison, "constrained").right_difference.value == pytest.approx(-4 / 20)
    assert row(comparison, "a").right_difference is None
    with pytest.raises(ValueError, match="`reference='b'` is not a trained method"):
        compare_methods(records, reference="b")


def test_only_common_seeds_are_paired():
    comparison = compare_methods(
        [
            make_cell("constrained", 0, outcomes(10, 20)),
            make_cell("a", 0, outcomes(12, 20)),
            make_cell("a", 1, outcomes(20, 20)),
            make_cell("b", 2, outcomes(20, 20)),
        ]
    )
    assert row(comparison, "a").right_difference.by_seed == pytest.approx({0: 0.1})
    assert row(comparison, "b").right_difference is None


def test_steps_until_training_satisfaction():
    assert steps_to_satisfaction(satisfactions(0, 1, 1, 1, 1, 1)) == 6
    assert steps_to_satisfaction(satisfactions(0.5, 0.95, 0.95, 0.95, 0.95, 0.95, 0.2)) == 6  # exactly 0.95, once
    assert steps_to_satisfaction(satisfactions(1, 1, 1, 1)) is None  # fewer than 5 logged steps
    assert steps_to_satisfaction([{"step": 1, "reward": 1.0}] * 9) is None  # GRPO logs none

    reached, never = satisfactions(0, 1, 1, 1, 1, 1), satisfactions(*[0.5] * 6)
    summary = row(
        compare_methods(
            [make_cell("a", 0, outcomes(9, 9), history=reached), make_cell("a", 1, outcomes(9, 9), history=never)]
        ),
        "a",
    )
    assert (summary.steps_to_satisfaction, summary.seeds_satisfied) == (6, 1)


def test_violations_in_training():
    summary = row(
        compare_methods([make_cell("a", 0, outcomes(9, 9), history=satisfactions(0, 0, 0.5, 0.5, 1, 1, 0.75, 0.25))]),
        "a",
    )
    assert summary.violations == pytest.approx(0.5)
    assert summary.late_violations == pytest.approx(0.5)  # of the last 2 of 8 steps
    assert row(compare_methods([make_cell("a", 0, outcomes(9, 9))]), "a").violations is None


def test_records_that_do_not_belong_together_are_errors():
    with pytest.raises(ValueError, match="no records"):
        compare_methods([])
    for other in (
        make_cell("b", 0, outcomes(9, 9), settings={"cost_limit": 0.5}),
        make_cell("b", 0, outcomes(9, 9), settings={"cost_limit": 0.25, "cost_scope": "sum"}),
        make_cell("b", 0, outcomes(9, 9, n=10)),
    ):
        with pytest.raises(ValueError, match="more than one"):
            compare_methods([make_cell("a", 0, outcomes(9, 9)), other])


def test_steps_and_rewards_count_where_they_are_recorded():
    """Valid steps where every answer's are checked; rewards where any cell has some, right answers standing for 1."""
    unchecked = row(compare_methods([make_cell("a", 0, [(1, None, 0.1, 3), (0, None, 0.1, 3)])]), "a")
    assert (unchecked.right.value, unchecked.valid, unchecked.valid_difference) == (0.5, None, None)
    assert unchecked.reward is None
    comparison = compare_methods(
        [
            make_cell("a", 0, [(0, 1, 0.1, 3, 0.2), (0, 0, 0.1, 3, 0.6)]),
            make_cell("b", 0, [(0, 1, 0.1, 3), (0, 0, 0.1, 3)]),
            make_cell("c", 0, [(0, 1, 0.1, 3, 0.9), (0, 0, 0.1, 3, 0.7)]),
        ]
    )
    assert {row.method: row.reward.value for row in comparison.methods} == pytest.approx(
        {"a": 0.4, "b": 0.0, "c": 0.8}
    )
    assert row(comparison, "a").valid.value == 0.5
    # None is right: the reward ranks.
    assert [row.method for row in comparison.methods] == ["c", "a", "b"]


def test_the_scope_of_the_limit_is_the_records():
    settings = {"cost_limit": 0.25, "cost_scope": "sum"}
    comparison = compare_methods([make_cell("a", 0, outcomes(9, 9), settings=settings)])
    assert comparison.cost_scope == "sum"
    assert compare_methods([make_cell("a", 0, outcomes(9, 9))]).cost_scope == "mean"


def test_an_outcome_is_as_long_as_what_it_holds():
    """Without a reward it is what earlier releases wrote."""
    rows = [(1, 0, 0.5, 7), (0, None, 0.25, 3, 0.125)]
    line = make_cell("a", 3, rows).to_json()
    assert json.loads(line)["outcomes"] == [list(values) for values in rows]
    assert CellRecord.from_json(line) == make_cell("a", 3, rows)


def test_a_record_survives_json():
    original = make_cell("a", 3, [(1, 0, 0.12345, 7), (0, 0, 0.0, 3)], history=satisfactions(0.5))
    line = original.to_json()
    assert "\n" not in line
    assert CellRecord.from_json(line) == original
    assert read_records(line + "\n" + replace(original, seed=4).to_json() + "\n")[1].seed == 4


def test_a_record_with_nan_is_not_written():
    with pytest.raises(ValueError, match="JSON compliant"):
        make_cell("a", 3, [(1, 0, float("nan"), 7)]).to_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": None}, "wrong keys"),
        ({"extra": 1}, "wrong keys"),
        ({"seed": "3"}, "`seed`"),
        ({"git_dirty": 0}, "`git_dirty`"),
        ({"wall_s": True}, "`wall_s`"),
        ({"outcomes": []}, "empty"),
        ({"outcomes": [[1, 0, 0.5]]}, "outcome"),
        ({"outcomes": [[2, 0, 0.5, 3]]}, "outcome"),
        ({"outcomes": [[1, 0, "0.5", 3]]}, "outcome"),
        ({"outcomes": [[1, 0, 0.5, 3, "0.5"]]}, "outcome"),
        ({"outcomes": [[1, 0, 0.5, 3, 0.5, 0.5]]}, "outcome"),
        ({"outcomes": [[None, 0, 0.5, 3]]}, "outcome"),
        ({"settings": {}}, "cost_limit"),
        ({"settings": {"cost_limit": 0.5, "cost_scope": "total"}}, "cost_scope"),
        ({"settings": {"cost_limit": 0.5, "cost_scope": ["sum"]}}, "cost_scope"),
    ],
)
def test_reading_is_strict(change, message):
    content = json.loads(make_cell("a", 3, outcomes(1, 1)).to_json()) | change
    if change == {"seed": None}:
        del content["seed"]
    with pytest.raises(ValueError, match=message):
        CellRecord.from_json(json.dumps(content))


def test_a_records_file_is_read_line_by_line():
    line = make_cell("a", 3, outcomes(1, 1)).to_json()
    assert len(read_records(line + "\n" + line[:50])) == 1  # cut while it was written
    assert read_records("") == []
    with pytest.raises(ValueError, match="Line 1"):
        read_records(line[:50] + "\n" + line + "\n")
    with pytest.raises(ValueError, match="twice"):
        read_records(line + "\n" + line + "\n")
