"""docs/gsm_symbolic.md: its figures are those of the committed runs."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from trl_cmdp.evaluation import compare_evaluations, read_rollout_records


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE, COMPARISON = (
    (ROOT / "docs" / page).read_text(encoding="utf-8").replace("−", "-")
    for page in ("gsm_symbolic.md", "comparison.md")
)
# The page's name of a model, and what records call it.
ROWS = {
    "teacher": "teacher",
    "student, before": "student",
    "GRPO": "grpo",
    "GKD": "gkd",
    "λ = 0.1": "lambda",
    "dual λ": "dual",
    "PID λ": "pid",
    "constrained, `unrewarded_distill_coef=0`": "unrewarded-0",
    "**constrained**": "constrained",
}
RUNS = ("gsm_symbolic_gpu", "gsm_symbolic_gpu_seed_1", "gsm_symbolic_cpu")  # as the page has their tables
TABLES = dict(zip(RUNS, re.findall(r"(?<=\n\n)\|[^\n]*against constrained's:.*?\n\n", PAGE, re.DOTALL), strict=True))
# By what is said before the four figures.
QUARTERS = {"By quarter of the training": "constrained", "(GKD": "gkd", "λ": "lambda"}


def summary_of(run: str) -> dict:
    return json.loads((RESULTS / run / "validation" / "summary.json").read_text())


def interval(figure: dict[str, float], factor: float, digits: int, sign: str = "") -> str:
    value, low, high = (factor * figure[name] for name in ("value", "low", "high"))
    return f"{value:{sign}.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


@pytest.mark.parametrize("run", RUNS)
def test_table(run):
    summary = summary_of(run)
    evaluations = {each["settings"]["name"]: each["sampled"] for each in summary["evaluations"]}
    rates = {each["student"]: each for each in summary["win_rates"]}
    rows = TABLES[run].strip().splitlines()[2:]
    assert len(rows) == len(evaluations)
    for row in rows:
        title = row.split(" | ")[0].removeprefix("| ")
        name = ROWS[title]
        sampled = evaluations.pop(name)
        satisfaction = "100" if name == "teacher" else interval(sampled["costs"]["satisfaction"], 100, 1)
        divergence = "0" if name == "teacher" else interval(sampled["costs"]["divergence"], 1, 2)
        reasoning = "–"
        if name in rates:
            reasoning = " / ".join(f"{100 * rates[name][kind]['value']:.0f}" for kind in ("win", "tie", "loss"))
        assert (
            row == f"| {title} | {interval(sampled['right'], 100, 1)} | {satisfaction} | {divergence} | {reasoning} |"
        )


def test_differences_on_a_gpu():
    """Each as the page says it, most of them of the other sign."""
    differences = {each["name"]: each for each in summary_of("gsm_symbolic_gpu")["differences"]}

    def more(name: str, figure: str, sign: str = "") -> str:
        return interval(differences[name][figure], 100, 1, sign)

    def fewer(name: str, figure: str) -> str:
        value, high, low = (-100 * differences[name][figure][bound] for bound in ("value", "low", "high"))
        return f"{value:.1f}", f"[{low:.1f}, {high:.1f}]"

    for text in (
        "{} more correct answers than GKD {}".format(*fewer("gkd", "right")),
        f"(GKD {more('gkd', 'satisfaction', '+')})",
        "worth {} correct answers** {}".format(*fewer("unrewarded-0", "right")),
        "GRPO has {} fewer rollouts within the limit {}".format(*fewer("grpo", "satisfaction")),
        f"no more correct answers ({more('grpo', 'right')})",
        "dual λ has {} fewer rollouts within the limit {}".format(*fewer("dual", "satisfaction")),
        "PID {} {}".format(*fewer("pid", "satisfaction")),
    ):
        assert text in PAGE
    assert "{} points more correct answers {}".format(*fewer("gkd", "right")) in COMPARISON
    assert "{} more than without the third place {}".format(*fewer("unrewarded-0", "right")) in COMPARISON
    for name in ("dual", "pid"):
        assert differences[name]["right"]["low"] < 0 < differences[name]["right"]["high"]


def test_a_fixed_coefficient_over_both_seeds():
    def of_both(name: str) -> tuple:
        rollouts = []
        for first, run in ((0, "gsm_symbolic_gpu"), (10_000, "gsm_symbolic_gpu_seed_1")):
            settings, more = read_rollout_records(RESULTS / run / "records" / f"{name}-validation.jsonl")
            rollouts += [replace(rollout, problem=first + rollout.problem) for rollout in more]
        return settings, rollouts

    difference = compare_evaluations(of_both("lambda"), of_both("constrained"))
    right, inside = difference.right, difference.satisfaction
    assert f"over both seeds {interval(vars(right), 100, 1).replace(' [', ' more correct ones [')}" in PAGE
    assert f"λ = 0.1 has {interval(vars(right), 100, 1).replace(' [', ' more correct answers [')}" in COMPARISON
    bounds = f"[{-100 * inside.high:.1f}, {-100 * inside.low:.1f}]"
    assert f"{-100 * inside.value:.1f} fewer rollouts within the limit {bounds}" in PAGE
    assert f"{-100 * inside.value:.1f} fewer rollouts inside {bounds}" in COMPARISON
    further = interval(vars(difference.cost), 1, 3).replace(" [", " nats further from the teacher [")
    assert further in PAGE


def test_rewards_by_quarter_on_a_gpu():
    history = json.loads((RESULTS / "gsm_symbolic_gpu" / "training" / "constrained.json").read_text())["log_history"]
    rewards = [logs["reward"] for logs in history if "reward" in logs]
    assert len(rewards) == 40
    quarters = [f"{sum(rewards[start : start + 10]) / 10:.2f}" for start in range(0, 40, 10)]
    assert f"{', '.join(quarters[:3])} and {quarters[3]} of constrained" in PAGE


def test_the_papers_figures_are_beside_those_of_the_gpu():
    summary = summary_of("gsm_symbolic_gpu")
    sampled = {each["settings"]["name"]: each["sampled"] for each in summary["evaluations"]}
    table = PAGE[PAGE.index("| | paper, GSM8K |") :]
    for title, name in (("constrained", "constrained"), ("GRPO", "grpo")):
        costs = sampled[name]["costs"]
        assert re.search(
            rf"\| satisfaction: {title} .* {re.escape(interval(costs['satisfaction'], 100, 1))} \|", table
        )
        assert re.search(rf"\| KL, .*: {title} .* {re.escape(interval(costs['divergence'], 1, 2))} \|", table)
    for title, name in (("constrained", "constrained"), ("GRPO", "grpo"), ("teacher", "teacher")):
        assert re.search(
            rf"\| final answers: {title} .* {re.escape(interval(sampled[name]['right'], 100, 1))} \|", table
        )
    rates = next(each for each in summary["win_rates"] if each["student"] == "grpo")
    kinds = " / ".join(f"{100 * rates[kind]['value']:.0f}" for kind in ("loss", "tie", "win"))
    assert f"| {kinds}, by the process judge |" in table


def test_differences_on_a_cpu():
    differences = {each["name"]: each for each in summary_of("gsm_symbolic_cpu")["differences"]}
    own = {
        name: interval(differences["lambda"][name], 100, 1, "+").split(" ", 1) for name in ("satisfaction", "right")
    }
    assert f"({own['satisfaction'][0]} points within the limit {own['satisfaction'][1]}" in PAGE
    assert f"{own['right'][0]} correct {own['right'][1]})" in PAGE
    for name, figure, points in (("grpo", "satisfaction", -1), ("gkd", "satisfaction", 1), ("gkd", "right", 1)):
        bounds = sorted(100 * points * differences[name][figure][bound] for bound in ("low", "high"))
        assert f"[{bounds[0]:.0f}, {bounds[1]:.0f}]" in PAGE


@pytest.mark.parametrize("words", QUARTERS)
def test_satisfaction_by_quarter_on_a_cpu(words):
    history = json.loads((RESULTS / "gsm_symbolic_cpu" / "training" / f"{QUARTERS[words]}.json").read_text())
    rates = [logs["constraint/satisfaction_rate"] for logs in history["log_history"] if "reward" in logs]
    assert len(rates) == 32
    quarters = [f"{100 * sum(rates[start : start + 8]) / 8:.0f}" for start in range(0, 32, 8)]
    said = re.search(rf"{re.escape(words)} (\d+), (\d+), (\d+)(?: and|,) (\d+)", PAGE)
    assert said is not None
    assert list(said.groups()) == quarters
