"""What a trained student's folder says of its run, by the names of `trl-cmdp evaluate`, which reads it there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from datasets import Dataset
from trl import GRPOConfig, is_conversational
from trl.trainer.utils import get_config_model_id

from ..._messages import without_secrets
from ...core.fingerprint import plain
from ...teachers import AdapterTeacher, LocalTeacher


def of_rollouts(args: GRPOConfig, train_dataset: Any) -> dict[str, Any]:
    """How completions were sampled."""
    settings = {
        "temperature": float(args.temperature),
        "max_new_tokens": args.max_completion_length,
        "chat_template_kwargs": args.chat_template_kwargs,
        "conversational": is_conversational(train_dataset[0]) if isinstance(train_dataset, Dataset) else None,
    }
    return plain(without_secrets({name: value for name, value in settings.items() if value is not None}))


def of_teachers(teachers: Mapping[str, Any], given: Any, args: Any, accelerator: Accelerator) -> dict[str, Any]:
    """Where the teacher is, as it was `given` to the trainer. Of several teachers, which no evaluation has, their names."""
    if len(teachers) > 1:
        return {"teachers": list(teachers)}
    (name, teacher), settings = *teachers.items(), {"teacher_eos_token": args.teacher_eos_token}
    if isinstance(teacher, AdapterTeacher):
        settings["teacher_adapter_name"] = name
    elif isinstance(teacher, LocalTeacher):
        settings |= {
            "teacher": _source(given, teacher, accelerator),
            "teacher_model_revision": args.teacher_model_revision,
        }
    else:
        settings["teacher_model_server_url"] = teacher.remote.url
    return without_secrets({name: value for name, value in settings.items() if value})


def of_limit(args: Any, token_cost: str, log_history: list[Mapping[str, Any]]) -> dict[str, Any]:
    """What a rollout costs and may cost: a limit that was found is the one that was logged last."""
    logged = [entry["constraint/limit"] for entry in log_history if "constraint/limit" in entry]
    limit = float(args.cost_limit) if isinstance(args.cost_limit, float | int) else logged[-1] if logged else None
    settings = {"teacher_beta": float(args.teacher_beta), "cost_scope": args.cost_scope}
    if token_cost != "divergence" or args.teacher_prob_floor > 0:
        return {**settings, "limit_of_another_cost": limit}
    return {**settings, "cost_limit": limit} if limit is not None else settings


def _source(given: Any, teacher: LocalTeacher, accelerator: Accelerator) -> str | None:
    """Path or Hub id of a teacher. An instance says where it came from, but not with which adapter."""
    if not isinstance(given, str):
        module: torch.nn.Module = accelerator.unwrap_model(teacher.module)
        given = None if is_peft_model(module) else get_config_model_id(module.config)
    return str(Path(given).resolve()) if given and Path(given).is_dir() else given
