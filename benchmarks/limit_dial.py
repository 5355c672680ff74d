"""
The limit as a dial: the demo's student trained at four limits and without one, its answers to the same problems, and
what was measured (docs/dial.md).

    python benchmarks/limit_dial.py            # draws docs/images/dial-*.svg from the committed records
    python benchmarks/limit_dial.py --train    # makes the records anew: five runs of `trl-cmdp demo`

A run that is in --runs already is not run again. The problems shown are the first of the test split: none was chosen.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from trl_cmdp.evaluation import read_rollout_records
from trl_cmdp.reports.rollout_picture import plot_rollouts


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "limit_dial"
IMAGES = ROOT / "docs" / "images"
# From the loosest to the tightest, with the options of their runs. GRPO's rollouts are judged by the demo's own limit.
STOPS = {
    "no limit": ["--method", "grpo"],
    **{f"limit {limit}": ["--cost-limit", limit] for limit in ("1", "0.25", "0.1", "0.05")},
}
NUM_SHOWN, NUM_COSTS = 4, 300


def run(stop, runs):
    """Folder of a run of the demo, which is made unless it is there."""
    folder = runs / stop.replace(" ", "-")
    if not (folder / "metrics.json").exists():
        command = [sys.executable, "-m", "trl_cmdp", "demo", *STOPS[stop], "--seed", "0", "--output-dir", str(folder)]
        subprocess.run(command, check=True)
    return folder


def record(runs):
    """Write the numbers of all runs, and the first rollouts of each as records."""
    folders = {stop: run(stop, runs) for stop in STOPS}
    first = next(iter(folders.values()))
    sources = {"before": (first / "student-before.jsonl", "before", first)}
    for stop, folder in folders.items():
        method = "grpo" if stop == "no limit" else "constrained"
        sources[stop] = (folder / f"{method}.jsonl", "after", folder)
    numbers = []
    for stop, (path, when, folder) in sources.items():
        metrics = json.loads((folder / "metrics.json").read_text())
        settings, records = read_rollout_records(path)
        sampled = [each for each in records if not each.greedy]
        source = " ".join(["trl-cmdp demo", *STOPS[stop]]) if stop in STOPS else settings.student
        settings = replace(settings, name=stop, student=source)
        shown = [settings.to_json(), *(each.to_json() for each in sampled[:NUM_SHOWN])]
        (RESULTS / f"{stop.replace(' ', '-')}.jsonl").write_text("\n".join(shown) + "\n")
        costs = [float(f"{sum(each.costs) / len(each.costs):.3g}") for each in sampled[:NUM_COSTS]]
        numbers.append({"stop": stop, **{k: v for k, v in metrics[when].items() if k != "greedy"}, "costs": costs})
    lines = ",\n".join(json.dumps(each) for each in numbers)
    (RESULTS / "numbers.json").write_text(f"[\n{lines}\n]\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="make the records anew")
    parser.add_argument("--runs", type=Path, default=Path("outputs/limit-dial"), help="folder of the runs")
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if arguments.train:
        record(arguments.runs)
    stops = [each["stop"] for each in json.loads((RESULTS / "numbers.json").read_text())]
    evaluations = [read_rollout_records(RESULTS / f"{stop.replace(' ', '-')}.jsonl") for stop in stops]
    for theme in ("light", "dark"):
        path = IMAGES / f"dial-{theme}.svg"
        plot_rollouts(evaluations, path, problems=range(2), stacked=True, dark=theme == "dark")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
