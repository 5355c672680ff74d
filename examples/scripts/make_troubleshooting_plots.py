"""
The pictures of docs/troubleshooting.md. What `trl-cmdp compare` has recorded is drawn from benchmarks/results/; for the
rest short runs of the embedded task are made in which one thing is wrong, beside one that is well.

    python examples/scripts/make_troubleshooting_plots.py                  # some five minutes on a free core
    python examples/scripts/make_troubleshooting_plots.py --recorded-only  # seconds

Writes PNGs and runs.json, what the trainers logged, to docs/images/troubleshooting/. A case that is in runs.json already,
with the same settings, is not run again.
"""

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
)
from transformers.utils import logging

from trl_cmdp import ConstrainedDistillConfig, ConstrainedDistillTrainer
from trl_cmdp.evaluation import CellRecord, Rate, read_records, sample_rollouts, score_rollouts
from trl_cmdp.tasks import arithmetic


ROOT = Path(__file__).parents[2]
CASE, WELL_COLOUR = "#b3541e", "0.6"

# Recorded: experiment, method that shows the case, and the method to compare it with. Means over the seeds.
RECORDED = {
    "coefficient-large": ("defaults-arithmetic", "coef-1", "coef-0.1"),
    "no-distillation": ("defaults-nested", "coef-0", "coef-0.1"),
    "token": ("defaults-nested", "token-sum-then-normalize", "sum-then-normalize"),
    "multiplier-small": ("tuning", "lagrangian-0.01", "lagrangian-0.3"),
    "imitation": ("arithmetic", "gkd", "constrained"),
}

STEPS, PROMPTS_PER_STEP, NUM_GENERATIONS, HELD_OUT, SEED = 50, 8, 8, 300, 10
WELL = "well"
# What is changed from the run that is well, whose settings are those of `trl-cmdp compare arithmetic` at half its batch.
CASES: dict[str, dict[str, Any]] = {
    WELL: {},
    "limit-tight": {"cost_limit": 0.02},
    "limit-unreachable": {"cost_limit": 0.0005},
    "temperature": {"temperature": 0.5},
    "token-lexicographic": {"credit_assignment": "token"},
    "penalty-small": {
        "constraint_aggregation": "sum_then_normalize",
        "violation_distill_coef": 0.0,
        "violation_penalty": 1.01,
    },
    "limit-loose": {"cost_limit": 3.0},
}
PANELS = ("reward", "constraint/cost", "constraint/satisfaction_rate", "distill_loss")
LOGGED = (
    *PANELS,
    "constraint/limit",
    "constraint/cost_max",
    "constraint/violated_token_frac",
    "constraint/unjudged_frac",
    "teacher/divergence",
    "frac_reward_zero_std",
    "completions/mean_length",
    "entropy",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=ROOT / "docs" / "images" / "troubleshooting")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of each run")
    parser.add_argument("--recorded-only", action="store_true", help="draw what is recorded, and run nothing")
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for name, (experiment, case, well) in RECORDED.items():
        records = recorded(experiment)
        draw(
            {well: recorded_history(records, well), case: recorded_history(records, case)},
            0.25,
            arguments.output_dir / name,
        )
    records = recorded("arithmetic")
    draw_held_out(records, "constrained", "grpo", arguments.output_dir / "reward-alone")
    if arguments.recorded_only:
        return

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path = arguments.output_dir / "runs.json"
    runs = json.loads(path.read_text()) if path.exists() else {}
    for name, changed in CASES.items():
        settings = {"seed": SEED, "steps": arguments.steps, **changed}
        if runs.get(name, {}).get("settings") != settings:
            print(f"running {name} ...", flush=True)
            runs[name] = {"settings": settings, **run_case(changed, arguments.steps)}
            path.write_text(json.dumps(runs) + "\n")
        if name == WELL:
            continue
        histories = {WELL: runs[WELL]["history"], name: runs[name]["history"]}
        draw(histories, settings.get("cost_limit", 0.25), arguments.output_dir / name)


def recorded(experiment: str) -> list[CellRecord]:
    """Committed records of an experiment."""
    return read_records((ROOT / "benchmarks" / "results" / experiment / "records.jsonl").read_text())


def recorded_history(records: list[CellRecord], method: str) -> dict[str, list[float]]:
    """Means over the seeds of what a method logged at each step."""
    histories = [record.history for record in records if record.method == method]
    return {
        name: [mean(entry[key] for entry in step) for step in zip(*histories, strict=True)]
        for name, key in zip(PANELS, ("reward", "cost", "satisfaction", "distill_loss"), strict=True)
    }


def run_case(changed: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train one student, and return what was logged, column by column, and what it does on held-out problems."""
    tokenizer = AutoTokenizer.from_pretrained(arithmetic.demo_model_path("student"))
    student = AutoModelForCausalLM.from_pretrained(arithmetic.demo_model_path("student"))
    teacher = AutoModelForCausalLM.from_pretrained(arithmetic.demo_model_path("teacher"))
    settings: dict[str, Any] = {
        "output_dir": "outputs/troubleshooting",
        "cost_limit": 0.25,
        # The pictures are of the limit and the reward alone.
        "cost_limit_schedule": "constant",
        "unrewarded_distill_coef": 0.0,
        "learning_rate": 3e-4,
        "max_steps": steps,
        "per_device_train_batch_size": PROMPTS_PER_STEP * NUM_GENERATIONS,
        "num_generations": NUM_GENERATIONS,
        "max_completion_length": arithmetic.MAX_COMPLETION_LENGTH,
        "seed": SEED,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    args = ConstrainedDistillConfig(**{**settings, **changed})
    trainer = ConstrainedDistillTrainer(
        model=student,
        reward_funcs=arithmetic.final_answer_reward,
        args=args,
        train_dataset=arithmetic.load_problems(steps * PROMPTS_PER_STEP, "train", SEED),
        processing_class=tokenizer,
        teacher_model=teacher,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    logged = {key: [float(f"{entry[key]:.4g}") for entry in history] for key in LOGGED}
    held_out = arithmetic.load_problems(HELD_OUT, "test", SEED)
    return {
        "history": logged,
        "held_out": {
            str(t): measure(student, teacher, tokenizer, held_out, t) for t in sorted({args.temperature, 1.0})
        },
    }


def measure(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Dataset,
    temperature: float,
) -> dict[str, float]:
    """One rollout for each problem, sampled and scored at a temperature, against a limit of 0.25 nats per token."""
    rollouts = sample_rollouts(
        student,
        tokenizer,
        problems["prompt"],
        max_new_tokens=arithmetic.MAX_COMPLETION_LENGTH,
        temperature=temperature,
        batch_size=250,
        seed=SEED,
    )
    costs = score_rollouts(rollouts, student, teacher, temperature=temperature, batch_size=250)
    completions = [rollout.completion for rollout in rollouts]
    rewards = arithmetic.final_answer_reward(completions, problems["answer"])
    valid = map(arithmetic.valid_steps, problems["prompt"], completions)
    return {
        "right": Rate.of(reward == 1 for reward in rewards).value,
        "valid": Rate.of(valid).value,
        "satisfaction": Rate.of(cost.mean().item() <= 0.25 for cost in costs).value,
        "mean_cost": sum(cost.mean().item() for cost in costs) / len(costs),
        "mean_length": sum(map(len, costs)) / len(costs),
    }


def draw(histories: dict[str, dict[str, list[float]]], cost_limit: float, path: Path) -> None:
    """Draw what a case logged over what one that is well logged, given in that order."""
    # The object-oriented interface: nothing global is touched.
    figure = Figure(figsize=(12, 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, metric in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for (name, history), colour in zip(histories.items(), (WELL_COLOUR, CASE), strict=False):
            axes.plot(range(1, len(history[metric]) + 1), history[metric], color=colour, label=name)
        axes.set(title=metric, xlabel="optimizer step")
        if metric == "constraint/cost":
            axes.axhline(cost_limit, color="black", linestyle="--", linewidth=1, label="limit")
            axes.set_yscale("log")
            axes.legend(frameon=False, fontsize="small")
        if metric == "constraint/satisfaction_rate":
            axes.set_ylim(-0.03, 1.03)
        _tidy(axes)
    figure.savefig(path.with_suffix(".png"), dpi=110)


def draw_held_out(records: list[CellRecord], well: str, case: str, path: Path) -> None:
    """Draw costs and lengths of the answers to held-out problems, all seeds together."""
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    cost_axes, length_axes = figure.subplots(1, 2)
    for method, colour in ((well, WELL_COLOUR), (case, CASE)):
        outcomes = [outcome for record in records if record.method == method for outcome in record.outcomes]
        style = {"color": colour, "label": method, "alpha": 0.65}
        cost_axes.hist([max(outcome.cost, 1e-4) for outcome in outcomes], bins=np.geomspace(1e-4, 20, 60), **style)
        length_axes.hist([outcome.length for outcome in outcomes], bins=np.arange(0.5, 42), **style)
    cost_axes.axvline(0.25, color="black", linestyle="--", linewidth=1, label="limit")
    cost_axes.set(xscale="log", title="Cost of a rollout, nats per token", ylabel="held-out answers")
    cost_axes.legend(frameon=False, fontsize="small")
    length_axes.set(title="Length of an answer, tokens")
    for axes in (cost_axes, length_axes):
        _tidy(axes)
    figure.savefig(path.with_suffix(".png"), dpi=110)


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
