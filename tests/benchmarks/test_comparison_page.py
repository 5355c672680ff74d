"""benchmarks/comparison_page.py: the tables of docs/comparison.md are those of the committed summaries and claims."""

import re
import sys
from itertools import pairwise
from pathlib import Path


sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import claims
import comparison_page


def test_the_tables_of_the_page_follow_from_the_results():
    page = comparison_page.PAGE.read_text()
    assert comparison_page.filled(page) == page


def test_every_bed_of_the_claims_has_its_table():
    named = set(re.findall(r"<!-- table: (\S+) -->", comparison_page.PAGE.read_text()))
    assert named == {*claims.BEDS, "claims-1", "claims-2", "claims-3"}


def test_a_table_ends_before_the_text_goes_on():
    """Without an empty line between them the text would be its last row."""
    lines = comparison_page.PAGE.read_text().splitlines()
    assert not [after for row, after in pairwise(lines) if row.startswith("|") and after and not after.startswith("|")]


def test_a_table_is_replaced_and_nothing_else(monkeypatch):
    monkeypatch.setattr(comparison_page, "table", lambda name: f"| {name} |\n")
    assert comparison_page.filled("a\n\n<!-- table: x -->\n\n| old |\n| older |\n\n| by hand |\n") == (
        "a\n\n<!-- table: x -->\n\n| x |\n\n| by hand |\n"
    )


def test_a_method_of_fewer_seeds_says_so_and_what_was_not_trained_has_no_training():
    def row(method, seeds, trainer="constrained", difference=False):
        estimate = {"value": 0.5, "low": 0.4, "high": 0.6, "by_seed": dict.fromkeys(seeds, 0.5)}
        figures = dict.fromkeys(("right", "valid", "satisfaction", "cost"), estimate)
        training = {"right_difference": difference and estimate, "steps_to_satisfaction": 30, "late_violations": None}
        return {"method": method, "trainer": trainer, **figures, **training}

    rows = [row("constrained", "01"), row("lagrangian-0.3", "0", "lagrangian", True), row("student", "01", "none")]
    assert comparison_page.summary_table(rows).splitlines()[2:] == [
        "| **constrained** | 0.500 | 0.500 | 0.500 | 0.500 | – | 30 | – |",
        "| λ = 0.3 (1 seed) | 0.500 | 0.500 | 0.500 | 0.500 | +0.500 [+0.400, +0.600] | 30 | – |",
        "| untrained student | 0.500 | 0.500 | 0.500 | 0.500 |  |  |  |",
    ]
