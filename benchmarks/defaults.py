"""
The evidence for the defaults: both aggregations and both credit assignments on the demo's task.

    python benchmarks/defaults.py        # about a quarter of an hour; writes benchmarks/results/defaults.json

Every variant trains on the same problems with the same steps and learning rate as `trl-cmdp demo`, over seeds that the
demo's own figures are not reported on. A cell that is there already (in --output-dir) is not run again.
"""

import argparse
import json
import platform
import statistics
from pathlib import Path

import torch
import transformers
import trl
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_cmdp.cli import demo
from trl_cmdp.tasks.arithmetic import demo_model_path, load_problems


SEEDS = (10, 11)
VARIANTS = {
    f"{credit_assignment}, {aggregation}": {
        "credit_assignment": credit_assignment,
        "constraint_aggregation": aggregation,
    }
    for credit_assignment in ("trajectory", "token")
    for aggregation in ("lexicographic", "sum_then_normalize")
}
VARIANTS["trajectory, lexicographic, violation_distill_coef 0"] = {"violation_distill_coef": 0.0}
METRICS = ("final_answer_correctness", "valid_steps_rate", "satisfaction_rate", "mean_cost")


def run_cell(fields, seed, folder):
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path("student"))
    student = AutoModelForCausalLM.from_pretrained(demo_model_path("student"))
    teacher = AutoModelForCausalLM.from_pretrained(demo_model_path("teacher"))
    arguments = argparse.Namespace(
        seed=seed, steps=demo.STEPS, output_dir=folder, cost_limit=demo.COST_LIMIT, method="constrained"
    )
    demo.train(student, tokenizer, teacher, demo.STEPS, arguments, **fields)
    return demo.evaluate(
        student,
        tokenizer=tokenizer,
        teacher=teacher,
        problems=load_problems(demo.HELD_OUT, "test", seed),
        arguments=arguments,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/benchmark-defaults"), help="the cells")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "defaults.json")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)

    results = {}
    table = Table(title=f"demo task, limit {demo.COST_LIMIT:g}, means over seeds {SEEDS}")
    for column in ("variant", "right", "valid", "satisfaction", "mean cost"):
        table.add_column(column)
    for name, fields in VARIANTS.items():
        cells = []
        for seed in SEEDS:
            folder = arguments.output_dir / f"{name.replace(', ', '-').replace(' ', '-')}-seed-{seed}"
            record = folder / "cell.json"
            if not record.exists():
                print(f"running {name}, seed {seed} ...", flush=True)
                metrics = run_cell(fields, seed, folder)
                record.write_text(json.dumps(metrics, indent=2) + "\n")
            cells.append(json.loads(record.read_text()))
        means = {metric: statistics.mean(cell[metric] for cell in cells) for metric in METRICS}
        results[name] = {"fields": fields, "means": means, "cells": dict(zip(map(str, SEEDS), cells, strict=True))}
        spread = {metric: [min(c[metric] for c in cells), max(c[metric] for c in cells)] for metric in METRICS}
        table.add_row(
            name, *(f"{means[metric]:.3f} [{spread[metric][0]:.3f}, {spread[metric][1]:.3f}]" for metric in METRICS)
        )
    Console(width=140).print(table)
    record = {
        "command": "python benchmarks/defaults.py",
        "steps": demo.STEPS,
        "learning_rate": demo.LEARNING_RATE,
        "cost_limit": demo.COST_LIMIT,
        "held_out": demo.HELD_OUT,
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
