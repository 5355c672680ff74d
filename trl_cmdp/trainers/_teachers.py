"""The teachers of a trainer, from its arguments, and the dataset column that chooses among several."""

from functools import partial
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.models.utils import prepare_deepspeed

from ..teachers import (
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
from ._config import DistillConfig
from ._processes import on_any_process


TeacherModel = str | PreTrainedModel | dict[str, str | PreTrainedModel]


def has_teacher(teacher_model: TeacherModel | None, args: Any) -> bool:
    """
    Whether the arguments of a trainer name a teacher.

    Raises:
        ValueError: If they name two in different ways.
    """
    if not isinstance(args, DistillConfig):
        return teacher_model is not None
    by_server, by_adapter = args.teacher_model_server_url is not None, args.teacher_adapter_name is not None
    if by_adapter and (by_server or teacher_model is not None):
        raise ValueError(
            "`teacher_adapter_name` makes the student's own base model the teacher: leave out `teacher_model` and "
            "`teacher_model_server_url`, or it."
        )
    if by_server and not (teacher_model is None or isinstance(teacher_model, str)):
        raise ValueError(
            "With `teacher_model_server_url` the server runs the teacher: leave out `teacher_model`, or give the path "
            "or hub id of the checkpoint that the server runs."
        )
    return by_server or by_adapter or teacher_model is not None


def make_teachers(trainer: GRPOTrainer, teacher_model: TeacherModel | None) -> dict[str, Teacher]:
    """
    Teachers by name, loaded, checked against the student and prepared for its devices.

    Raises:
        TeacherServerError: If there is no teacher server at the address given, or it is of no use.
        ValueError: For a teacher that shares what is trained, another vocabulary, a dataset that names none.
    """
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
    evaluation = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"eval": trainer.eval_dataset}
    for dataset in (trainer.train_dataset, *evaluation.values()):
        if isinstance(dataset, Dataset):  # a stream is checked as it comes
            names = dataset.unique("teacher") if "teacher" in dataset.column_names else [None]
            for name in names:
                check_teacher_name(name, list(teacher_model))
    return {name: _local_teacher(trainer, model) for name, model in teacher_model.items()}


def check_teacher_name(name: str | None, names: list[str]) -> None:
    """
    Check what a row of the dataset says in its column `teacher`, `None` where it has none.

    Raises:
        ValueError: If it is not the name of a teacher.
    """
    if name not in names:
        found = "no such column" if name is None else repr(name)
        raise ValueError(
            "With several teachers the dataset's column `teacher` chooses one for each prompt, of "
            f"{', '.join(map(repr, names))}; found {found}. Add or correct the column."
        )


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
