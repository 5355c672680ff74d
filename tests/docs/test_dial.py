"""docs/dial.md: its table is of the committed records."""

import json
from pathlib import Path


ROOT = Path(__file__).parents[2]
NUMBERS = json.loads((ROOT / "benchmarks" / "results" / "limit_dial" / "numbers.json").read_text())


def test_table():
    page = (ROOT / "docs" / "dial.md").read_text()
    before = NUMBERS[0]["costs"]
    for measured in NUMBERS:
        figures = [measured["final_answer_correctness"], measured["valid_steps_rate"], measured["satisfaction_rate"]]
        inside = sum(cost <= measured["cost_limit"] for cost in before) / len(before)
        at_start = "" if measured["stop"] in ("before", "no limit") else f"{100 * inside:.0f}%"
        shown = [
            measured["stop"],
            at_start,
            *(f"{100 * figure:.1f}%" for figure in figures),
            f"{measured['mean_cost']:.3f}",
        ]
        assert f"| {' | '.join(shown)} |".replace("|  |", "| |") in page


def test_each_run_is_at_its_limit():
    """The records name the limit that their student was trained under, and none was chosen: they are the first."""
    for measured in NUMBERS[2:]:
        path = ROOT / "benchmarks" / "results" / "limit_dial" / f"{measured['stop'].replace(' ', '-')}.jsonl"
        settings, *records = map(json.loads, path.read_text().splitlines())
        assert f"limit {settings['cost_limit']:g}" == settings["name"] == measured["stop"]
        assert settings["cost_limit"] == measured["cost_limit"]
        assert [record["problem"] for record in records] == list(range(len(records)))
