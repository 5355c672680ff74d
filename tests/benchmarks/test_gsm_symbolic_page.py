"""docs/gsm_symbolic.md: its figures are those of the committed run."""

import json
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gsm_symbolic_cpu"
PAGE = (ROOT / "docs" / "gsm_symbolic.md").read_text(encoding="utf-8").replace("−", "-")
SUMMARY = json.loads((RESULTS / "validation" / "summary.json").read_text())
ROWS = {
    "teacher": "teacher",
    "student, before": "student",
    "GRPO": "grpo",
    "GKD": "gkd",
    "λ = 0.1": "lambda",
    "**constrained**": "constrained",
}
# By what is said before the four figures.
QUARTERS = {"By quarter of the training": "constrained", "(GKD": "gkd", "λ": "lambda"}


def interval(figure: dict[str, float], factor: float, digits: int, sign: str = "") -> str:
    value, low, high = (factor * figure[name] for name in ("value", "low", "high"))
    return f"{value:{sign}.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


@pytest.mark.parametrize("row", ROWS)
def test_row_of_the_table(row):
    name = ROWS[row]
    sampled = next(each["sampled"] for each in SUMMARY["evaluations"] if each["settings"]["name"] == name)
    satisfaction = "100" if name == "teacher" else interval(sampled["costs"]["satisfaction"], 100, 1)
    divergence = "0" if name == "teacher" else interval(sampled["costs"]["divergence"], 1, 2)
    rates = next((each for each in SUMMARY["win_rates"] if each["student"] == name), None)
    reasoning = (
        "–" if rates is None else " / ".join(f"{100 * rates[kind]['value']:.0f}" for kind in ("win", "tie", "loss"))
    )
    assert f"| {row} | {interval(sampled['right'], 100, 1)} | {satisfaction} | {divergence} | {reasoning} |" in PAGE


def test_differences():
    differences = {each["name"]: each for each in SUMMARY["differences"]}
    own = {
        name: interval(differences["lambda"][name], 100, 1, "+").split(" ", 1) for name in ("satisfaction", "right")
    }
    assert f"({own['satisfaction'][0]} points within the limit {own['satisfaction'][1]}" in PAGE
    assert f"{own['right'][0]} correct {own['right'][1]})" in PAGE
    for name, figure, points in (("grpo", "satisfaction", -1), ("gkd", "satisfaction", 1), ("gkd", "right", 1)):
        bounds = sorted(100 * points * differences[name][figure][bound] for bound in ("low", "high"))
        assert f"[{bounds[0]:.0f}, {bounds[1]:.0f}]" in PAGE


@pytest.mark.parametrize("words", QUARTERS)
def test_satisfaction_by_quarter(words):
    history = json.loads((RESULTS / "training" / f"{QUARTERS[words]}.json").read_text())["log_history"]
    rates = [logs["constraint/satisfaction_rate"] for logs in history if "constraint/satisfaction_rate" in logs]
    assert len(rates) == 32
    quarters = [f"{100 * sum(rates[start : start + 8]) / 8:.0f}" for start in range(0, 32, 8)]
    said = re.search(rf"{re.escape(words)} (\d+), (\d+), (\d+)(?: and|,) (\d+)", PAGE)
    assert said is not None
    assert list(said.groups()) == quarters
