"""Training and evaluating one student of an embedded task, for the demo and the cells of a comparison."""

import warnings
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ._arguments import refusals
from ._tasks import load_task


if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..evaluation import Rollout
    from ..trainers.engine.config import DistillConfig
    from ..trainers.engine.distill_trainer import DistillTrainer

# Stem of trainer and config, by the name that an experiment gives. Without a teacher the constrained trainer is GRPO.
TRAINERS = {
    "constrained": "ConstrainedDistill",
    "grpo": "ConstrainedDistill",
    "lagrangian": "LagrangianDistill",
    "gkd": "GKDDistill",
    "minillm": "MiniLLMDistill",
}
PROMPTS_PER_STEP, NUM_GENERATIONS = 16, 8
LEARNING_RATE = 3e-4
EVALUATION_BATCH_SIZE = 250


@dataclass(frozen=True)
class Answer:
    """A model's answer to one problem: is the final answer correct, every step valid, and what did each token cost?"""

    rollout: "Rollout"
    correct: bool
    valid: bool
    costs: "torch.Tensor"  # (L,), nats

    @property
    def cost(self) -> float:
        """Mean cost, in nats per token."""
        return self.costs.mean().item()


def distill_class(trainer: str, kind: Literal["Trainer", "Config"]) -> Any:
    """Trainer or config class of a name in [`TRAINERS`]."""
    return getattr(import_module("trl_cmdp"), TRAINERS[trainer] + kind)


def set_up_process(verbose: bool = False) -> None:
    """One thread, and quiet libraries unless they are to be heard."""
    import torch
    from transformers.utils import logging

    # The models are so small that a second thread costs more in waiting than it gives.
    torch.set_num_threads(1)
    if not verbose:
        # Renamings inside transformers, which no argument of a command can answer.
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def load_models(task: str) -> "tuple[PreTrainedTokenizerBase, PreTrainedModel, PreTrainedModel]":
    """Tokenizer, untrained student and teacher of a task."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = load_task(task).demo_model_path
    return (
        AutoTokenizer.from_pretrained(path("student")),
        AutoModelForCausalLM.from_pretrained(path("student")),
        AutoModelForCausalLM.from_pretrained(path("teacher")),
    )


def training_args(
    trainer: str,
    task: str,
    config_fields: dict[str, Any],
    *,
    steps: int,
    seed: int,
    cost_limit: float,
    output_dir: str | Path,
) -> "DistillConfig":
    """Training arguments of one student, equal for all methods but for the fields of its config, which come first."""
    shared = {
        "output_dir": str(output_dir),
        "cost_limit": cost_limit,
        "num_generations": NUM_GENERATIONS,
        "per_device_train_batch_size": PROMPTS_PER_STEP * NUM_GENERATIONS,
        "max_completion_length": load_task(task).MAX_COMPLETION_LENGTH,
        "max_steps": steps,
        "learning_rate": LEARNING_RATE,
        "seed": seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,  # the models are tiny: a CPU is faster in float32
        "gradient_checkpointing": False,
    }
    return distill_class(trainer, "Config")(**{**shared, **config_fields})


def train_student(
    student: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    teacher: "PreTrainedModel",
    args: "DistillConfig",
    trainer: str,
    task: str,
) -> "DistillTrainer":
    """Train the student itself, and return its trainer, which holds the log history."""
    from transformers import PrinterCallback

    from ._progress import TrainingProgress

    module = load_task(task)
    run = distill_class(trainer, "Trainer")(
        model=student,
        reward_funcs=module.final_answer_reward,
        args=args,
        train_dataset=module.load_problems(args.max_steps * PROMPTS_PER_STEP, "train", args.seed),
        processing_class=tokenizer,
        callbacks=[TrainingProgress()],
        teacher_model=None if trainer == "grpo" else teacher,
    )
    run.remove_callback(PrinterCallback)  # it would print every log
    run.how_to_resume = None
    with refusals():
        run.train()
    return run


def evaluate_student(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    teacher: "PreTrainedModel",
    problems: "Dataset",
    task: str,
    seed: int,
    *,
    greedy: bool = False,
) -> list[Answer]:
    """One answer to each problem, sampled at temperature 1 or greedy, with its costs at temperature 1."""
    from ..evaluation import sample_rollouts, score_rollouts

    module = load_task(task)
    rollouts = sample_rollouts(
        model,
        tokenizer,
        problems["prompt"],
        max_new_tokens=module.MAX_COMPLETION_LENGTH,
        greedy=greedy,
        batch_size=EVALUATION_BATCH_SIZE,
        seed=seed,
    )
    costs = score_rollouts(rollouts, model, teacher, batch_size=EVALUATION_BATCH_SIZE)
    completions = [rollout.completion for rollout in rollouts]
    correct = [reward == 1.0 for reward in module.final_answer_reward(completions, problems["answer"])]
    valid = map(module.valid_steps, problems["prompt"], completions)
    return [Answer(*values) for values in zip(rollouts, correct, valid, costs, strict=True)]
