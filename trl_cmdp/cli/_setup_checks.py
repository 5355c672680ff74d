"""What an experiment names, looked at before the first cell: models, data and functions, and their fingerprints."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._run import call_as_trl, load_tokenizer
from ._setup import SOURCES, Problems, Setup, load_setup


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from ..evaluation import Rollout

_MODEL_FILES = ("config.json", "generation_config.json")
_NUM_TRIED = 2  # problems that reward functions are tried on


def check_sources(settings: dict[str, Any], folder: Path, *, held_out: int, prompts_per_step: int) -> dict[str, Any]:
    """
    Look at the models, data and functions that an experiment's settings name. What an embedded task brings is known.
    Returned is a fingerprint of each, so that a record is known to be of the same. A mistake is a `ValueError` that
    begins with the key.
    """
    setup = load_setup(settings, folder)
    weights = setup.config_fields.get("reward_weights")
    if weights is not None and len(weights) != len(setup.reward_funcs):
        raise ValueError(
            f"`reward_weights` holds {len(weights)} numbers for {len(setup.reward_funcs)} functions in `reward_funcs`: "
            "give one for each."
        )
    if not any(key in settings for key in SOURCES):
        return {}
    tokenizer, of_models = _check_models(setup)
    train, test = _check_problems(setup, tokenizer, held_out)
    if setup.prompts_per_step is None and prompts_per_step > len(train):  # no step would be made
        raise ValueError(
            f"`train_dataset` has {len(train)} problems, and a step takes {prompts_per_step} "
            "(`per_device_train_batch_size` × `gradient_accumulation_steps` / `num_generations`): add problems, or take "
            "smaller steps."
        )
    _check_functions(setup, tokenizer, train, test)
    found = {**of_models, **_fingerprints(setup, train, test)}
    return {f"{key}_fingerprint": value for key, value in found.items() if key in settings}


@contextmanager
def _of_key(key: str) -> Iterator[None]:
    """Errors of the libraries that say what is wrong with an input, as `ValueError`s that begin with the key."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (ValueError, OSError, ImportError, DatasetsError) as error:
        raise ValueError(f"`{key}`: {error}") from error


def _check_models(setup: Setup) -> "tuple[PreTrainedTokenizerBase, dict[str, str]]":
    """Tokenizer of the student, and the fingerprints of both models."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from ..core.fingerprint import fingerprint
    from ..evaluation.provenance import tokenizer_fingerprint
    from ..teachers import check_vocabulary, end_ids, stop_ids, teacher_generation_config, warn_of_another_end

    fields = setup.config_fields
    teacher_options = fields.get("teacher_model_init_kwargs") or {}
    revisions = {
        "student": (fields.get("model_init_kwargs") or {}).get("revision"),
        "teacher": fields.get("teacher_model_revision") or teacher_options.get("revision"),
    }
    configs, found = {}, {}
    for key, model in (("student", setup.student), ("teacher", setup.teacher)):
        with _of_key(key):
            configs[key] = _config(model, revisions[key])
            found[key] = _model_fingerprint(model, configs[key])
    with _of_key("student"):
        tokenizer = load_tokenizer(setup)
        stops = stop_ids(tokenizer, teacher_generation_config(setup.student))
        with torch.device("meta"):  # without weights
            student = AutoModelForCausalLM.from_config(configs["student"], trust_remote_code=False)
    with _of_key("teacher"):
        teacher_tokenizer = check_vocabulary(student, tokenizer, configs["teacher"])
        if end_ids(tokenizer, stops, fields.get("teacher_eos_token")) is None:
            logging.set_verbosity_warning()
            warn_of_another_end(tokenizer, stops, teacher_tokenizer, teacher_generation_config(setup.teacher))
            logging.set_verbosity_error()
    return tokenizer, {**found, "student": fingerprint([found["student"], tokenizer_fingerprint(tokenizer)])}


def _config(model: str, revision: str | None) -> "PretrainedConfig":
    from transformers import AutoConfig

    from ._evaluation import ADAPTER_FILE

    folder = Path(model)
    if folder.is_dir():
        if (folder / ADAPTER_FILE).exists():
            raise ValueError(
                f"{model} holds an adapter: merge it (`merge_and_unload`), save it, and name that folder."
            )
        for pattern in ("config.json", "*.safetensors"):
            if not any(folder.glob(pattern)):
                raise ValueError(
                    f"{model} holds no {pattern}, so it is no model's: save one there (`save_pretrained`)."
                )
    elif folder.exists():
        raise ValueError(f"{model} is a file: name the folder of the model.")
    try:
        return AutoConfig.from_pretrained(model, revision=revision or "main", trust_remote_code=False)
    except OSError as error:
        raise ValueError(
            f"there is no folder {model!r} beside the experiment's file, and as an id on the Hub: {error}"
        ) from error


def _model_fingerprint(model: str, config: "PretrainedConfig") -> str:
    """Of the files of a folder, and of what is on the Hub its commit."""
    from ..core.fingerprint import fingerprint
    from ..evaluation.provenance import weights_fingerprint

    folder = Path(model)
    if not folder.is_dir():
        return fingerprint([model, config._commit_hash])
    settings = [json.loads(path.read_bytes()) for path in map(folder.joinpath, _MODEL_FILES) if path.exists()]
    return fingerprint([weights_fingerprint(folder), settings])


def _check_problems(setup: Setup, tokenizer: "PreTrainedTokenizerBase", held_out: int) -> "tuple[Dataset, Dataset]":
    """Problems to train on and held-out ones: of data every one, of a task those of seed 0."""
    from .._prompts import check_chat_template, check_prompts, check_prompts_of_teacher, where_images
    from ..trainers.engine.checks import check_teacher_prompts

    found = []
    for key, problems, n in (
        ("train_dataset", setup.train_dataset, None),
        ("test_dataset", setup.test_dataset, held_out),
    ):
        with _of_key(key):
            rows = _draw(setup, problems, n)
            prompt = check_prompts(rows, "the dataset")
            if "teacher_prompt" in rows.column_names:
                check_prompts_of_teacher(rows, "the dataset")
            if not isinstance(prompt, str):
                kwargs = setup.config_fields.get("chat_template_kwargs")
                check_chat_template(tokenizer, prompt, "the dataset", chat_template_kwargs=kwargs)
            if (where := where_images(rows, "the dataset")) is not None:
                raise ValueError(f"{where} An experiment is on text alone: train with the commands of the methods.")
        found.append(rows)
    train, test = found
    check_teacher_prompts(train, {"test": test}, None)
    if held_out > len(test):
        raise ValueError(
            f"`held_out` is {held_out}, and `test_dataset` has {len(test)} problems: ask for fewer, or add problems."
        )
    trained_on = set(map(str, train["prompt"]))
    shared = [prompt for prompt in test["prompt"] if str(prompt) in trained_on]
    if shared:
        raise ValueError(
            f"{len(shared)} of the {len(test)} problems of `test_dataset` are problems of `train_dataset` too, such as "
            f"{str(shared[0])[:80]!r}: what is trained on says nothing about new problems. Leave them out of one of the two."
        )
    return train, test


def _draw(setup: Setup, problems: Problems, n: int | None) -> "Dataset":
    if problems.task is None:
        return problems.draw(None, seed=0)
    if n is None and problems.num_problems is None and setup.prompts_per_step is not None:
        n = setup.prompts_per_step  # drawn for each step, as many as are asked for
    try:
        return problems.draw(n, seed=0)
    except (TypeError, ValueError) as error:  # of an option's value
        made = n is None and problems.num_problems is None
        hint = " Of a task that makes its problems give `num_problems`, how many to make." * made
        raise ValueError(f"the task {problems.task}: {error}{hint}") from error


def _check_functions(setup: Setup, tokenizer: "PreTrainedTokenizerBase", train: "Dataset", test: "Dataset") -> None:
    """Check the columns that the functions ask for, and try them on empty answers, which a student may give."""
    from ..evaluation import Rollout
    from ..trainers.engine.checks import check_reward_columns

    rewards = [("reward_funcs", reward) for reward in setup.reward_funcs]
    if setup.correct_func is not None:
        rewards.append(("correct_func", setup.correct_func))
    rows = test.select(range(min(_NUM_TRIED, len(test))))
    rollouts = [Rollout(row["prompt"], "", [], [tokenizer.eos_token_id]) for row in rows]
    for key, reward in rewards:
        with _of_key(key):
            trained = train if key == "reward_funcs" else None
            check_reward_columns([reward], [_named(reward)], trained, {"test": test})
            _check_rewards(reward, rows, rollouts)
    if setup.valid_steps is not None:
        with _of_key("valid_steps"):
            _check_valid_steps(setup.valid_steps, rollouts)


def _check_rewards(reward: Callable[..., Any], rows: "Dataset", rollouts: "Sequence[Rollout]") -> None:
    for value in _tried(reward, call_as_trl, reward, [dict(row) for row in rows], rollouts):
        try:
            is_reward = value is None or not math.isinf(value)
        except (OverflowError, TypeError):
            is_reward = False
        if not is_reward:
            raise ValueError(
                f"{_named(reward)} gave {value!r} for an empty answer: a reward is a finite number, or None where there is "
                "none."
            )


def _check_valid_steps(valid_steps: Callable[[str, str], Any], rollouts: "Sequence[Rollout]") -> None:
    from ..evaluation.win_rates import problem_text

    value = _tried(valid_steps, valid_steps, problem_text(rollouts[0].prompt), "")
    if value not in (0, 1):
        raise ValueError(
            f"{_named(valid_steps)} gave {value!r} for an empty answer: called with one problem and one answer, it says True "
            "or False."
        )


def _tried(function: Callable[..., Any], call: Callable[..., Any], *arguments: Any) -> Any:
    """What a user's function gives. Its own error is one of the experiment's, before any time is spent."""
    try:
        return call(*arguments)
    except Exception as error:
        raise ValueError(f"{_named(function)}, tried on an empty answer, raised {error!r}.") from error


def _named(function: Callable[..., Any]) -> str:
    from ..evaluation.provenance import dotted_name

    return dotted_name(function)


def _fingerprints(setup: Setup, train: "Dataset", test: "Dataset") -> dict[str, Any]:
    from ..core.fingerprint import fingerprint_of_rows
    from ..evaluation.provenance import source_fingerprint

    functions = {"correct_func": setup.correct_func, "valid_steps": setup.valid_steps}
    return {
        "train_dataset": fingerprint_of_rows(train),
        "test_dataset": fingerprint_of_rows(test),
        "reward_funcs": [source_fingerprint(reward) for reward in setup.reward_funcs],
        **{key: source_fingerprint(function) for key, function in functions.items() if function is not None},
    }
