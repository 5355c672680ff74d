"""The teachers of a trainer, from its arguments, and which of several each rollout has."""

from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.models.utils import prepare_deepspeed

from ...teachers import (
    EXACT_SERVER_COMMAND,
    AdapterTeacher,
    LocalTeacher,
    RemoteTeacher,
    ServerTeacher,
    Teacher,
    base_model,
    check_vocabulary,
    load_teacher,
)
from .checks import check_teacher_column, check_teacher_name
from .processes import on_any_process


TeacherModel = str | PreTrainedModel | dict[str, str | PreTrainedModel]


def make_teachers(trainer: GRPOTrainer, teacher_model: TeacherModel | None) -> dict[str, Teacher]:
    """Teachers by name, loaded, checked against the student and prepared for its devices."""
    args = trainer.args
    if args.teacher_adapter_name is not None:
        adapter_teacher = AdapterTeacher(trainer.model, trainer.accelerator, args.teacher_adapter_name)
        return {args.teacher_adapter_name: adapter_teacher}
    if args.teacher_model_server_url is not None:
        return {"teacher": _server_teacher(trainer, teacher_model)}
    if not isinstance(teacher_model, dict):
        return {"teacher": _local_teacher(trainer, teacher_model)}
    if not teacher_model:
        raise ValueError("`teacher_model` is an empty dict. Name at least one teacher.")
    check_teacher_column(list(teacher_model), trainer.train_dataset, trainer.eval_dataset)
    return {name: _local_teacher(trainer, model) for name, model in teacher_model.items()}


def teacher_index(rows: list[dict[str, Any]], teachers: list[str], device: torch.device) -> torch.Tensor:
    """Index of the teacher of each rollout, (b,): of several, the one that its row names."""
    if len(teachers) == 1:
        return torch.zeros(len(rows), dtype=torch.long, device=device)
    for row in rows:
        check_teacher_name(row.get("teacher"), teachers)
    return torch.tensor([teachers.index(row["teacher"]) for row in rows], device=device)


def _local_teacher(trainer: GRPOTrainer, model: str | PreTrainedModel) -> LocalTeacher:
    args, accelerator = trainer.args, trainer.accelerator
    # Before the teacher is frozen, which would freeze what it shares with the student.
    trained = {id(parameter) for parameter in trainer.model.parameters()}
    if isinstance(model, torch.nn.Module) and any(id(shared) in trained for shared in model.parameters()):
        raise ValueError(
            "`teacher_model` shares parameters with the model being trained, so it would change with the student. Pass "
            "another instance, or the teacher's path. For a student that trains an adapter, "
            "`teacher_adapter_name='base'` takes its base model as the teacher."
        )
    teacher = load_teacher(model, args.teacher_model_revision, args.teacher_model_init_kwargs)
    check_vocabulary(base_model(accelerator.unwrap_model(trainer.model)), trainer._tokenizer, teacher.config)
    if trainer.is_deepspeed_enabled:
        return LocalTeacher(prepare_deepspeed(teacher, accelerator), accelerator)
    return LocalTeacher(accelerator.prepare_model(teacher, evaluation_mode=True), accelerator)


def _server_teacher(trainer: GRPOTrainer, model: str | None) -> ServerTeacher:
    args = trainer.args
    remote = RemoteTeacher(
        args.teacher_model_server_url,
        args.teacher_model_server_api_key,
        model=model,
        revision=args.teacher_model_revision,
        timeout=args.teacher_model_server_timeout,
        max_wait=args.teacher_model_server_max_wait,
    )
    student = base_model(trainer.accelerator.unwrap_model(trainer.model))
    check_vocabulary(student, trainer._tokenizer, remote.config)
    if args.max_completion_length >= remote.max_model_len:
        raise ValueError(
            f"`max_completion_length={args.max_completion_length}` leaves no room for a prompt in the teacher server's "
            f"{remote.max_model_len} tokens. Start it with a larger `--max-model-len`."
        )
    teacher = ServerTeacher(remote, trainer.accelerator.device, partial(on_any_process, trainer.accelerator))
    if remote.exact:
        return teacher
    if trainer._needs_divergence:
        raise ValueError(
            f"The teacher server at {remote.url} gives log-probabilities of tokens only, and {type(trainer).__name__} "
            "with these arguments needs the divergence over the full vocabulary. Start a server that gives it: "
            f"{EXACT_SERVER_COMMAND}. Or use `ConstrainedDistillTrainer` with `cost='log_ratio'` or 'teacher_nll', "
            "`violation_distill_coef=0` and a `cost_limit` that is a number."
        )
    if args.temperature != 1.0 or args.teacher_prob_floor > 0:
        raise ValueError(
            f"The teacher server at {remote.url} gives log-probabilities at temperature 1 and no more. Set "
            f"`temperature=1.0` and `teacher_prob_floor=0`, or start an exact server: {EXACT_SERVER_COMMAND}"
        )
    return teacher
