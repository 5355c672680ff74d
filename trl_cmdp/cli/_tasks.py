"""Tasks and rewards, by the names that the command line knows them by."""

import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset

# Tasks that bring their models, and a check of each step of an answer.
EMBEDDED_TASKS = ("arithmetic", "nested", "chains")
_TRL_REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "get_soft_overlong_punishment")


def load_task(name: str) -> Any:
    """Module of a task, or a `ValueError` that lists those there are."""
    if name not in task_names():
        raise ValueError(f"There is no task {name!r}; there are {', '.join(task_names())}.")
    return import_module(f"trl_cmdp.tasks.{name}")


def task_names() -> list[str]:
    """Names of the tasks that there are."""
    modules = iter_modules(import_module("trl_cmdp.tasks").__path__)
    return sorted(module.name for module in modules if not module.name.startswith("_"))


def task_name(task: Any) -> str:
    """Name of a task, given its module."""
    return task.__name__.rpartition(".")[2]


def load_problems(task: Any, n: int | None, split: str, seed: int, **options: Any) -> "Dataset":
    """Problems of a task. An option that the task does not have, or lacks, is a `ValueError`."""
    try:
        inspect.signature(task.load_problems).bind(n, split, seed, **options)
    except TypeError as error:
        raise ValueError(f"The task {task_name(task)}: {error}.") from error
    return task.load_problems(n, split, seed, **options)


def load_reward(name: str, folder: Path | None = None) -> Callable[..., list[float | None]]:
    """
    A reward function by the name that `trl grpo` knows it by, or by its dotted path from a folder, the working directory
    if `None`.
    """
    if name in _TRL_REWARDS:
        from trl import rewards

        if name == "get_soft_overlong_punishment":
            return rewards.get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256)
        return getattr(rewards, name)
    path, _, function = name.rpartition(".")
    if not path:
        raise ValueError(
            f"Unknown reward {name!r}: give one of {', '.join(_TRL_REWARDS)}, or a dotted path (my_lib.rewards.mine)."
        )
    root = str((folder or Path()).resolve())
    if root not in sys.path:
        sys.path.insert(0, root)
    try:
        module = import_module(path)
    except ImportError:
        raise
    except Exception as error:
        raise RuntimeError(f"The module {path} of the reward raised an error: {error!r}.") from error
    try:
        return getattr(module, function)
    except AttributeError:
        raise ValueError(f"The module {path} has no reward {function!r}.") from None
