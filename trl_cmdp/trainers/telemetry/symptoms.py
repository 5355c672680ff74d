"""What docs/troubleshooting.md knows by its metrics, said while the run goes on: once each, and when it is true."""

import logging
import math
from collections import deque
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


_PAGE = "docs/troubleshooting.md"
_FEWEST_STEPS = 10  # optimizer steps over which something holds before it is said
_SHARE, _MOST_STEPS = 0.2, 100  # of the run and in steps, where that is more: for what a run may take long to leave
_NEARLY_ALL = 0.95  # completions that are cut
_RARELY, _ALWAYS = 0.02, 0.999  # satisfaction rates
_STILL = 0.97  # a mean cost has stopped falling if that of the later half is above so much of the earlier half's

_logger = logging.getLogger(__name__)


class Symptoms(TrainerCallback):
    """
    Warns of a run that goes wrong.

    Args:
        learns_from_reward (`bool`):
            Whether the reward is more than logged.
        keeps_limit (`bool`):
            Whether the limit steers training.
    """

    def __init__(self, learns_from_reward: bool, keeps_limit: bool):
        self._learns_from_reward, self._keeps_limit = learns_from_reward, keeps_limit
        self._said: set[str] = set()
        self._start = 0  # step that training began at
        self._since: dict[str, int] = {}  # step since which a condition has held
        self._ever: set[str] = set()  # what has been seen in the run, an earlier part of a resumed one included
        self._costs: deque[tuple[int, float]] = deque()  # step and mean cost, while the limit is hardly ever kept

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        for entry in state.log_history:
            self._note(entry)
        self._start = state.global_step
        self._since.clear()
        self._costs.clear()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **kwargs: Any):
        if not state.is_world_process_zero or logs.get("reward") is None:  # an evaluation, or the end
            return
        self._note(logs)
        step, patience = state.global_step, max(_FEWEST_STEPS, min(_MOST_STEPS, math.ceil(_SHARE * state.max_steps)))
        cut = logs.get("completions/clipped_ratio") or 0
        if self._holds("cut", cut >= _NEARLY_ALL, step, _FEWEST_STEPS):
            self._say(
                "cut",
                f"Nearly every completion of the last {step - self._since['cut']} steps was cut at max_completion_length="
                f"{args.max_completion_length} ({cut:.0%} now). Raise it, or take a student that has learnt to stop",
                "completions-that-are-all-cut",
            )
        if self._learns_from_reward and self._holds("reward", "reward differs" not in self._ever, step, patience):
            self._say(
                "reward",
                f"Every completion has had the same reward in {step} steps, {logs['reward']:g}, so the run learns nothing "
                "from it",
                "groups-that-teach-nothing",
            )
        self._look_at_the_limit(logs, step, patience)

    def _note(self, logs: dict[str, Any]) -> None:
        spread = logs.get("reward_std")
        if logs.get("reward") is not None and (spread is None or spread > 1e-6):
            self._ever.add("reward differs")  # or there was a single one
        satisfied = logs.get("constraint/satisfaction_rate")
        if satisfied is not None and satisfied < _ALWAYS:
            self._ever.add("limit exceeded")

    def _look_at_the_limit(self, logs: dict[str, Any], step: int, patience: int) -> None:
        satisfied, cost, limit = (logs.get(f"constraint/{name}") for name in ("satisfaction_rate", "cost", "limit"))
        if not self._keeps_limit:
            return
        if satisfied is None or cost is None or limit is None:  # it is not known yet
            self._since |= {"never felt": step, "never reached": step}
            return
        if self._holds("never felt", "limit exceeded" not in self._ever, step, patience):
            self._say(
                "never felt",
                f"Of {step - self._since['never felt']} steps no rollout has exceeded the limit ({limit:.4g}; their mean "
                f"cost is {cost:.3g} now): so far it bounds nothing. Lower `cost_limit` if it is meant to",
                "the-limit-does-nothing",
            )
        rare = satisfied <= _RARELY
        if not rare:
            self._costs.clear()
        self._costs.append((step, cost))
        while self._costs[0][0] <= step - patience:
            self._costs.popleft()
        if self._holds("never reached", rare, step, patience) and self._has_stopped_falling():
            self._say(
                "never reached",
                f"Hardly a rollout of the last {patience} steps is within the limit ({satisfied:.1%} now), and their cost "
                f"has stopped falling, at {cost:.3g} with a limit of {limit:.4g}. Raise `cost_limit`",
                "satisfaction-stays-near-0",
            )

    def _has_stopped_falling(self) -> bool:
        costs = [cost for _, cost in self._costs]
        half = len(costs) // 2
        return half > 0 and sum(costs[-half:]) > _STILL * sum(costs[:half])

    def _holds(self, name: str, condition: bool, step: int, steps: int) -> bool:
        """Whether a condition has held for so many steps."""
        if not condition:
            self._since[name] = step
        return condition and step - self._since.setdefault(name, self._start) >= steps

    def _say(self, name: str, text: str, anchor: str) -> None:
        if name not in self._said:
            self._said.add(name)
            _logger.warning(f"{text} ({_PAGE}#{anchor}).")
