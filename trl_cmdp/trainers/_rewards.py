"""Reward functions: the one of a trainer that has none, and the columns that the others need."""

import inspect
from typing import Any

import torch
from datasets import Dataset


# What TRL itself passes to a reward function, beside the columns of the dataset.
_REWARD_ARGUMENTS = {
    "prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"
}  # fmt: skip


def no_reward(completions: list, **kwargs: Any) -> list[float]:
    """Reward of a trainer that has a teacher and no reward function: 0 for every completion."""
    return [0.0] * len(completions)


def check_reward_columns(reward_funcs: list, names: list[str], train_dataset: Any, eval_dataset: Any) -> None:
    """
    A column that a reward function needs and a dataset lacks is an error now, not at the first step.

    Args:
        reward_funcs (`list`):
            Reward functions and models.
        names (`list[str]`):
            Their names.
        train_dataset ([`~datasets.Dataset`] or other):
            Training data. Only a [`~datasets.Dataset`] is checked: a stream may not know its columns.
        eval_dataset ([`~datasets.Dataset`], `dict` of them, or other):
            Evaluation data.

    Raises:
        ValueError: If an argument without default is neither a column nor something that TRL passes.
    """
    evaluation = eval_dataset if isinstance(eval_dataset, dict) else {"evaluation": eval_dataset}
    for dataset_name, dataset in {"training": train_dataset, **evaluation}.items():
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


def check_violation_penalty(rewards: torch.Tensor, penalty: float, step: int) -> None:
    """
    A reward that reaches the penalty is an error: a violation could then be worth its reward.

    Args:
        rewards (`torch.Tensor`):
            Task rewards of shape `(B,)`, NaN where there are none.
        penalty (`float`):
            Penalty n of a violation.
        step (`int`):
            Optimizer step, for the message.

    Raises:
        ValueError: If an absolute reward is not below the penalty.
    """
    largest = rewards.nan_to_num(nan=0.0).abs().max().item()
    if largest >= penalty:
        raise ValueError(
            f"A task reward of size {largest:g} at step {step} reaches the violation penalty {penalty:g}: a violation "
            "could then be worth its reward. Set `violation_penalty` above the largest absolute reward, or scale the "
            "rewards down."
        )
