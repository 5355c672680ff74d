"""Runs made by hand for the tests of the report: records of evaluations, and states of trainers."""

import json
from pathlib import Path

from helpers import make_rollout, make_settings, write_records

from trl_cmdp.evaluation import EvaluationSettings, RolloutRecord


LIMIT = 0.3
HOSTILE = "</script><script>window.ran = 1; alert(1)</script><img src=x onerror='window.ran = 1; alert(2)'><!--"


def settings(name: str = "constrained", **changed) -> EvaluationSettings:
    """Settings of 6 problems, 2 samples each."""
    values = {"name": name, "student": f"outputs/{name}", "num_problems": 6, "greedy": False, "cost_limit": LIMIT}
    return make_settings(**{**values, "versions": {"python": "3.11"}, **changed})


def rollout(problem: int, sample: int, costs: list[float] | None, **changed) -> RolloutRecord:
    """A rollout of one of two difficulties, with a token for each cost."""
    return make_rollout(problem, sample, costs, **{"difficulty": f"{1 + problem % 2} steps", **changed})


def rollouts(scale: float) -> list[RolloutRecord]:
    """Two rollouts of each of 6 problems; those of later problems cost more."""
    return [
        rollout(problem, sample, [0.05 * scale, scale * problem / 4, 0.02], right=(problem + sample) % 3 > 0)
        for problem in range(6)
        for sample in range(2)
    ]


def teacher_rollouts() -> list[RolloutRecord]:
    """The teacher's on the same problems, which cost nothing."""
    return [rollout(problem, sample, [0.0] * 3) for problem in range(6) for sample in range(2)]


def write_evaluation(folder: Path, records: list[RolloutRecord], name: str = "constrained", **changed) -> Path:
    """A folder as `trl-cmdp evaluate` leaves it."""
    write_records(folder / "records.jsonl", settings(name, **changed), records)
    return folder


def write_state(folder: Path, steps: int = 12, **changed) -> Path:
    """A checkpoint folder with a trainer's state."""
    folder.mkdir(parents=True, exist_ok=True)
    history = [
        {
            "step": step,
            "reward": 0.5 + step / 100,
            "constraint/cost": 1 / step,
            "constraint/cost_max": 2 / step,
            "constraint/limit": LIMIT,
            "constraint/satisfaction_rate": min(1.0, step / 10),
            "lagrange_multiplier": 0.1,
        }
        for step in range(1, steps + 1)
    ]
    state = {"log_history": history, "train_batch_size": 8, "global_step": steps, **changed}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder
