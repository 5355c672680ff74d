"""`trl-cmdp demo`: distil the embedded teacher into the embedded student, and measure before and after."""

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import write_whole
from .._messages import say
from ._arguments import positive_float, positive_int
from ._setup import LEARNING_RATE, NUM_GENERATIONS, PROMPTS_PER_STEP


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ._run import Answer

TASK = "arithmetic"
# The limit is in nats per token.
COST_LIMIT = 0.25
STEPS, QUICK_STEPS = 200, 10
HELD_OUT, QUICK_HELD_OUT = 1000, 100


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "demo",
        help="distil the embedded teacher into the embedded student on a CPU, in minutes",
        description="Distil the embedded teacher into the embedded student (chained sums with worked steps), evaluate "
        "before and after on held-out problems, and write metrics.json, curves.png and the student.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the problems, the rollouts and the evaluation")
    parser.add_argument("--steps", type=positive_int, default=STEPS, help="optimizer steps")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/demo"), help="where everything is written")
    parser.add_argument("--cost-limit", type=positive_float, default=COST_LIMIT, help="limit, in nats per token")
    parser.add_argument(
        "--method",
        choices=["constrained", "grpo"],
        default="constrained",
        help="'grpo' is plain GRPO on the same rollouts: what the limit is for",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"a smoke run: {QUICK_STEPS} steps and {QUICK_HELD_OUT} held-out problems, with no promise",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the demo."""
    # Imported here: `trl-cmdp --help` should not wait for torch and TRL.
    from ..reports import plot_training_curves
    from ._run import load_models, set_up_process, train_student, training_args
    from ._setup import embedded_setup

    set_up_process()
    start = time.monotonic()
    steps = QUICK_STEPS if arguments.quick else arguments.steps
    num_held_out = QUICK_HELD_OUT if arguments.quick else HELD_OUT
    arguments.output_dir.mkdir(parents=True, exist_ok=True)

    setup = embedded_setup(TASK)
    tokenizer, student, teacher = load_models(setup)
    held_out = setup.test_dataset.draw(num_held_out, arguments.seed)

    print(f"Evaluating teacher and student on {num_held_out} held-out problems ...", flush=True)
    measured = (tokenizer, teacher, held_out, arguments)
    teacher_metrics, before = evaluate(teacher, *measured), evaluate(student, *measured)
    shared = {"steps": steps, "seed": arguments.seed, "cost_limit": arguments.cost_limit}
    args = training_args(
        arguments.method, setup.config_fields, {}, output_dir=arguments.output_dir / "trainer", **shared
    )
    trainer = train_student(student, tokenizer, teacher, args, arguments.method, setup)
    trainer.save_model(str(arguments.output_dir / "student"))
    trainer.state.save_to_json(str(arguments.output_dir / "trainer_state.json"))  # what `trl-cmdp report` reads
    print("Evaluating the trained student on the same problems ...", flush=True)
    after = evaluate(student, *measured)

    print(f"\n{arguments.method}, held-out problems, temperature 1, limit {arguments.cost_limit:g}\n")
    print(_table({"student before": before, "student after": after, "teacher": teacher_metrics}))
    config = {
        "method": arguments.method,
        **shared,
        "prompts_per_step": PROMPTS_PER_STEP,
        "num_generations": NUM_GENERATIONS,
        "learning_rate": LEARNING_RATE,
        "max_completion_length": args.max_completion_length,
        "quick": arguments.quick,
        "seconds": round(time.monotonic() - start, 1),
    }
    metrics = {"before": before, "after": after, "teacher": teacher_metrics, "config": config}
    write_whole(arguments.output_dir / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    title = f"trl-cmdp demo: {arguments.method}, seed {arguments.seed}"
    plot_training_curves(trainer.state.log_history, arguments.output_dir / "curves.png", title)
    say(f"\nStudent, metrics.json and curves.png are in {arguments.output_dir}/ ({config['seconds']:.0f} s).")
    return 0


def evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    teacher: "PreTrainedModel",
    problems: "Dataset",
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Metrics of a model on held-out problems: one sampled rollout each, and a greedy one beside it."""
    from ._run import evaluate_student
    from ._setup import embedded_setup

    sampled, greedy = (
        _metrics(
            evaluate_student(model, tokenizer, teacher, problems, embedded_setup(TASK), arguments.seed, greedy=greedy),
            arguments.cost_limit,
        )
        for greedy in (False, True)
    )
    return {**sampled, "greedy": greedy}


def _metrics(answers: "list[Answer]", cost_limit: float) -> dict[str, Any]:
    from ..evaluation import Rate

    correct = Rate.of(answer.correct for answer in answers)
    valid = Rate.of(answer.valid for answer in answers)
    satisfied = Rate.of(answer.cost <= cost_limit for answer in answers)
    num_tokens = sum(len(answer.costs) for answer in answers)
    return {
        "final_answer_correctness": correct.value,
        "final_answer_interval": list(correct.interval),
        "valid_steps_rate": valid.value,
        "valid_steps_interval": list(valid.interval),
        "satisfaction_rate": satisfied.value,
        "satisfaction_interval": list(satisfied.interval),
        "mean_cost": sum(answer.cost for answer in answers) / len(answers),
        "mean_divergence": sum(answer.costs.sum().item() for answer in answers) / num_tokens,
        "mean_length": num_tokens / len(answers),
        "cost_limit": cost_limit,
        "n": len(answers),
    }


def _table(rows: dict[str, dict[str, Any]]) -> str:
    from ..evaluation.rates import ValueWithInterval
    from ..reports.tables import markdown_table

    columns = ("", "correct answer", "all steps valid", "satisfaction [95%]", "mean cost (nats/token)")
    lines = [
        (
            name,
            f"{metrics['final_answer_correctness']:.3f}",
            f"{metrics['valid_steps_rate']:.3f}",
            ValueWithInterval(metrics["satisfaction_rate"], *metrics["satisfaction_interval"]).text(),
            f"{metrics['mean_cost']:.3f}",
        )
        for name, metrics in rows.items()
    ]
    return markdown_table(columns, lines, padded=True)
