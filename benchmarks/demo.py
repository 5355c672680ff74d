"""
The demo's promises: three seeds, two more limits, and plain GRPO, each a run of `trl-cmdp demo`.

    python benchmarks/demo.py            # about half an hour; writes benchmarks/results/demo.json

A run that is there already (in --output-dir, with the same settings) is not run again.
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch
import transformers
import trl
from rich.console import Console
from rich.table import Table


RUNS = {
    **{f"constrained, seed {seed}": ["--seed", str(seed)] for seed in (0, 1, 2)},
    "constrained, limit 0.1": ["--seed", "0", "--cost-limit", "0.1"],
    "constrained, limit 1.0": ["--seed", "0", "--cost-limit", "1.0"],
    **{f"grpo, seed {seed}": ["--seed", str(seed), "--method", "grpo"] for seed in (0, 1, 2)},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/benchmark-demo"), help="the runs")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "demo.json")
    arguments = parser.parse_args()

    results = {}
    table = Table(title="trl-cmdp demo, 1000 held-out problems, temperature 1")
    for column in ("run", "right", "teacher", "valid", "satisfaction [95%]", "mean cost", "nats/token", "limit", "s"):
        table.add_column(column, justify="right")
    for name, options in RUNS.items():
        folder = arguments.output_dir / name.replace(", ", "-").replace(" ", "-")
        if not (folder / "metrics.json").exists():
            print(f"running {name} ...", flush=True)
            command = [sys.executable, "-m", "trl_cmdp", "demo", *options, "--output-dir", str(folder)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        metrics = json.loads((folder / "metrics.json").read_text())
        results[name] = {"options": options, **metrics}
        after = metrics["after"]
        low, high = after["satisfaction_interval"]
        table.add_row(
            name,
            f"{after['final_answer_correctness']:.3f}",
            f"{metrics['teacher']['final_answer_correctness']:.3f}",
            f"{after['valid_steps_rate']:.3f}",
            f"{after['satisfaction_rate']:.3f} [{low:.3f}, {high:.3f}]",
            f"{after['mean_cost']:.3f}",
            f"{after['mean_divergence']:.3f}",
            f"{after['cost_limit']:g}",
            f"{metrics['config']['seconds']:.0f}",
        )
    Console(width=140).print(table)
    record = {
        "command": "python benchmarks/demo.py",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
        },
        "results": results,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
