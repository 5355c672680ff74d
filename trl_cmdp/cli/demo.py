"""`trl-cmdp demo`: distil the embedded teacher into the embedded student, and measure before and after."""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import write_whole
from .._messages import say
from ._arguments import positive_float, positive_int, writable_folder
from ._results import add_json_option
from ._setup import LEARNING_RATE, NUM_GENERATIONS, PROMPTS_PER_STEP


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ._run import Answer
    from ._setup import Setup

TASK = "arithmetic"
# What the records call the embedded models.
TEACHER, STUDENT = f"teacher of trl_cmdp.tasks.{TASK}", f"student of trl_cmdp.tasks.{TASK}"
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
        "before and after on held-out problems, and write the student, metrics.json, curves.png, the rollouts and a report.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the problems, the rollouts and the evaluation")
    parser.add_argument("--steps", type=positive_int, default=STEPS, help="optimizer steps")
    parser.add_argument(
        "--output_dir", type=writable_folder, default=Path("outputs/demo"), help="where everything is written"
    )
    parser.add_argument("--cost_limit", type=positive_float, default=COST_LIMIT, help="limit, in nats per token")
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
    add_json_option(parser)
    parser.add_argument("--verbose", action="store_true", help="show the warnings and progress of the libraries too")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the demo."""
    # Imported here: `trl-cmdp --help` should not wait for torch and TRL.
    from ._run import load_models, set_up_process, train_student, training_args
    from ._setup import embedded_setup

    set_up_process(verbose=arguments.verbose)
    from ..reports import plot_training_curves, read_runs, write_report

    start = time.monotonic()
    steps = QUICK_STEPS if arguments.quick else arguments.steps
    num_held_out = QUICK_HELD_OUT if arguments.quick else HELD_OUT
    arguments.output_dir.mkdir(parents=True, exist_ok=True)

    setup = embedded_setup(TASK)
    tokenizer, student, teacher = load_models(setup)
    bed = _Bed(setup, tokenizer, teacher, setup.test_dataset.draw(num_held_out, arguments.seed), arguments)

    print(f"Evaluating teacher and student on {num_held_out} held-out problems ...", flush=True)
    teacher_metrics = evaluate(teacher, "teacher", TEACHER, bed)
    before = evaluate(student, "student before", STUDENT, bed)
    shared = {"steps": steps, "seed": arguments.seed, "cost_limit": arguments.cost_limit}
    args = training_args(
        arguments.method, setup.config_fields, {}, output_dir=arguments.output_dir / "trainer", **shared
    )
    trainer = train_student(student, tokenizer, teacher, args, arguments.method, setup)
    trainer.save_model(str(arguments.output_dir / "student"))
    trainer.state.save_to_json(str(arguments.output_dir / "trainer_state.json"))  # what `trl-cmdp report` reads
    print("Evaluating the trained student on the same problems ...", flush=True)
    after = evaluate(student, arguments.method, str(arguments.output_dir / "student"), bed)

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
    heading = (
        f"\n{arguments.method}, held-out problems, temperature 1, limit {arguments.cost_limit:g} nats per token\n\n"
    )
    rows = {"student before": before, "student after": after, "teacher": teacher_metrics}
    arguments.show(heading + _table(rows), metrics)
    write_whole(arguments.output_dir / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    title = f"trl-cmdp demo: {arguments.method}, seed {arguments.seed}"
    plot_training_curves(trainer.state.log_history, arguments.output_dir / "curves.png", title)
    names = ("trainer_state.json", "student-before.jsonl", f"{arguments.method}.jsonl", "teacher.jsonl")
    runs = read_runs([arguments.output_dir / name for name in names])
    page, *_ = write_report(runs, arguments.output_dir / "report", title=title)
    say(f"\nStudent, metrics.json and curves.png are in {arguments.output_dir}/ ({config['seconds']:.0f} s).")
    say(
        f"The report, with every rollout shaded by its divergence from the teacher:\n{page.resolve().as_uri()}#rollouts"
    )
    return 0


@dataclass(frozen=True)
class _Bed:
    """What every model of the demo is measured on."""

    setup: "Setup"
    tokenizer: "PreTrainedTokenizerBase"
    teacher: "PreTrainedModel"
    problems: "Dataset"
    arguments: argparse.Namespace


def evaluate(model: "PreTrainedModel", name: str, source: str, bed: _Bed) -> dict[str, Any]:
    """
    Metrics of a model on held-out problems, one sampled rollout each and a greedy one beside it. The rollouts are
    recorded in the output folder under the model's name.
    """
    from ._run import evaluate_student

    arguments = bed.arguments
    answers = {
        greedy: evaluate_student(
            model, bed.tokenizer, bed.teacher, bed.problems, bed.setup, arguments.seed, greedy=greedy
        )
        for greedy in (False, True)
    }
    path = arguments.output_dir / f"{name.replace(' ', '-')}.jsonl"
    write_whole(path, "".join(f"{line}\n" for line in _record_lines(model, name, source, answers, bed)))
    sampled, greedy = (_metrics(answers[greedy], arguments.cost_limit) for greedy in (False, True))
    return {**sampled, "greedy": greedy}


def _record_lines(
    model: "PreTrainedModel", name: str, source: str, answers: "dict[bool, list[Answer]]", bed: _Bed
) -> list[str]:
    """The records of a model's answers, sampled and greedy, as `trl-cmdp evaluate` writes them."""
    from ..core.fingerprint import fingerprint_of_rows, fingerprint_of_weights
    from ..evaluation import EvaluationSettings
    from ..evaluation.evaluator import make_record
    from ..evaluation.provenance import tokenizer_fingerprint
    from ..evaluation.rollouts import eos_ids

    settings = EvaluationSettings(
        name=name,
        student=source,
        student_fingerprint=fingerprint_of_weights(model.named_parameters()),
        teacher=TEACHER,
        teacher_fingerprint=fingerprint_of_weights(bed.teacher.named_parameters()),
        problems_fingerprint=fingerprint_of_rows(bed.problems),
        tokenizer_fingerprint=tokenizer_fingerprint(bed.tokenizer),
        student_dtype=str(model.dtype).removeprefix("torch."),
        task=TASK,
        num_problems=len(bed.problems),
        greedy=True,
        seed=bed.arguments.seed,
        max_new_tokens=bed.setup.config_fields["max_completion_length"],
        batch_size=bed.setup.batch_size,
        cost_limit=bed.arguments.cost_limit,
    )
    stops = eos_ids(model, bed.tokenizer)
    records = [
        make_record(
            (problem, greedy, 0),
            row,
            answer.rollout,
            answer.correct,
            answer.costs,
            bed.tokenizer,
            settings.max_new_tokens,
            stops,
        )
        for greedy, of_kind in answers.items()
        for problem, (row, answer) in enumerate(zip(bed.problems, of_kind, strict=True))
    ]
    return [settings.to_json(), *(record.to_json() for record in records)]


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

    columns = ("", "correct", "steps valid", "satisfaction [95%]", "mean cost")
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
