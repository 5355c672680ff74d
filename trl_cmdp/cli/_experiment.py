"""The experiment of `trl-cmdp compare`: a YAML file, checked before any time is spent."""

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from inspect import formatannotation
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from .._defaults import CostScope
from .._files import read_yaml
from .._messages import hide_secrets, secrets_in
from ._run import LOADING_FIELDS, TRAINERS, distill_class, training_args
from ._setup import REQUIRED_SOURCES, SOURCES, config_fields_of, is_task
from ._setup_checks import check_sources
from ._tasks import EMBEDDED_TASKS


if TYPE_CHECKING:
    from ..trainers.engine.config import DistillConfig

PRESETS = Path(__file__).parent / "experiments"
# Evaluated beside the methods, with each seed's problems.
REFERENCES = ("student", "teacher")
_REQUIRED = ("cost_limit", "steps", "seeds", "held_out", "methods")
_KEYS = ("task", *SOURCES, "cost_scope", *_REQUIRED)
_POSITIVE = {
    *("num_generations", "per_device_train_batch_size", "gradient_accumulation_steps", "max_completion_length"),
    *("learning_rate", "temperature", "per_device_eval_batch_size"),
}
_FIXED_FIELDS = {
    "output_dir": "it is the command's --output_dir",
    "seed": "list it under `seeds`",
    "max_steps": "set `steps`, which holds for every method",
    "logging_steps": "every step is logged",
    "teacher_model_server_url": "name a folder or Hub id under `teacher`",
    "teacher_adapter_name": "name a folder or Hub id under `teacher`",
}


@dataclass(frozen=True)
class Method:
    """One method of an experiment, by its name in the table."""

    name: str
    trainer: str  # a name in `TRAINERS`
    fields: dict[str, Any]  # of its config, beside those that all methods share


@dataclass(frozen=True)
class Cell:
    """One method, by its name in the table, and one seed."""

    method: str
    trainer: str  # "none" for a reference that is evaluated as it is
    seed: int
    settings: dict[str, Any]  # that decide the result: models, problems, limit, and for a method its steps and fields
    folder: str = "."  # from which the settings' relative paths are


@dataclass(frozen=True)
class Experiment:
    """Methods × seeds on one task, or on models and data of the user's own."""

    name: str  # of the preset, or of the file without its suffix
    folder: Path  # of the file
    # What is trained on what: `task`, the keys in `SOURCES`, `cost_scope`, `config_fields` of all methods, as far as they
    # are given, and the fingerprints of what they name once it is checked
    sources: dict[str, Any]
    cost_limit: float  # of the evaluation, and the methods' own, in the unit of the scope
    steps: int
    seeds: list[int]
    held_out: int  # problems of each seed
    methods: list[Method]

    def cells(self) -> list[Cell]:
        """All cells, seed by seed, so that an early look compares all methods."""
        evaluation = {**self.sources, "cost_limit": self.cost_limit, "held_out": self.held_out}
        folder = str(self.folder.resolve())
        cells = []
        for seed in self.seeds:
            cells += [Cell(name, "none", seed, evaluation, folder) for name in REFERENCES]
            for method in self.methods:
                settings = {**evaluation, "steps": self.steps, "fields": method.fields}
                cells.append(Cell(method.name, method.trainer, seed, settings, folder))
        return cells

    def training_args(self, method: Method) -> "DistillConfig":
        """Training arguments of a method, with the first seed and no output folder."""
        given = {"steps": self.steps, "seed": self.seeds[0], "cost_limit": self.cost_limit}
        fields = (config_fields_of(self.sources), method.fields)
        return training_args(method.trainer, *fields, output_dir="unused", **given)

    def checked(self) -> "Experiment":
        """The experiment with the fingerprints of what it names, which is looked at. A mistake is a `ValueError`."""
        prompts = [
            args.generation_batch_size // args.num_generations for args in map(self.training_args, self.methods)
        ]
        try:
            found = check_sources(self.sources, self.folder, held_out=self.held_out, prompts_per_step=max(prompts))
        except ValueError as error:
            raise ValueError(hide_secrets(f"{self.name}: {error}", secrets_in(self.sources))) from error
        return replace(self, sources={**self.sources, **found})

    def select(self, methods: list[str] | None, seeds: list[int] | None) -> "Experiment":
        """Some of the methods, by name, and other seeds. `None` leaves them as they are."""
        names = [method.name for method in self.methods]
        unknown = [name for name in methods or [] if name not in names]
        if unknown:
            raise ValueError(f"--methods: {self.name} has no {unknown[0]!r}, only {', '.join(names)}.")
        if seeds is not None:
            _check_seeds(seeds, "--seeds")
        chosen = [method for method in self.methods if methods is None or method.name in methods]
        return replace(self, methods=chosen, seeds=self.seeds if seeds is None else seeds)


def preset_names() -> list[str]:
    """Names of the experiments that the package brings."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_experiment(name_or_path: str) -> Experiment:
    """
    Load a preset by its name, or a YAML file by its path, and check all that it says, down to each config. Any mistake in
    it is a `ValueError` that says what to change. What it names, models, data and functions, is not looked at.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        if name_or_path not in preset_names():
            raise ValueError(
                f"There is no preset {name_or_path!r}: take one of {', '.join(preset_names())}, or the path of a .yaml file."
            )
        path = PRESETS / f"{name_or_path}.yaml"
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    content = None
    try:
        content = read_yaml(path)
        return _experiment(path, content)
    except ValueError as error:
        raise ValueError(hide_secrets(f"{path.name}: {error}", secrets_in(content))) from None  # its cause quotes too


def _experiment(path: Path, content: Any) -> Experiment:
    from ..trainers.engine.config import DistillConfig  # with torch, which the command line's help does not wait for

    if not isinstance(content, dict):
        raise ValueError(f"an experiment is a mapping with the keys {', '.join(_KEYS)}.")
    shared = _check_keys(content, {field.name for field in fields(DistillConfig) if field.init})
    if "task" in content and content["task"] not in EMBEDDED_TASKS:
        raise ValueError(
            f"unknown task {content['task']!r}: take one of {', '.join(EMBEDDED_TASKS)}, which bring models, or name "
            f"{', '.join(f'`{key}`' for key in REQUIRED_SOURCES)} of your own."
        )
    limit = content["cost_limit"]
    if not _is_number(limit) or not 0 < limit <= sys.float_info.max:
        raise ValueError(f"`cost_limit` must be a positive number of nats per token, got {limit!r}.")
    if content.get("cost_scope", "mean") not in get_args(CostScope):
        raise ValueError(
            f"`cost_scope` must be one of {', '.join(get_args(CostScope))}, got {content['cost_scope']!r}."
        )
    for key in ("steps", "held_out"):
        if not _is_int(content[key]) or not 1 <= content[key] < 2**31:
            raise ValueError(f"`{key}` must be an integer of at least 1 and below 2³¹, got {content[key]!r}.")
    _check_seeds(content["seeds"], "`seeds`")
    if not isinstance(content["methods"], dict) or not content["methods"]:
        raise ValueError(
            "`methods` must map at least one name to its trainer, such as {mine: {trainer: constrained}}."
        )
    sources = {key: content[key] for key in ("task", *SOURCES, "cost_scope") if key in content}
    if shared:
        sources["config_fields"] = shared
    _check_recordable(sources)
    experiment = Experiment(
        path.stem,
        path.parent,
        sources,
        float(limit),
        content["steps"],
        content["seeds"],
        content["held_out"],
        [_method(name, entry) for name, entry in content["methods"].items()],
    )
    _check_values(DistillConfig, shared)
    for key in ("model_init_kwargs", "teacher_model_init_kwargs", "chat_template_kwargs"):
        if isinstance(shared.get(key), str):
            raise ValueError(f"`{key}` must be a mapping, got text.")
    for method in experiment.methods:
        _check_config(method, experiment)
    return experiment


def _check_keys(content: dict[Any, Any], config_fields: set[str]) -> dict[str, Any]:
    """Check that every key is known and none is missing. Returned are the config fields of all methods."""
    for key in content:
        if key in _FIXED_FIELDS:
            raise ValueError(f"an experiment must not set `{key}`: {_FIXED_FIELDS[key]}.")
        if key not in _KEYS and key not in config_fields:
            raise ValueError(
                f"unknown key {key!r}{_suggestion(key, [*_KEYS, *sorted(config_fields)])}: the keys are "
                f"{', '.join(_KEYS)}, and the config fields that all methods share (learning_rate, "
                "max_completion_length, ...)."
            )
    required = _REQUIRED
    if "task" not in content:
        brings_reward = is_task(content.get("train_dataset")) and is_task(content.get("test_dataset"))
        required = (*(key for key in REQUIRED_SOURCES if key != "reward_funcs" or not brings_reward), *_REQUIRED)
    missing = [key for key in required if key not in content]
    if missing:
        task = " (or `task`, which brings models and data)" * (missing[0] in REQUIRED_SOURCES)
        raise ValueError(f"`{missing[0]}`{task} is missing: the keys are {', '.join(_KEYS)}.")
    return {key: value for key, value in content.items() if key not in _KEYS}


def _suggestion(name: Any, known: Iterable[str]) -> str:
    close = get_close_matches(str(name).replace("-", "_"), list(known), n=1)
    return f" (`{close[0]}`?)" if close else ""


def _method(name: Any, entry: Any) -> Method:
    # It becomes part of file names.
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        raise ValueError(
            f"the method name {name!r} must be text of letters, digits, '.', '_' and '-' (quote a number)."
        )
    if name in REFERENCES:
        raise ValueError(f"the method name {name!r} is taken by the untrained models: choose another.")
    if not isinstance(entry, dict) or "trainer" not in entry:
        raise ValueError(f"method {name!r} must name its trainer: {name}: {{trainer: {next(iter(TRAINERS))}}}.")
    if entry["trainer"] not in TRAINERS:
        raise ValueError(
            f"method {name!r} has the unknown trainer {entry['trainer']!r}: take one of {', '.join(TRAINERS)}."
        )
    return Method(name, entry["trainer"], {key: value for key, value in entry.items() if key != "trainer"})


def _check_config(method: Method, experiment: Experiment) -> None:
    config = distill_class(method.trainer, "Config")
    known = {field.name for field in fields(config) if field.init}
    for key in method.fields:
        if key in _FIXED_FIELDS:
            raise ValueError(f"method {method.name!r} must not set `{key}`: {_FIXED_FIELDS[key]}.")
        if key in LOADING_FIELDS:
            raise ValueError(f"method {method.name!r} must not set `{key}`: set it beside `methods`, for all of them.")
        if key not in known:
            raise ValueError(
                f"method {method.name!r} has the unknown config field `{key}`{_suggestion(key, known)}: see the fields "
                f"of {config.__name__}."
            )
    try:
        _check_recordable(method.fields)
        _check_values(config, method.fields)
        experiment.training_args(method)
    except (ArithmeticError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"method {method.name!r}: {error}") from error


def _check_recordable(values: dict[str, Any]) -> None:
    """Check that a record of them can be read."""
    from ..evaluation._lines import parse_json

    try:
        parse_json(json.dumps(values, allow_nan=False))
    except (RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"a value is none that a record can hold: {error}") from error


def _check_values(config: type, given: dict[str, Any]) -> None:
    """Check config fields as far as their declared types say. Of a choice among words the config itself says more."""
    from ..evaluation._lines import has_type

    types = get_type_hints(config)
    for key, value in given.items():
        if get_origin(types[key]) is not Literal and not has_type(value, types[key]):
            raise ValueError(f"`{key}` must be {formatannotation(types[key])}, got {value!r}.")
        if key in _POSITIVE and (value is None or not value > 0):
            raise ValueError(f"`{key}` must be positive, got {value}.")


def _check_seeds(seeds: Any, name: str) -> None:
    if not isinstance(seeds, list) or not seeds:
        raise ValueError(f"{name} must list at least one integer, got {seeds!r}.")
    if not all(_is_int(seed) and 0 <= seed < 2**32 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ValueError(f"{name} must be different integers from 0 to 2³² − 1, got {seeds!r}.")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_int(value) or isinstance(value, float)
