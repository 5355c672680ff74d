"""benchmarks/claims.py: what is said of made-up comparisons, and that the committed tables follow from the records."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import make_cell

from trl_cmdp.evaluation import compare_methods


sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import claims


def cell(method, right, valid, inside, n=400):
    """The first `right` answers correct, the first `valid` with valid steps, and the first `inside` within the limit."""
    return make_cell(method, 0, [(int(i < right), int(i < valid), 0.1 if i < inside else 0.9, 10) for i in range(n)])


def test_a_method_holds_unless_another_that_is_inside_is_ahead():
    records = [
        cell("constrained", 380, 380, 400),
        cell("level", 378, 378, 390),
        cell("behind", 380, 340, 400),  # in valid answers alone
        cell("outside", 400, 400, 379),
    ]
    assert claims.verdicts(records, compare_methods(records)) == {
        "constrained": "holds",
        "level": "holds",
        "behind": "constrained +0.100 valid",
        "outside": "0.948 inside",
    }


def test_preferred_are_valid_steps_where_the_others_are_not():
    records = [cell("constrained", 400, 300, 400), cell("grpo", 400, 100, 50), cell("student", 9, 9, 9)]
    assert claims.preferences(records, "constrained", "grpo") == (200, 0, 400)
    assert claims.preferences(records, "grpo", "constrained") == (0, 200, 400)


def test_under_half_the_limit_are_those_that_do_not_read_it(monkeypatch):
    """Their own rollouts, judged by the tighter limit; whoever was trained under the other limit is not among them."""

    def trained(method, trainer, inside, **config):
        return replace(cell(method, 380, 380, inside), trainer=trainer, config=config)

    long = [
        trained("constrained", "constrained", 400),
        trained("gkd", "gkd", 200),
        trained("minillm", "minillm", 100),
        trained("fixed", "lagrangian", 300, multiplier="fixed"),
        trained("dual", "lagrangian", 390, multiplier="dual"),
        trained("teacher", "none", 400),
    ]
    tight = replace(cell("constrained", 360, 360, 400), settings={"cost_limit": 0.1})
    half = [tight, trained("student", "none", 0)]
    long.append(replace(trained("gkd", "gkd", 400), seed=1))  # on no seed of the others
    monkeypatch.setattr(claims, "records_of", {"bed-long": long, "bed-half": half}.get)
    rows = compare_methods(claims.under_half_the_limit("bed-long")).methods
    assert {row.method: row.satisfaction.value for row in rows} == {
        "constrained": 1.0,
        "gkd": 0.5,
        "minillm": 0.25,
        "fixed": 0.75,
    }


def test_a_method_says_on_how_many_seeds_where_the_bed_has_more(monkeypatch):
    monkeypatch.setattr(claims, "BEDS", {"bed": "the bed"})
    records = [cell("constrained", 380, 380, 400), cell("gkd", 380, 380, 400), cell("grpo", 380, 10, 20)]
    records.append(replace(records[0], seed=1))
    monkeypatch.setattr(claims, "records_of", {"bed": records}.get)
    monkeypatch.setattr(claims, "half_limit_table", list)
    assert claims.tables().splitlines()[:5] == [
        "| method | the bed (2 seeds) | holds on |",
        "| :--- | :--- | :--- |",
        "| constrained | holds | 1 of 1 |",
        "| gkd | holds (1 seed) | 1 of 1 |",
        "| grpo | 0.050 inside (1 seed) | 0 of 1 |",
    ]


def test_a_constant_limit_stands_for_the_method_where_it_alone_was_run(monkeypatch):
    monkeypatch.setattr(claims, "BEDS", {"first": "both", "second": "one"})
    reward_alone, constant = cell("grpo", 380, 10, 20), cell("constant-limit", 380, 300, 300)
    beds = {"first": [constant, cell("constrained", 380, 380, 400), reward_alone], "second": [constant, reward_alone]}
    monkeypatch.setattr(claims, "records_of", beds.get)
    monkeypatch.setattr(claims, "half_limit_table", list)
    assert claims.tables().split("\n\n")[1].splitlines()[2:] == [
        "| both | 0.050 | 1.000 | 370 | 0 | 400 |",
        "| one | 0.050 | 0.750 | 290 | 0 | 400 |",
    ]


@pytest.mark.slow  # a minute of bootstraps
def test_the_committed_tables():
    assert (claims.RESULTS / "claims.md").read_text() == claims.tables()
