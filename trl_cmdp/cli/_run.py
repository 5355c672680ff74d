"""Training and evaluating one student, for the demo and the cells of a comparison."""

import asyncio
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from logging import ERROR, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .._defaults import CostScope
from ._arguments import refusals


if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..evaluation import Rollout
    from ..trainers.engine.config import DistillConfig
    from ..trainers.engine.distill_trainer import DistillTrainer
    from ._setup import Setup

# Stem of trainer and config, by the name that an experiment gives. Without a teacher the constrained trainer is GRPO.
TRAINERS = {
    "constrained": "ConstrainedDistill",
    "grpo": "ConstrainedDistill",
    "lagrangian": "LagrangianDistill",
    "gkd": "GKDDistill",
    "minillm": "MiniLLMDistill",
}
# Fields of a config that say how models are loaded, which is done here.
LOADING_FIELDS = ("model_init_kwargs", "teacher_model_init_kwargs", "teacher_model_revision")


@dataclass(frozen=True)
class Answer:
    """A model's answer to one problem, as it was judged, and what each token cost."""

    rollout: "Rollout"
    correct: bool
    valid: bool | None  # every step valid; `None` where nothing checks the steps
    reward: float
    costs: "torch.Tensor"  # (L,), nats

    @property
    def cost(self) -> float:
        """Mean cost, in nats per token."""
        return self.costs.mean().item()

    def cost_in(self, scope: CostScope) -> float:
        """Cost in the unit of a scope."""
        from ..core import rollout_cost

        if scope == "mean":
            return self.cost
        return rollout_cost(self.costs.unsqueeze(0), self.costs.new_ones(1, len(self.costs)), scope).item()


def distill_class(trainer: str, kind: Literal["Trainer", "Config"]) -> Any:
    """Trainer or config class of a name in [`TRAINERS`]."""
    return getattr(import_module("trl_cmdp"), TRAINERS[trainer] + kind)


def set_up_process(num_threads: int = 1, *, verbose: bool = False) -> None:
    """
    Few threads, and quiet libraries unless they are to be heard. Some speak when they are imported: this comes first.
    """
    import torch
    from datasets import disable_progress_bars
    from transformers.utils import logging

    torch.set_num_threads(num_threads)
    if not verbose:
        # What no argument of a command can answer: renamings inside libraries, a kernel of another package.
        warnings.filterwarnings("ignore", category=FutureWarning)
        getLogger("bitsandbytes").setLevel(ERROR)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        disable_progress_bars()


def load_tokenizer(setup: "Setup") -> "PreTrainedTokenizerBase":
    """Tokenizer of the student."""
    from transformers import AutoTokenizer

    revision = (setup.config_fields.get("model_init_kwargs") or {}).get("revision", "main")
    tokenizer = AutoTokenizer.from_pretrained(setup.student, revision=revision, trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_models(setup: "Setup") -> "tuple[PreTrainedTokenizerBase, PreTrainedModel, PreTrainedModel]":
    """Tokenizer, untrained student, with weights in float32 as TRL has it, and teacher, in its own dtype."""
    import torch
    from transformers import AutoModelForCausalLM

    from ..teachers import load_teacher

    fields = setup.config_fields
    # `None`, the default of transformers for remote code, asks on the terminal.
    options = {"dtype": torch.float32, "trust_remote_code": False, "use_safetensors": True}
    options.update(fields.get("model_init_kwargs") or {})
    student = AutoModelForCausalLM.from_pretrained(setup.student, **options)
    of_teacher = (fields.get("teacher_model_revision"), fields.get("teacher_model_init_kwargs") or {})
    device = "cpu" if fields["use_cpu"] else "cuda"
    return load_tokenizer(setup), student.to(device), load_teacher(setup.teacher, *of_teacher).to(device)


def as_evaluated(
    student: "PreTrainedModel", teacher: "PreTrainedModel", setup: "Setup", args: "DistillConfig"
) -> "tuple[PreTrainedModel, PreTrainedModel]":
    """A trained student and its teacher, without the autocast that the trainer has put around both."""
    if not (args.bf16 or args.fp16):
        return student, teacher
    _, plain, teacher = load_models(setup)
    plain.load_state_dict(student.state_dict())
    return plain, teacher


def training_args(
    trainer: str,
    shared_fields: dict[str, Any],
    own_fields: dict[str, Any],
    *,
    steps: int,
    seed: int,
    cost_limit: float,
    output_dir: str | Path,
) -> "DistillConfig":
    """Training arguments of one student, equal for all methods but for the fields of its own, which come first."""
    shared = {
        "output_dir": str(output_dir),
        "cost_limit": cost_limit,
        "max_steps": steps,
        "seed": seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        **{name: value for name, value in shared_fields.items() if name not in LOADING_FIELDS},
    }
    return distill_class(trainer, "Config")(**{**shared, **own_fields})


def train_student(
    student: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    teacher: "PreTrainedModel",
    args: "DistillConfig",
    trainer: str,
    setup: "Setup",
) -> "DistillTrainer":
    """Train the student itself, and return its trainer, which holds the log history."""
    from transformers import PrinterCallback

    from ._progress import TrainingProgress

    run = distill_class(trainer, "Trainer")(
        model=student,
        reward_funcs=setup.reward_funcs,
        args=args,
        train_dataset=setup.train_problems(args.max_steps, args.seed),
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
    setup: "Setup",
    seed: int,
    *,
    greedy: bool = False,
) -> list[Answer]:
    """One answer to each problem, sampled at temperature 1 or greedy, with its costs at temperature 1."""
    from ..evaluation import sample_rollouts, score_rollouts, with_teacher_prompts
    from ..evaluation.rollouts import eos_ids
    from ..teachers import end_ids

    fields = setup.config_fields
    ends = end_ids(tokenizer, eos_ids(model, tokenizer), fields.get("teacher_eos_token"))
    rollouts = sample_rollouts(
        model,
        tokenizer,
        problems["prompt"],
        max_new_tokens=fields["max_completion_length"],
        greedy=greedy,
        batch_size=setup.batch_size,
        seed=seed,
        chat_template_kwargs=fields.get("chat_template_kwargs"),
    )
    if "teacher_prompt" in problems.column_names:
        kwargs = fields.get("chat_template_kwargs")
        rollouts = with_teacher_prompts(
            rollouts, problems["teacher_prompt"], teacher, tokenizer, chat_template_kwargs=kwargs
        )
    costs = score_rollouts(rollouts, model, teacher, batch_size=setup.batch_size, ends=ends)
    return [Answer(*values) for values in zip(rollouts, *judge(rollouts, problems, setup), costs, strict=True)]


def judge(
    rollouts: "list[Rollout]", problems: "Dataset", setup: "Setup"
) -> tuple[list[bool], list[bool | None], list[float]]:
    """Of each rollout whether its final answer is correct and its steps are valid, and its reward."""
    import torch

    from ..evaluation.win_rates import problem_text

    rows = [dict(row) for row in problems]
    per_func = [call_as_trl(reward, rows, rollouts) for reward in setup.reward_funcs]
    correct = per_func[0] if setup.correct_func is None else call_as_trl(setup.correct_func, rows, rollouts)
    valid: list[bool | None] = [None] * len(rollouts)
    if setup.valid_steps is not None:
        valid = [bool(setup.valid_steps(problem_text(rollout.prompt), rollout.completion)) for rollout in rollouts]
    weights = torch.tensor(setup.config_fields.get("reward_weights") or [1.0] * len(per_func))
    values = torch.tensor([[torch.nan if value is None else value for value in values] for values in per_func])
    rewards = (values * weights.unsqueeze(1)).nansum(0)  # (n,), as TRL sums; 0 where no function gives one
    return [value == 1.0 for value in correct], valid, rewards.tolist()


def call_as_trl(
    reward: Callable[..., Any], rows: list[dict[str, Any]], rollouts: "Sequence[Rollout]"
) -> "Sequence[float | None]":
    """The rewards of rollouts, by a function that may ask for all that TRL gives to one in training."""
    from transformers import TrainerState

    from ..evaluation.evaluator import call_reward

    def called(**kwargs: Any) -> Any:
        values = reward(**kwargs, trainer_state=TrainerState(), log_extra=_ignore, log_metric=_ignore)
        return list(asyncio.run(values) if asyncio.iscoroutine(values) else values)

    return call_reward(called, rows, rollouts)


def _ignore(name: str, value: Any) -> None:
    pass
