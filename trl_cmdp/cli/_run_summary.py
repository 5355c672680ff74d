"""What a training command says first and last: what is trained on what, how well the limit held, and what comes next."""

from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig, ModelConfig

from .._messages import shell_command
from ..reports.tables import markdown_table
from ..trainers.engine.checks import no_reward
from ..trainers.engine.distill_trainer import DistillTrainer
from ..trainers.telemetry.card import describe_limit, describe_satisfaction, distillation_facts


def opening(trainer: DistillTrainer, script_args: Any, model_args: ModelConfig) -> str:
    """What is trained on what, as a table."""
    args = trainer.args
    rows = [
        ("student", f"{model_args.model_name_or_path}{', an adapter on it' if model_args.use_peft else ''}"),
        ("teacher", _teacher(args, script_args.teacher_model)),
        ("data", _data(trainer, script_args)),
        ("reward", _reward(trainer)),
        ("rollouts a step", _rollouts(trainer)),
        ("steps", f"{args.max_steps:,}" if args.max_steps > 0 else f"{args.num_train_epochs:g} passes over the data"),
        ("limit", _limit(trainer)),
        ("device", _device(trainer)),
        ("output", args.output_dir),
    ]
    return markdown_table(("training", trainer._name), rows, left=(0, 1), padded=True)


def closing(trainer: DistillTrainer, script_args: Any, seconds: float) -> str:
    """How the run ended, and the commands that come next."""
    args, state, facts = trainer.args, trainer.state, distillation_facts(trainer)
    minutes, rest = divmod(round(seconds), 60)
    lines = [f"Trained to step {state.global_step} in {f'{minutes} min ' if minutes else ''}{rest} s."]
    for measured in ([] if facts is None else facts.satisfaction)[:1]:
        what = "the last evaluation" if measured.mode == "eval" else "the last training rollouts"
        lines.append(f"Within the limit ({facts.limit}), {what}: {describe_satisfaction(measured)}.")
    dataset = script_args.dataset_name if script_args.task else "HELD_OUT.jsonl"
    problems = [
        *(["--task", script_args.task] if script_args.task else []),
        *(["--dataset", dataset] if dataset else []),
    ]
    commands = [["evaluate", "--student", args.output_dir, *problems], ["report", args.output_dir]]
    lines.append("Next: " + "\n      ".join(shell_command(["trl-cmdp", *command]) for command in commands))
    return "\n".join(lines)


def _teacher(args: Any, teacher_model: str | None) -> str:
    if args.teacher_adapter_name:
        base = args.teacher_adapter_name == "base"
        return "the student's own base" if base else f"adapter {args.teacher_adapter_name} of the student's base"
    server = args.teacher_model_server_url
    return " on ".join(part for part in (teacher_model, server and f"the server {server}") if part)


def _data(trainer: DistillTrainer, script_args: Any) -> str:
    source = " of ".join(part for part in (script_args.task, script_args.dataset_name) if part) or "a mixture"
    dataset = trainer.train_dataset
    return f"{len(dataset):,} rows, {source}" if isinstance(dataset, Dataset) else f"a stream, {source}"


def _reward(trainer: DistillTrainer) -> str:
    if trainer.reward_funcs == [no_reward]:
        return "none"
    return ", ".join(trainer.reward_func_names) + ", only logged" * trainer._imitates


def _rollouts(trainer: DistillTrainer) -> str:
    args = trainer.args
    count = args.per_device_train_batch_size * args.gradient_accumulation_steps * trainer.accelerator.num_processes
    return f"{count:,} ({args.num_generations} of each prompt), of at most {args.max_completion_length:,} tokens"


def _limit(trainer: DistillTrainer) -> str:
    args = trainer.args
    if args.cost_limit == "auto":
        return f"found after {args.auto_limit_steps} steps of imitation"
    text = describe_limit(args.cost_limit, args.cost_scope, [])
    return text if trainer._keeps_limit else f"{text}, only measured against"


def _device(trainer: DistillTrainer) -> str:
    args: GRPOConfig = trainer.args
    device, count = trainer.accelerator.device, trainer.accelerator.num_processes
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    return f"{f'{count} x ' if count > 1 else ''}{name}, {dtype}"
