"""What a training command says of its arguments before anything heavy is imported: what they cannot be, and the help."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from .._defaults import AUTO, check_auto_limit, parse_cost_limit
from .._files import check_yaml
from ._arguments import Mistake, data_source, existing_file, mistakes, mistakes_of, model_source, writable_folder
from ._options import Option, SourceNotFoundError, launch_options, training_options
from ._parser import Parser, did_you_mean
from ._tasks import known_reward, known_task


# Options of the command itself, beside those of its dataclasses.
FILE_OPTIONS = ("config", "accelerate_config")
# First argument of the processes that accelerate starts, for which the launch arguments of the YAML file are past.
LAUNCHED = "--launched"
_TYPES: dict[str, Callable[[str], Any]] = {
    "dataset_name": data_source,
    "model_name_or_path": model_source,
    "output_dir": writable_folder,
    "reward_funcs": known_reward,
    "reward_model_name_or_path": model_source,
    "task": known_task,
    "teacher_model": model_source,
}
# What the library's messages, which are for Python, are on the command line.
_IN_PYTHON = {
    "`trainer.train(resume_from_checkpoint=True)`": "--resume_from_checkpoint true",
    "`peft_config`": "--use_peft",
    "`GKDDistillTrainer` (`trl-cmdp gkd`)": "trl-cmdp gkd",
    "`model_init_kwargs={'attn_implementation': 'eager'}`": "--attn_implementation eager",
}
_OF_FILES = {"datasets"}  # what only the YAML file can name
_QUOTES = "'\""


class _TrainingParser(Parser):
    def error(self, text: str) -> NoReturn:
        raise Mistake(text)


def check_training_arguments(command: str, arguments: list[str]) -> None:
    """
    Check what follows a training command, and the YAML file that it names: every name, and the values as far as they
    can be judged without importing the libraries that take them. What is accepted here may be refused later, never the
    other way round.

    Raises:
        Mistake: For what is wrong.
    """
    settings, file = _read_config(arguments)
    try:
        options, others = training_options(command), launch_options()
    except SourceNotFoundError:
        return  # another layout of the libraries: their own parser will say it
    parser = _parser(options, others)
    found, rest = parser.parse_known_args(arguments)
    parser.refuse_unknown([word for word in rest if word.startswith("--")])
    typed = {name: value for name, value in vars(found).items() if value is not None}
    with mistakes_of(file):
        _check_names(settings, [*options, *others, "accelerate_config", "env"])
    with mistakes():
        _check_needed({**settings, **typed})
        _check_values(typed, options, prefix="--")
    with mistakes_of(file):
        _check_values({name: value for name, value in settings.items() if name not in typed}, options)
    with mistakes():
        _check_together(command, {**settings, **typed}, options)


def as_options(text: str, command: str) -> str:
    """A message of the library, with the fields of the config that it names as the options of the command line."""
    try:
        names = training_options(command).keys() - _OF_FILES
    except SourceNotFoundError:
        return text

    def as_option(match: re.Match[str]) -> str:
        name, value = match.groups()
        if name not in names:
            return match[0]
        return f"--{name}" if value is None else f"--{name} {value.strip(_QUOTES)}"

    for python, option in _IN_PYTHON.items():
        text = text.replace(python, option)
    return re.sub(r"`(\w+)(?:=([^`]*))?`", as_option, text)


def separate_files(arguments: Sequence[str]) -> list[str]:
    """Arguments with `--config=FILE` as two words, as TRL reads it."""
    separated: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        separated += [name, value] if equals and name.removeprefix("--") in FILE_OPTIONS else [argument]
    return separated


def _parser(options: Mapping[str, Option], others: frozenset[str]) -> Parser:
    """A parser that knows every option, and keeps the values as they are written."""
    parser = _TrainingParser(add_help=False, allow_abbrev=False)
    for name in FILE_OPTIONS:
        parser.add_argument(f"--{name}")
    for option in options.values():
        parser.add_argument(f"--{option.name}", nargs=option.nargs, const="true" if option.kind == "bool" else None)
        if option.kind == "bool":
            parser.add_argument(f"--no_{option.name}", dest=option.name, action="store_const", const="false")
    for name in sorted(others - {*options, *FILE_OPTIONS}):
        parser.add_argument(f"--{name}", nargs="*")
    return parser


def _read_config(arguments: list[str]) -> tuple[dict[str, Any], str]:
    """Settings of the YAML file that is named, by names with underscores, and its path."""
    if "--config" not in arguments:
        return {}, ""
    if arguments[-1] == "--config":
        raise Mistake("--config expects a YAML file.")
    if arguments.count("--config") > 1:
        raise Mistake("--config is given twice: give one YAML file.")
    file = arguments[arguments.index("--config") + 1]
    try:
        existing_file(file)
    except Mistake as mistake:
        raise Mistake(f"--config: {mistake}") from None
    with mistakes_of(file):
        settings = check_yaml(file)
        if not isinstance(settings, dict):
            raise ValueError("it must be a mapping of options to values.")
        return {name: value for name, value in without_dashes(settings).items() if value is not None}, file


def without_dashes(settings: Mapping[Any, Any]) -> dict[str, Any]:
    """Settings with dashes in their names as underscores. A name that then comes twice is a `ValueError`."""
    named: dict[str, Any] = {}
    for name, value in settings.items():
        key = str(name).replace("-", "_")
        if key in named:
            raise ValueError(f"{key!r} is given twice: give each name once.")
        named[key] = value
    return named


def _check_names(settings: Mapping[str, Any], known: list[str]) -> None:
    for name in settings:
        if name not in known:
            raise ValueError(f"there is no option {name!r}.{did_you_mean(name, known)}")


def _check_values(given: Mapping[str, Any], options: Mapping[str, Option], prefix: str = "") -> None:
    """Check values that are text. What YAML has parsed is of a type already."""
    for name in (name for name in options if name in given):
        check = _TYPES.get(name, options[name].check)
        for value in given[name] if isinstance(given[name], list) else [given[name]]:
            try:
                if isinstance(value, str):
                    check(value)
            except Mistake as mistake:
                raise Mistake(f"{prefix}{name}: {mistake}") from None


def _check_needed(given: Mapping[str, Any]) -> None:
    if "model_name_or_path" not in given:
        raise ValueError("--model_name_or_path is needed: the student.")
    if not {"dataset_name", "datasets", "task"} & given.keys():
        raise ValueError("--dataset_name or --task (or datasets in the YAML file) is needed: the problems.")
    check_has_teacher(given)


def check_has_teacher(given: Mapping[str, Any]) -> None:
    """Without a teacher a trainer is GRPO, which nobody means who runs one of these commands."""
    if not any(given.get(name) for name in ("teacher_model", "teacher_model_server_url", "teacher_adapter_name")):
        raise ValueError(
            "A teacher is needed: --teacher_model with a folder or a Hub id, --teacher_model_server_url of a vLLM server "
            "that runs it, or --teacher_adapter_name base, for a student that trains an adapter (--use_peft), whose base "
            "is then its teacher. trl grpo trains without one."
        )


def _check_together(command: str, given: Mapping[str, Any], options: Mapping[str, Option]) -> None:
    """The limit, and what needs more than one setting to be seen."""
    rewards, weights = given.get("reward_funcs"), given.get("reward_weights")
    if isinstance(rewards, list) and isinstance(weights, list):
        count = len(rewards) + ("reward_model_name_or_path" in given)
        if len(weights) != count:
            raise ValueError(f"--reward_weights needs one number for each of the {count} rewards, got {len(weights)}.")
    limit = given.get("cost_limit", options["cost_limit"].default)
    if command in ("gkd", "minillm"):  # only measured against
        if not float(limit) > 0:
            raise ValueError(f"`cost_limit` must be positive, got {limit}.")
    elif parse_cost_limit(limit) == AUTO:
        steps = (given.get(name, options[name].default) for name in ("max_steps", "auto_limit_steps"))
        check_auto_limit(*map(int, steps))
