"""`trl-cmdp demo`: distil the embedded teacher into the embedded student, and measure before and after."""

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What a run is made of. The limit is in nats per token, `--cost-limit` overrides it.
COST_LIMIT = 0.25
STEPS, QUICK_STEPS = 200, 10
HELD_OUT, QUICK_HELD_OUT = 1000, 100
PROMPTS_PER_STEP, NUM_GENERATIONS = 16, 8
MAX_COMPLETION_LENGTH = 40
LEARNING_RATE = 3e-4


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
    parser.add_argument("--steps", type=_positive_int, default=STEPS, help="optimizer steps")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/demo"), help="where everything is written")
    parser.add_argument("--cost-limit", type=_positive_float, default=COST_LIMIT, help="limit, in nats per token")
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
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from ..tasks.arithmetic import demo_model_path, load_problems

    # Renamings inside transformers, which no argument of the demo can answer.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # The models are so small that a second thread costs more in waiting than it gives.
    torch.set_num_threads(1)
    start = time.monotonic()
    steps = QUICK_STEPS if arguments.quick else arguments.steps
    num_held_out = QUICK_HELD_OUT if arguments.quick else HELD_OUT
    arguments.output_dir.mkdir(parents=True, exist_ok=True)

    tokenizer = AutoTokenizer.from_pretrained(demo_model_path("student"))
    student = AutoModelForCausalLM.from_pretrained(demo_model_path("student"))
    teacher = AutoModelForCausalLM.from_pretrained(demo_model_path("teacher"))
    held_out = load_problems(num_held_out, "test", arguments.seed)

    print(f"Evaluating teacher and student on {num_held_out} held-out problems ...", flush=True)
    measure = {"tokenizer": tokenizer, "teacher": teacher, "problems": held_out, "arguments": arguments}
    teacher_metrics = evaluate(teacher, **measure)
    before = evaluate(student, **measure)
    history = train(student, tokenizer, teacher, steps, arguments)
    print("Evaluating the trained student on the same problems ...", flush=True)
    after = evaluate(student, **measure)

    _print_table({"student before": before, "student after": after, "teacher": teacher_metrics}, arguments)
    config = {
        "method": arguments.method,
        "seed": arguments.seed,
        "steps": steps,
        "cost_limit": arguments.cost_limit,
        "prompts_per_step": PROMPTS_PER_STEP,
        "num_generations": NUM_GENERATIONS,
        "learning_rate": LEARNING_RATE,
        "max_completion_length": MAX_COMPLETION_LENGTH,
        "quick": arguments.quick,
        "seconds": round(time.monotonic() - start, 1),
    }
    metrics = {"before": before, "after": after, "teacher": teacher_metrics, "config": config}
    (arguments.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    _plot(history, arguments)
    print(f"\nStudent, metrics.json and curves.png are in {arguments.output_dir}/ ({config['seconds']:.0f} s).")
    return 0


def train(
    student: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    teacher: "PreTrainedModel",
    steps: int,
    arguments: argparse.Namespace,
    **config_fields: Any,
) -> list[dict[str, Any]]:
    """Train the student in place, save it, and return the log history. Benchmarks vary further `config_fields`."""
    from transformers import PrinterCallback

    from .. import ConstrainedDistillConfig, ConstrainedDistillTrainer
    from ..tasks.arithmetic import final_answer_reward, load_problems
    from ._progress import TrainingProgress

    args = ConstrainedDistillConfig(
        output_dir=str(arguments.output_dir / "trainer"),
        cost_limit=arguments.cost_limit,
        num_generations=NUM_GENERATIONS,
        per_device_train_batch_size=PROMPTS_PER_STEP * NUM_GENERATIONS,
        max_completion_length=MAX_COMPLETION_LENGTH,
        max_steps=steps,
        learning_rate=LEARNING_RATE,
        seed=arguments.seed,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,  # the models are tiny: a CPU is faster in float32
        gradient_checkpointing=False,
        **config_fields,
    )
    trainer = ConstrainedDistillTrainer(
        model=student,
        reward_funcs=final_answer_reward,
        args=args,
        train_dataset=load_problems(steps * PROMPTS_PER_STEP, "train", arguments.seed),
        processing_class=tokenizer,
        callbacks=[TrainingProgress(cost_limit=arguments.cost_limit)],
        teacher_model=teacher if arguments.method == "constrained" else None,  # without a teacher it is GRPO
    )
    trainer.remove_callback(PrinterCallback)  # the progress line shows what matters
    trainer.train()
    trainer.save_model(str(arguments.output_dir / "student"))
    return trainer.state.log_history


def evaluate(
    model: Any, *, tokenizer: Any, teacher: Any, problems: Any, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Metrics of a model on held-out problems: one sampled rollout each, and a greedy one beside it."""
    sampled = _measure(model, tokenizer, teacher, problems, arguments, greedy=False)
    return {**sampled, "greedy": _measure(model, tokenizer, teacher, problems, arguments, greedy=True)}


def _measure(
    model: Any, tokenizer: Any, teacher: Any, problems: Any, arguments: argparse.Namespace, *, greedy: bool
) -> dict[str, Any]:
    from ..evaluation import Rate, sample_rollouts, score_rollouts
    from ..tasks.arithmetic import final_answer_reward, valid_steps

    rollouts = sample_rollouts(
        model,
        tokenizer,
        problems["prompt"],
        max_new_tokens=MAX_COMPLETION_LENGTH,
        greedy=greedy,
        batch_size=250,
        seed=arguments.seed,
    )
    costs = score_rollouts(rollouts, model, teacher, batch_size=250)  # at temperature 1, also for greedy rollouts
    completions = [rollout.completion for rollout in rollouts]
    correct = Rate.of(reward == 1.0 for reward in final_answer_reward(completions, problems["answer"]))
    valid = Rate.of(map(valid_steps, problems["prompt"], completions))
    satisfied = Rate.of(cost.mean().item() <= arguments.cost_limit for cost in costs)
    return {
        "final_answer_correctness": correct.value,
        "final_answer_interval": list(correct.interval),
        "valid_steps_rate": valid.value,
        "valid_steps_interval": list(valid.interval),
        "satisfaction_rate": satisfied.value,
        "satisfaction_interval": list(satisfied.interval),
        "mean_cost": sum(cost.mean().item() for cost in costs) / len(costs),
        "mean_divergence": sum(cost.sum().item() for cost in costs) / sum(map(len, costs)),
        "mean_length": sum(map(len, costs)) / len(costs),
        "cost_limit": arguments.cost_limit,
        "n": len(rollouts),
    }


def _print_table(rows: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{arguments.method}, held-out problems, temperature 1, limit {arguments.cost_limit:g}")
    table.add_column("")
    for name in ("right answer", "all steps valid", "satisfaction [95%]", "mean cost (nats/token)"):
        table.add_column(name, justify="right")
    for name, metrics in rows.items():
        low, high = metrics["satisfaction_interval"]
        table.add_row(
            name,
            f"{metrics['final_answer_correctness']:.3f}",
            f"{metrics['valid_steps_rate']:.3f}",
            f"{metrics['satisfaction_rate']:.3f} [{low:.3f}, {high:.3f}]",
            f"{metrics['mean_cost']:.3f}",
        )
    Console().print(table)


def _plot(history: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    from ..reports import plot_training_curves

    title = f"trl-cmdp demo: {arguments.method}, seed {arguments.seed}"
    plot_training_curves(history, arguments.output_dir / "curves.png", title)


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value
