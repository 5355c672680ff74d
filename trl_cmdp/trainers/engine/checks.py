"""What is refused before training: arguments that contradict each other, and data that lacks or holds the wrong."""

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import AutoProcessor, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from trl import GRPOConfig
from trl.data_utils import is_conversational
from trl.trainer.utils import get_config_model_id

from ..._prompts import check_chat_template, check_column, check_prompts, check_prompts_of_teacher, where_images
from ...teachers import SERVERS_READ_TEXT, AdapterTeacher, RemoteTeacher
from .config import DistillConfig


# Extras that bring a tracker. Those that transformers finds in other ways than by a package are left to it.
_TRACKER_EXTRAS = {"wandb": "wandb", "tensorboard": "tracking", "trackio": "tracking"}
_FOUND_OTHERWISE = {"azure_ml", "flyte"}
# What TRL itself passes to a reward function, beside the columns of the dataset.
_REWARD_ARGUMENTS = {
    "prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"
}  # fmt: skip

_logger = logging.getLogger(__name__)


def has_teacher(teacher_model: Any, args: GRPOConfig) -> bool:
    """Whether the arguments of a trainer name a teacher."""
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
    elsewhere = all(isinstance(one, RemoteTeacher | AdapterTeacher) for one in _given_teachers(teacher_model))
    elsewhere = elsewhere or by_server or by_adapter
    if args.teacher_offload and elsewhere:
        raise ValueError(
            "`teacher_offload` moves the weights of a teacher that is loaded beside the student, and here none is: a server "
            "has its own memory, and the student's own base stays where the student is. Leave it out."
        )
    return by_server or by_adapter or teacher_model is not None


def check_arguments(
    config_class: type[DistillConfig], args: GRPOConfig, with_teacher: bool, has_reward: bool, imitates: bool
) -> None:
    """Check what a trainer is given, as far as the arguments alone decide. A method that `imitates` needs a teacher."""
    trainer = f"{config_class.__name__.removesuffix('Config')}Trainer"
    if not with_teacher:
        if imitates:
            raise ValueError(
                f"{trainer} learns from a teacher alone: pass `teacher_model`, or set `teacher_model_server_url` or "
                "`teacher_adapter_name` of its config."
            )
        if not has_reward:
            raise ValueError(
                "There is neither a reward nor a teacher to learn from. Pass `reward_funcs`, `teacher_model`, or both."
            )
        if args.process_index == 0:
            _logger.warning(
                f"{trainer} has no teacher, so it trains as `GRPOTrainer` does. Pass `teacher_model` for distillation."
            )
        return
    if not isinstance(args, config_class):
        raise TypeError(
            f"{trainer} with a teacher needs a `{config_class.__name__}` as `args`, got `{type(args).__name__}`. It takes "
            "every argument of `GRPOConfig`: change the class name alone."
        )


def check_trackers(names: Sequence[str]) -> None:
    """Check that what `report_to` names is installed."""
    if not names:
        return
    for name in set(names) - {*get_available_reporting_integrations(), *_FOUND_OTHERWISE}:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"`report_to` names {name!r}, which is no tracker: take of {', '.join(INTEGRATION_TO_CALLBACK)}."
            )
        extra = _TRACKER_EXTRAS.get(name)
        install = name if extra is None else f'"trl-cmdp[{extra}]"'
        raise ImportError(f"`report_to` names {name!r}, which is not installed: pip install {install}.")


def check_data(
    model: str | PreTrainedModel,
    args: GRPOConfig,
    train_dataset: Any,
    eval_dataset: Any,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
    rollout_func: Any,
    environment_factory: Any,
) -> None:
    """
    Check the prompts of the datasets, and that the student's chat template renders messages. A `rollout_func` may take
    prompts of any kind, and an environment may bring them in place of the column.
    """
    for name, dataset in named_datasets(train_dataset, eval_dataset).items():
        if not isinstance(dataset, Dataset | IterableDataset):
            continue
        columns = dataset.column_names or next(iter(dataset), {})
        if environment_factory is not None and "prompt" not in columns:
            continue
        if rollout_func is not None:
            check_column(columns, f"the {name} dataset")
            continue
        prompt = check_prompts(dataset, f"the {name} dataset")
        if isinstance(prompt, str):
            continue
        if processing_class is None:  # where TRL takes it from, after it has loaded the model
            processing_class = AutoProcessor.from_pretrained(
                model if isinstance(model, str) else get_config_model_id(model.config),
                revision=(args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None,
                trust_remote_code=args.trust_remote_code,
            )
        kwargs = args.chat_template_kwargs
        check_chat_template(processing_class, prompt, f"the {name} dataset", chat_template_kwargs=kwargs)


def no_reward(completions: list, **kwargs: Any) -> list[float]:
    """Reward of a trainer that has a teacher and no reward function: 0 for every completion."""
    return [0.0] * len(completions)


def check_reward_columns(reward_funcs: list, names: list[str], train_dataset: Any, eval_dataset: Any) -> None:
    """A column that a reward function needs and a dataset lacks is an error now, not at the first step."""
    for dataset_name, dataset in named_datasets(train_dataset, eval_dataset).items():
        if not isinstance(dataset, Dataset):
            continue
        for reward_func, name in zip(reward_funcs, names, strict=True):
            if isinstance(reward_func, torch.nn.Module):
                continue
            needed = {
                parameter.name
                for parameter in inspect.signature(reward_func).parameters.values()
                if parameter.default is parameter.empty
                and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            }
            missing = sorted(needed - set(dataset.column_names) - _REWARD_ARGUMENTS)
            if missing:
                raise ValueError(
                    f"The reward function '{name}' needs the column{'s' if len(missing) > 1 else ''} "
                    f"{', '.join(map(repr, missing))}, and the {dataset_name} dataset has "
                    f"{sorted(dataset.column_names)}. Add or rename the column (`dataset.rename_column`), or give "
                    "the argument a default."
                )


def check_reward_templates(reward_funcs: list, processing_classes: list, train_dataset: Any) -> None:
    """A reward model reads messages through the chat template of its own tokenizer."""
    models = [
        (model, processing_class)
        for model, processing_class in zip(reward_funcs, processing_classes, strict=True)
        if isinstance(model, torch.nn.Module)
    ]
    if not models or not is_conversational(next(iter(train_dataset))):
        return
    for model, processing_class in models:
        if processing_class.chat_template is None:
            raise ValueError(
                f"The prompts are messages, and the tokenizer of the reward model {get_config_model_id(model.config)!r} "
                "has no chat template. Give one with a template as `reward_processing_classes`, or make text of the prompts."
            )


def check_rewards_finite(rewards_per_func: torch.Tensor, names: list[str], step: int) -> None:
    """An infinite reward is an error: what is standardised with it is NaN. NaN, TRL's "not scored", is none."""
    infinite = rewards_per_func.isinf()  # (B, num_funcs)
    for name, rewards, bad in zip(names, rewards_per_func.unbind(1), infinite.unbind(1), strict=True):
        if bad.any():
            raise ValueError(
                f"The reward function '{name}' returned {rewards[bad][0].item()} at step {step}. A reward must be finite "
                "in float32 (below 3.4e38), or `None` where a completion cannot be scored. Correct the function, or "
                "clip what it returns."
            )


def check_violation_penalty(rewards: torch.Tensor, penalty: float, step: int) -> None:
    """A reward that reaches the penalty is an error: a violation could then be worth its reward."""
    largest = rewards.nan_to_num(nan=0.0).abs().max().item()
    if largest >= penalty:
        raise ValueError(
            f"A task reward of size {largest:g} at step {step} reaches the violation penalty {penalty:g}: a violation "
            "could then be worth its reward. Set `violation_penalty` above the largest absolute reward, scale the "
            "rewards down, or use `constraint_aggregation='lexicographic'`, where rewards may have any size."
        )


def check_images_can_be_read(train_dataset: Any, eval_dataset: Any, teacher_model: Any, args: DistillConfig) -> None:
    """Refuse datasets with images, by their first rows, where a teacher is a server."""
    remote = any(isinstance(one, RemoteTeacher) for one in _given_teachers(teacher_model))
    if args.teacher_model_server_url is None and not remote:
        return
    if (where := find_images(train_dataset, eval_dataset)) is not None:
        raise ValueError(f"{where} {SERVERS_READ_TEXT}")


def _given_teachers(teacher_model: Any) -> list[Any]:
    return list(teacher_model.values()) if isinstance(teacher_model, dict) else [teacher_model]


def find_images(train_dataset: Any, eval_dataset: Any) -> str | None:
    """Where the datasets of a trainer have images by their first rows, in words; `None` if they have none there."""
    found = (
        where_images(dataset, f"the {name} dataset")
        for name, dataset in named_datasets(train_dataset, eval_dataset).items()
    )
    return next((where for where in found if where is not None), None)


def check_teacher_column(teachers: Sequence[str], train_dataset: Any, eval_dataset: Any) -> None:
    """With several teachers, check that each row of the data names one of them. A stream is checked as it comes."""
    for dataset in named_datasets(train_dataset, eval_dataset).values():
        if isinstance(dataset, Dataset):
            names = dataset.unique("teacher") if "teacher" in dataset.column_names else [None]
            for name in names:
                check_teacher_name(name, teachers)


def check_teacher_name(name: str | None, teachers: Sequence[str]) -> None:
    """Check what a row of the dataset says in its column `teacher`, `None` where it has none."""
    if name not in teachers:
        found = "no such column" if name is None else repr(name)
        raise ValueError(
            "With several teachers the dataset's column `teacher` chooses one for each prompt, of "
            f"{', '.join(map(repr, teachers))}; found {found}. Add or correct the column."
        )


def check_teacher_prompts(train_dataset: Any, eval_dataset: Any, environment_factory: Any) -> None:
    """Check the datasets' column `teacher_prompt`, the teacher's own prompts, if they have one."""
    named = named_datasets(train_dataset, eval_dataset).items()
    rows = {name: next(iter(one), {}) for name, one in named if isinstance(one, Dataset | IterableDataset)}
    having = [name for name, row in rows.items() if "teacher_prompt" in row]
    if not having:
        return
    if lacking := [name for name in rows if name not in having]:
        raise ValueError(
            f"The {having[0]} dataset has the column 'teacher_prompt', and the {lacking[0]} dataset has not: its costs would "
            "be of a teacher that sees less. Add the column there (where the teacher sees no more than the student, a copy "
            "of 'prompt'), or remove it everywhere."
        )
    if environment_factory is not None:
        raise ValueError(
            "`environment_factory` cannot be used together with the column 'teacher_prompt': what an environment's `reset` "
            "adds to the prompt would be missing from the teacher's. Remove the column, or use `tools` or a `rollout_func`."
        )
    for name, dataset in named:
        if name in rows:
            check_prompts_of_teacher(dataset, f"the {name} dataset")


def checked_rollout_func(rollout_func: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """
    A `rollout_func` whose masks are as long as what they mask: TRL pads a shorter one with 1, and the environment's
    tokens would count as the student's.
    """

    @functools.wraps(rollout_func)
    def checked(prompts: list, trainer: Any) -> dict[str, Any]:
        output = rollout_func(prompts, trainer)
        lengths = [len(ids) for ids in output.get("completion_ids", [])]
        for name in ("env_mask", "logprobs"):
            rows = output.get(name)
            if rows is None:
                continue
            found = [len(row) for row in rows]
            if found != lengths:
                raise ValueError(
                    f"`rollout_func` returned `{name}` of lengths {found} for `completion_ids` of lengths {lengths}. "
                    "Each needs one value for every completion token (`env_mask`: 1 for the student's own, 0 for the "
                    "environment's)."
                )
        return output

    return checked


def named_datasets(train_dataset: Any, eval_dataset: Any) -> dict[str, Any]:
    """The datasets of a trainer by what messages call them."""
    evaluation = eval_dataset if isinstance(eval_dataset, dict) else {"evaluation": eval_dataset}
    return {"training": train_dataset, **evaluation}
