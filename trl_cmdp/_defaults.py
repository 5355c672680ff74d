"""
The words, units, defaults and checks of a limit, and where a key is looked for. No library is imported here, so that the
command line is fast to say what is wrong.
"""

import json
from typing import Any, Literal


CostScope = Literal["mean", "sum", "worst_prefix"]
# Unit of a rollout's cost, and so of a limit, in each scope.
COST_UNITS: dict[CostScope, str] = {
    "mean": "nats per token",
    "sum": "nats per rollout",
    "worst_prefix": "nats per token of the worst prefix",
}
COST_SCOPE: CostScope = "mean"
COST_LIMIT = 0.35
AUTO = "auto"  # in place of a limit: from the costs that imitation reaches
VIOLATION_PENALTY = 20.0
# Share of rollouts within the limit from which on a student counts as one that satisfies it.
FEASIBLE_SATISFACTION = 0.95
# Environment variable from which the commands take the key of a teacher's server: an argument would be in the shell's
# history, and every user of the machine could read it.
TEACHER_KEY_VARIABLE = "TRL_CMDP_TEACHER_API_KEY"


def check_not_zero(*limits: float) -> None:
    """Say what a limit of 0 asks for, and who gives it."""
    if 0 in limits:
        raise ValueError(
            "`cost_limit` must be positive, got 0: only the teacher itself costs nothing. To imitate it, whatever the "
            "reward, use `GKDDistillTrainer` (`trl-cmdp gkd`)."
        )


def parse_cost_limit(value: Any) -> float | str | dict[str, float]:
    """A positive number, `"auto"`, or a number for each teacher, from what Python, YAML or the command line gives."""
    if value == AUTO:
        return AUTO
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = json.loads(value)
    limits = value if isinstance(value, dict) else {"": value}
    try:
        numbers = {name: float(limit) for name, limit in limits.items()}
    except (TypeError, ValueError):
        raise ValueError(
            f"`cost_limit` must be a number, 'auto', or a number for each teacher, got {value!r}."
        ) from None
    check_not_zero(*numbers.values())
    if not numbers or not all(number > 0 for number in numbers.values()):
        raise ValueError(f"`cost_limit` must be positive, got {value!r}.")
    return numbers if isinstance(value, dict) else numbers[""]


def check_auto_limit(max_steps: int, imitation_steps: int) -> None:
    """Check that a run has steps left after the imitation phase of `cost_limit="auto"`."""
    if 0 < max_steps <= imitation_steps:
        raise ValueError(
            f"The imitation phase of `cost_limit='auto'` ({imitation_steps} steps) would be the whole run of {max_steps} "
            "steps. Train longer or lower `auto_limit_steps`."
        )
