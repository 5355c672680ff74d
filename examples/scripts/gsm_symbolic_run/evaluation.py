"""Records of every model, and what is computed from them."""

import json
from pathlib import Path
from statistics import mean

from transformers import AutoTokenizer

from trl_cmdp.cli import main as trl_cmdp
from trl_cmdp.evaluation import EvaluationSettings, evaluate
from trl_cmdp.evaluation.progress import show_progress
from trl_cmdp.evaluation.provenance import weights_fingerprint
from trl_cmdp.tasks import gsm_symbolic

from .run import DTYPE, Run, load_model
from .scales import COST_LIMIT


SPLITS = ("validation", "test")


def record_model(name: str, run: Run) -> None:
    """Records of one model on both splits. Those of an evaluation that was stopped are completed."""
    scale = run.scale
    teacher_folder = run.folder / "teacher"
    tokenizer, teacher = AutoTokenizer.from_pretrained(teacher_folder), load_model(teacher_folder, DTYPE)
    model = load_model(run.folder / name, DTYPE)
    for split in SPLITS:
        problems = run.problems(split)
        settings = EvaluationSettings(
            name=name,
            student=name,
            student_fingerprint=weights_fingerprint(run.folder / name),
            teacher="teacher",
            teacher_fingerprint=weights_fingerprint(teacher_folder),
            task="gsm_symbolic",
            split=split,
            num_problems=len(problems),
            num_samples=scale.num_samples,
            seed=run.seed,
            max_new_tokens=scale.max_completion_length,
            batch_size=scale.evaluation_batch_size,
            cost_limit=COST_LIMIT,
        )
        with show_progress(f"  seed {run.seed}, {name}, {split}") as progress:
            evaluate(
                model,
                tokenizer,
                problems,
                gsm_symbolic.final_answer_reward,
                settings=settings,
                records_path=run.folder / "records" / f"{name}-{split}.jsonl",
                teacher=teacher,
                progress=progress,
            )


def make_tables(folder: Path, run: Run) -> None:
    """Tables, plots and reports from the records. No model is needed."""
    states = [str(run.folder / method) for method in run.scale.methods]
    others = [method for method in run.scale.methods if method != "constrained"]
    for split in SPLITS:
        # Differences are to the first.
        names = ("constrained", *others, "student", "teacher")
        files = [str(run.folder / "records" / f"{name}-{split}.jsonl") for name in names]
        run_command("evaluate", "--records", *files, "--judge", "process", "--output_dir", str(folder / split))
        run_command("report", *files, *states, "--output_dir", str(folder / split / "report"))


def run_command(*arguments: str) -> None:
    """Runs a command of `trl-cmdp`."""
    if trl_cmdp(arguments) != 0:
        raise SystemExit(f"trl-cmdp {' '.join(arguments)} failed.")


def seeds_table(runs: list[Run]) -> str:
    """Means over the seeds, and each seed's figure, in Markdown."""
    lines = [
        "| split | model | final answer, % | satisfaction, % | KL, nats per token |",
        "| :--- | :--- | ---: | ---: | ---: |",
    ]
    for split in SPLITS:
        summaries = [json.loads((run.folder / "evaluate" / split / "summary.json").read_text()) for run in runs]
        for seeds in zip(*(summary["evaluations"] for summary in summaries), strict=True):
            sampled = [each["sampled"] for each in seeds]
            cells = (
                _over_seeds([100 * each["right"]["value"] for each in sampled], 1),
                _over_seeds([100 * each["costs"]["satisfaction"]["value"] for each in sampled], 1),
                _over_seeds([each["costs"]["divergence"]["value"] for each in sampled], 3),
            )
            lines.append(f"| {' | '.join((split, seeds[0]['settings']['name'], *cells))} |")
    seeds = ", ".join(str(run.seed) for run in runs)
    return "\n".join([*lines, "", f"Means over seeds, and in brackets the figures of seeds {seeds}.", ""])


def _over_seeds(values: list[float], digits: int) -> str:
    return f"{mean(values):.{digits}f} ({', '.join(f'{value:.{digits}f}' for value in values)})"
