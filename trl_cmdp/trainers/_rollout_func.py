"""What is checked of a `rollout_func` before its tokens are costed."""

import functools
from collections.abc import Callable
from typing import Any


def checked_rollout_func(rollout_func: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """
    A `rollout_func` whose masks are as long as what they mask: TRL pads a shorter one with 1, and the environment's
    tokens would count as the student's.

    Args:
        rollout_func (`Callable`):
            TRL's `rollout_func`.

    Returns:
        `Callable`: The same. It raises a `ValueError` where `env_mask` or `logprobs` do not fit `completion_ids`.
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
