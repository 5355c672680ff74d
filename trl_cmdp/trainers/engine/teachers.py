"""The teachers of a trainer, from its arguments, and which of several each rollout has."""

from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, ProcessorMixin
from trl import GRPOTrainer
from trl.models.utils import prepare_deepspeed

from ...teachers import (
    EXACT_SERVER_COMMAND,
    AdapterTeacher,
    LocalTeacher,
    OneStopTeacher,
    RemoteTeacher,
    ServerTeacher,
    Teacher,
    base_model,
    check_reading,
    check_vocabulary,
    end_ids,
    load_teacher,
    stop_ids,
    teacher_generation_config,
    warn_of_another_end,
)
from .checks import check_teacher_column, check_teacher_name
from .config import DistillConfig
from .processes import on_any_process


OneTeacher = str | torch.nn.Module | RemoteTeacher | LocalTeacher | AdapterTeacher
TeacherModel = OneTeacher | dict[str, OneTeacher]


def make_teachers(trainer: GRPOTrainer, teacher_model: TeacherModel | None) -> dict[str, Teacher]:
    """Teachers by name, loaded, checked against the student and prepared for its devices."""
    args = trainer.args
    if isinstance(teacher_model, dict):
        if not teacher_model:
            raise ValueError("`teacher_model` is an empty dict. Name at least one teacher.")
        check_teacher_column(list(teacher_model), trainer.train_dataset, trainer.eval_dataset)
        return {name: _make_teacher(trainer, model) for name, model in teacher_model.items()}
    if args.teacher_adapter_name is not None or isinstance(teacher_model, AdapterTeacher):
        name = args.teacher_adapter_name or teacher_model.adapter_name
        return {name: _adapter_teacher(trainer, name)}
    return {"teacher": _make_teacher(trainer, teacher_model)}


def common_end(trainer: GRPOTrainer) -> tuple[int, int] | None:
    """Token ids with which student and teacher end a turn, where they differ and are to be one stop action."""
    student = base_model(trainer.accelerator.unwrap_model(trainer.model))
    stops = stop_ids(trainer._tokenizer, student.generation_config)
    return end_ids(trainer._tokenizer, stops, trainer.args.teacher_eos_token)


def with_common_end(teachers: dict[str, Teacher], ends: tuple[int, int] | None) -> dict[str, Teacher]:
    """The teachers as they are asked for scores."""
    return teachers if ends is None else {name: OneStopTeacher(teacher, ends) for name, teacher in teachers.items()}


def _make_teacher(trainer: GRPOTrainer, model: OneTeacher | None) -> Teacher:
    if isinstance(model, AdapterTeacher):
        return _adapter_teacher(trainer, model.adapter_name)
    if trainer.args.teacher_model_server_url is not None or isinstance(model, RemoteTeacher):
        return _server_teacher(trainer, model)
    return _local_teacher(trainer, model.module if isinstance(model, LocalTeacher) else model)


def teacher_index(rows: list[dict[str, Any]], teachers: list[str], device: torch.device) -> torch.Tensor:
    """Index of the teacher of each rollout, (b,): of several, the one that its row names."""
    if len(teachers) == 1:
        return torch.zeros(len(rows), dtype=torch.long, device=device)
    for row in rows:
        check_teacher_name(row.get("teacher"), teachers)
    return torch.tensor([teachers.index(row["teacher"]) for row in rows], device=device)


def count_waiting(trainer: GRPOTrainer) -> None:
    """Log how long the slowest process has waited for teacher servers: per optimizer step, in evaluation per batch."""
    servers = [teacher for teacher in trainer.teachers.values() if isinstance(teacher, ServerTeacher)]
    if servers:
        seconds = torch.tensor(
            sum(server.take_seconds_waited() for server in servers), device=trainer.accelerator.device
        )
        steps = 1 / trainer.current_gradient_accumulation_steps if trainer._mode == "train" else 1
        trainer._count("teacher/wait_time", trainer.accelerator.gather(seconds).max(), steps)


def _adapter_teacher(trainer: GRPOTrainer, name: str) -> AdapterTeacher:
    teacher = AdapterTeacher(trainer.model, trainer.accelerator, name)
    if not trainer.is_deepspeed_enabled and trainer.model.device == trainer.accelerator.device:
        with teacher.active():
            check_reading(f"adapter {name!r} as a teacher", teacher.model, teacher)
    return teacher


def _local_teacher(trainer: GRPOTrainer, model: str | torch.nn.Module) -> LocalTeacher:
    args, accelerator = trainer.args, trainer.accelerator
    if args.teacher_offload and (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        raise ValueError(
            "`teacher_offload` moves whole teachers, and FSDP and DeepSpeed shard them: use what they have themselves, "
            "`fsdp_offload_params: true` or ZeRO-3's `offload_param_device: cpu` in accelerate's configuration."
        )
    # Before the teacher is frozen, which would freeze what it shares with the student.
    trained = {id(parameter) for parameter in trainer.model.parameters()}
    if isinstance(model, torch.nn.Module) and any(id(shared) in trained for shared in model.parameters()):
        raise ValueError(
            "`teacher_model` shares parameters with the model being trained, so it would change with the student. Pass "
            "another instance, or the teacher's path. For a student that trains an adapter, "
            "`teacher_adapter_name='base'` takes its base model as the teacher."
        )
    with_images = isinstance(trainer.processing_class, ProcessorMixin)
    model = load_teacher(model, args.teacher_model_revision, args.teacher_model_init_kwargs, with_images)
    _check_agreement(trainer, model.config, model.generation_config)
    if trainer.is_deepspeed_enabled:
        return LocalTeacher(prepare_deepspeed(model, accelerator), accelerator)
    teacher = LocalTeacher(accelerator.prepare_model(model, evaluation_mode=True), accelerator)
    check_reading("teacher", teacher.module, teacher)
    if teacher.max_length is not None and args.max_completion_length >= teacher.max_length:
        raise ValueError(
            f"`max_completion_length={args.max_completion_length}` leaves no room for a prompt in the {teacher.max_length} "
            "positions of the teacher. Lower it, or use a teacher with more positions."
        )
    return teacher


def _check_agreement(
    trainer: GRPOTrainer, teacher_config: PretrainedConfig, generation_config: GenerationConfig | None
) -> None:
    student = base_model(trainer.accelerator.unwrap_model(trainer.model))
    teacher_tokenizer = check_vocabulary(student, trainer._tokenizer, teacher_config)
    if trainer.args.teacher_eos_token is None:
        warn_of_another_end(trainer._tokenizer, trainer.eos_token_ids, teacher_tokenizer, generation_config)


def _server_teacher(trainer: GRPOTrainer, model: str | RemoteTeacher | None) -> ServerTeacher:
    args = trainer.args
    remote = model if isinstance(model, RemoteTeacher) else _connect(args, model)
    _check_agreement(trainer, remote.config, teacher_generation_config(remote.config.name_or_path))
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
            "`violation_distill_coef=0`, `unrewarded_distill_coef=0` and a `cost_limit` that is a number."
        )
    if args.temperature != 1.0 or args.teacher_prob_floor > 0:
        raise ValueError(
            f"The teacher server at {remote.url} gives log-probabilities at temperature 1 and no more. Set "
            f"`temperature=1.0` and `teacher_prob_floor=0`, or start an exact server: {EXACT_SERVER_COMMAND}"
        )
    return teacher


def _connect(args: DistillConfig, model: str | None) -> RemoteTeacher:
    return RemoteTeacher(
        args.teacher_model_server_url,
        args.teacher_model_server_api_key,
        model=model,
        revision=args.teacher_model_revision,
        timeout=args.teacher_model_server_timeout,
        max_wait=args.teacher_model_server_max_wait,
    )
