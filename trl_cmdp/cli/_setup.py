"""What is trained on what, and how an answer is judged: what an embedded task brings, what a user names, or both."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._defaults import COST_SCOPE
from .._files import is_data_file
from ._tasks import load_problems, load_reward, load_task, task_names


if TYPE_CHECKING:
    from datasets import Dataset

# Keys of an experiment that say what is trained on what. An embedded task brings all but the optional ones.
REQUIRED_SOURCES = ("student", "teacher", "train_dataset", "test_dataset", "reward_funcs")
SOURCES = (*REQUIRED_SOURCES, "correct_func", "valid_steps")
PROMPTS_PER_STEP, NUM_GENERATIONS, LEARNING_RATE = 16, 8, 3e-4  # of the embedded tasks
_EMBEDDED_BATCH_SIZE, _BATCH_SIZE = 250, 32  # rollouts evaluated at a time: part of what a seed means
_OWN = {"correct_func": None, "valid_steps": None, "batch_size": _BATCH_SIZE, "prompts_per_step": None}
_DATASET_KEYS = ("path", "name", "split", "num_problems")


@dataclass(frozen=True)
class Problems:
    """Where problems come from: a task, or a file, a folder of files or a dataset on the Hub."""

    split: str
    task: str | None = None
    options: dict[str, Any] = field(default_factory=dict)  # of the task's `load_problems`
    path: str | None = None
    name: str | None = None  # configuration on the Hub
    num_problems: int | None = None  # all of them by default

    def draw(self, n: int | None, seed: int) -> "Dataset":
        """The first `n` problems in the order of the seed, `num_problems` of them if `None`."""
        from ..tasks import table  # loads datasets

        n = self.num_problems if n is None else n
        if self.task is not None:
            return load_problems(load_task(self.task), n, self.split, seed, **self.options)
        assert self.path is not None
        return table.draw(table.open_split(self.path, self.split, self.name), n, seed)


@dataclass(frozen=True)
class Setup:
    """What is trained on what, and how an answer is judged."""

    student: str  # folder or Hub id
    teacher: str
    train_dataset: Problems
    test_dataset: Problems
    reward_funcs: list[Callable[..., Any]]
    correct_func: Callable[..., Any] | None  # 1 where the final answer is correct; the first of the rewards if `None`
    valid_steps: Callable[[str, str], bool] | None  # of prompt and completion
    config_fields: dict[str, Any]  # of every method's config
    batch_size: int  # rollouts evaluated at a time
    prompts_per_step: int | None  # train problems that are drawn for each step, all there are if `None`

    def train_problems(self, steps: int, seed: int) -> "Dataset":
        """Problems to train on, in the order of the seed."""
        return self.train_dataset.draw(None if self.prompts_per_step is None else steps * self.prompts_per_step, seed)


def embedded_setup(name: str) -> Setup:
    """What an embedded task brings."""
    task = load_task(name)
    return Setup(
        student=task.demo_model_path("student"),
        teacher=task.demo_model_path("teacher"),
        train_dataset=Problems("train", name),
        test_dataset=Problems("test", name),
        reward_funcs=[task.final_answer_reward],
        correct_func=None,
        valid_steps=task.valid_steps,
        config_fields={
            "num_generations": NUM_GENERATIONS,
            "per_device_train_batch_size": PROMPTS_PER_STEP * NUM_GENERATIONS,
            "max_completion_length": task.MAX_COMPLETION_LENGTH,
            "learning_rate": LEARNING_RATE,
            "use_cpu": True,
            "bf16": False,  # the models are tiny: a CPU is faster in float32
            "gradient_checkpointing": False,
        },
        batch_size=_EMBEDDED_BATCH_SIZE,
        prompts_per_step=PROMPTS_PER_STEP,
    )


def load_setup(settings: dict[str, Any], folder: Path) -> Setup:
    """
    What an experiment's settings name, with relative paths from the folder of its file. Reward functions are imported,
    models and data are not loaded. A mistake is a `ValueError` that names the key.
    """
    brought = vars(embedded_setup(settings["task"])) if "task" in settings else _OWN
    named = {key: _READERS[key](key, settings[key], folder) for key in SOURCES if key in settings}
    if "train_dataset" in settings:
        named["prompts_per_step"] = None
    if "reward_funcs" not in brought | named:
        named["reward_funcs"] = [load_task(named["test_dataset"].task).final_answer_reward]
    fields = config_fields_of(settings)
    batch_size = fields.get("per_device_eval_batch_size", brought["batch_size"])
    return Setup(**{**brought, **named, "config_fields": fields, "batch_size": batch_size})


def config_fields_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Fields that every method's config gets."""
    given = settings.get("config_fields", {})
    on_gpu = not given.get("use_cpu", False)
    brought = embedded_setup(settings["task"]).config_fields if "task" in settings else _own_config_fields(on_gpu)
    return {**brought, "cost_scope": settings.get("cost_scope", COST_SCOPE), **given}


def name_of(settings: dict[str, Any]) -> str:
    """What tables call the problems of an experiment."""
    dataset = settings.get("test_dataset", settings.get("task"))
    return dataset if isinstance(dataset, str) else str(dataset.get("task", dataset.get("path")))


def is_task(dataset: Any) -> bool:
    """Whether an experiment's dataset is a task, which brings a reward."""
    return (dataset.get("task") if isinstance(dataset, dict) else dataset) in task_names()


def _own_config_fields(on_gpu: bool) -> dict[str, Any]:
    """What is no experiment's own: on a GPU, if that is wanted and there is one, as the training commands have it."""
    import torch
    from trl import GRPOConfig

    on_gpu = on_gpu and torch.cuda.is_available()
    return {
        "max_completion_length": GRPOConfig.max_completion_length,
        "use_cpu": not on_gpu,
        # A CPU is faster, and exact, in float32.
        "bf16": on_gpu and torch.cuda.is_bf16_supported(),
    }


def _model(key: str, value: Any, folder: Path) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"`{key}` must be the folder of a model or its id on the Hub, got {value!r}.")
    return _resolved(key, value, folder)


def _problems(key: str, value: Any, folder: Path) -> Problems:
    default_split = key.removesuffix("_dataset")
    if isinstance(value, str) and value:
        value = {"task": value} if value in task_names() else _path_and_name(value, folder)
    if not isinstance(value, dict) or not (value.get("task") or value.get("path")):
        raise ValueError(
            f"`{key}` must be a file, a folder or a dataset on the Hub (org/name or org/name:config), the name of a task "
            f"({', '.join(task_names())}), or a mapping with `path` or `task`, got {value!r}."
        )
    n = value.get("num_problems")
    if n is not None and key == "test_dataset":
        raise ValueError("`test_dataset` takes no `num_problems`: `held_out` says how many.")
    if n is not None and (type(n) is not int or n < 1):
        raise ValueError(f"`num_problems` of `{key}` must be an integer of at least 1, got {n!r}.")
    value = dict(value)
    if isinstance(value.get("path"), str):
        value["path"] = _resolved(key, value["path"], folder)
        if is_data_file(value["path"]):
            default_split = "train"  # what a single file's rows are
    split = str(value.pop("split", default_split))
    task = value.pop("task", None)
    if task is not None:
        if task not in task_names():
            raise ValueError(f"`{key}`: there is no task {task!r}; there are {', '.join(task_names())}.")
        value.pop("num_problems", None)
        return Problems(split, task, options=value, num_problems=n)
    unknown = [name for name in value if name not in _DATASET_KEYS]
    if unknown or not all(isinstance(value.get(name, ""), str) for name in ("path", "name")):
        raise ValueError(
            f"`{key}` takes the keys {', '.join(_DATASET_KEYS)} beside a `path`, all but the last text, got {value!r}."
        )
    return Problems(split, path=value["path"], name=value.get("name"), num_problems=n)


def _path_and_name(text: str, folder: Path) -> dict[str, str]:
    """A path, or an id on the Hub and after a colon its configuration."""
    path, colon, name = text.rpartition(":")
    if not colon or "/" in name or (folder / text).exists():
        return {"path": text}
    return {"path": path, "name": name}


def _resolved(key: str, path: str, folder: Path) -> str:
    """A path from the folder of the experiment's file. What is none stays what it is: an id on the Hub, a URL."""
    here = folder / Path(path).expanduser()
    if here.exists():
        return str(here)
    is_hub_id = path.count("/") <= 1 and path[0] not in "./~" and not is_data_file(path)
    if is_hub_id or "://" in path:
        return path
    raise ValueError(
        f"`{key}`: there is no {here}. A relative path is relative to the folder of the experiment's file."
    )


def _functions(key: str, value: Any, folder: Path) -> list[Callable[..., Any]]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names:
        raise ValueError(f"`{key}` must be the dotted path of a function, or a list of them, got {value!r}.")
    return [_function(key, name, folder) for name in names]


def _function(key: str, value: Any, folder: Path) -> Callable[..., Any]:
    if not isinstance(value, str) or not value:
        raise ValueError(f"`{key}` must be the dotted path of a function, got {value!r}.")
    try:
        function = load_reward(value, folder)
    except (ImportError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"`{key}`: {value!r} cannot be imported: {str(error).rstrip('.')}. Modules are looked for in the folder of the "
            "experiment's file, too."
        ) from error
    if not callable(function):
        raise ValueError(f"`{key}`: {value!r} is no function but {type(function).__name__}.")
    return function


_READERS: dict[str, Callable[[str, Any, Path], Any]] = {
    "student": _model,
    "teacher": _model,
    "train_dataset": _problems,
    "test_dataset": _problems,
    "reward_funcs": _functions,
    "correct_func": _function,
    "valid_steps": _function,
}
