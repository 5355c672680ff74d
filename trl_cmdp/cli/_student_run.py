"""What a measured student's folder says of its training: the settings that the command line leaves open."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from .._files import RUN_FILE, is_data_file
from .._messages import say
from ._arguments import Mistake
from ._evaluation import replace_arguments


# What is taken, and its type.
_SETTINGS = {
    "teacher": str,
    "teacher_model_revision": str,
    "teacher_adapter_name": str,
    "teacher_eos_token": str,
    "teacher_beta": float,
    "cost_limit": float,
    "cost_scope": str,
    "temperature": float,
    "max_new_tokens": int,
    "chat_template_kwargs": dict,
    "conversational": bool,
}
_TEACHER = ("teacher", "teacher_adapter_name", "teacher_model_server_url")  # one of them names a teacher
_OF_TEACHER = (*_TEACHER, "teacher_model_revision", "teacher_eos_token")
_DEFAULTS = {"temperature": 1.0, "teacher_beta": 1.0}


def with_run_settings(arguments: argparse.Namespace, *leave_out: str) -> argparse.Namespace:
    """
    The arguments of a command that rolls a student out. What the command line leaves open is taken from the student's
    folder, but for the names to `leave_out`, and said; what is open then has its default.
    """
    file = Path(arguments.student, RUN_FILE)
    found = _read(file) if file.is_file() else {}
    given = vars(arguments)
    named = any(given[name] is not None for name in _TEACHER)
    if any(given[name] not in (None, found.get(name)) for name in ("cost_scope", "teacher_beta")):
        leave_out = (*leave_out, "cost_limit")  # a limit on another cost
    taken = {
        name: found[name]
        for name in _SETTINGS
        if name in found and given[name] is None and name not in leave_out and not (named and name in _OF_TEACHER)
    }
    if taken:
        listed = ", ".join(f"{name} {value}" for name, value in taken.items())
        say(f"Of the student's training ({file}): {listed}. What the command line gives wins.")
    if not named and "teacher" not in taken and "teacher_adapter_name" not in taken:
        _say_what_is_not_taken(found)
    if "limit_of_another_cost" in found and given["cost_limit"] is None:
        say(
            "The limit of its training was on another cost than the divergence that is measured here: give --cost_limit."
        )
    if found.get("teacher_prompt"):
        say(
            "The teacher of its training read prompts of its own: costs are of the same teacher on a dataset with the "
            "column 'teacher_prompt' alone."
        )
    defaults = {name: value for name, value in _DEFAULTS.items() if given[name] is None}
    return replace_arguments(
        arguments, **(defaults | taken), split=arguments.split or _default_split(arguments.dataset)
    )


def _say_what_is_not_taken(found: dict[str, Any]) -> None:
    if "teachers" in found:
        say(f"It was trained with the teachers {', '.join(map(str, found['teachers']))}: name one with --teacher.")
    elif "teacher_model_server_url" in found:  # a file does not decide where a key is sent
        say(f"Its teacher was on a server: give --teacher_model_server_url {found['teacher_model_server_url']}")


def _default_split(dataset: str | None) -> str:
    return "train" if dataset is not None and is_data_file(dataset) else "test"


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Mistake(f"{file} is damaged ({error}): delete it, and give what it held on the command line.") from error
    if not isinstance(found, dict):
        raise Mistake(f"{file} is not what a training writes: delete it.")
    for name, kind in _SETTINGS.items():
        if name in found and not (type(found[name]) is kind and (kind is not float or 0 <= found[name] < math.inf)):
            raise Mistake(f"{file} is not what a training writes (`{name}`): delete it.")
    return found
