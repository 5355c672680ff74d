"""Tasks and rewards, by the names that the command line knows them by."""

import ast
import inspect
import re
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from .. import tasks
from ._parser import Mistake, did_you_mean


if TYPE_CHECKING:
    from datasets import Dataset

# Tasks that bring their models, and a check of each step of an answer.
EMBEDDED_TASKS = ("arithmetic", "nested", "chains")
_TRL_REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "get_soft_overlong_punishment")

# Where a module has one of these in its source, it may have names that stand nowhere in it.
_MADE_ELSEWHERE = r"import \*|__getattr__|sys\.modules|\b(globals|locals|vars|setattr|exec)\("


def task_names() -> list[str]:
    """Names of the tasks there are."""
    return sorted(module.name for module in iter_modules(tasks.__path__) if not module.name.startswith("_"))


def known_task(name: str) -> str:
    """The name of a task, for `argparse`."""
    names = task_names()
    if name not in names:
        raise Mistake(f"There is no task {name!r}; there are {', '.join(names)}.{did_you_mean(name, names)}")
    return name


def load_task(name: str) -> Any:
    """Module of a task, or a `ValueError` that lists those there are."""
    try:
        return import_module(f"trl_cmdp.tasks.{known_task(name)}")
    except Mistake as mistake:
        raise ValueError(str(mistake)) from None


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


def known_reward(name: str, folder: Path | None = None) -> str:
    """The name of a reward, or a dotted path that leads to one as far as can be seen without importing it, for `argparse`."""
    path, _, function = name.rpartition(".")
    if name in _TRL_REWARDS:
        return name
    if not path or not all(part.isidentifier() for part in name.split(".")):
        raise Mistake(
            f"Unknown reward {name!r}: give one of {', '.join(_TRL_REWARDS)}, or a dotted path "
            f"(my_lib.rewards.mine).{did_you_mean(name, _TRL_REWARDS)}"
        )
    if (
        (spec := _find_module(path, folder or Path())) is None
        or spec.origin is None
        or not spec.origin.endswith(".py")
    ):
        return name
    try:
        source = Path(spec.origin).read_text(encoding="utf-8")
        tree = ast.parse(source)
    except SyntaxError as error:
        raise Mistake(f"{spec.origin}, line {error.lineno}: {error.msg}.") from None
    except (OSError, ValueError):
        return name
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    if functions and not re.search(rf"\b{function}\b|{_MADE_ELSEWHERE}", source):
        question = did_you_mean(function, functions, prefix=f"{path}.")
        raise Mistake(f"The module {path} has no reward {function!r}.{question}")
    return name


def _find_module(path: str, folder: Path) -> ModuleSpec | None:
    """Where a dotted path leads without importing it, `None` if that cannot be known."""
    root = str(folder.resolve())
    if root not in sys.path:
        sys.path.insert(0, root)
    top, *rest = path.split(".")
    try:
        spec = find_spec(top)
    except ValueError:  # of a module that has none
        return None
    if spec is None:
        here = [module.name for module in iter_modules([root])]
        raise Mistake(f"No module named {top!r}.{did_you_mean(top, here)}")
    name = top
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    return spec


def load_problems_up_to(task: Any, n: int, split: str, seed: int, **options: Any) -> "Dataset":
    """Problems of a task: `n`, or as many as there are."""
    from ..tasks.table import FewerProblems

    try:
        return load_problems(task, n, split, seed, **options)
    except FewerProblems as fewer:
        return load_problems(task, fewer.available, split, seed, **options)


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
    try:
        path, _, function = known_reward(name, folder).rpartition(".")
    except Mistake as mistake:
        raise ValueError(str(mistake)) from None
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
