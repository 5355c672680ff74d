"""Runs made by hand for the tests of the report: records of evaluations, and states of trainers."""

import json
from pathlib import Path

from trl_cmdp.evaluation import EvaluationSettings, RolloutRecord


LIMIT = 0.3
HOSTILE = "</script><script>window.ran = 1; alert(1)</script><img src=x onerror='window.ran = 1; alert(2)'><!--"


def settings(name: str = "constrained", **changed) -> EvaluationSettings:
    """Settings of 6 problems, 2 samples each."""
    values = {
        "name": name,
        "student": f"outputs/{name}",
        "teacher": "teacher",
        "task": "sums",
        "num_problems": 6,
        "num_samples": 2,
        "max_new_tokens": 8,
        "batch_size": 4,
        "cost_limit": LIMIT,
        "versions": {"python": "3.11"},
        "git_commit": None,
    }
    return EvaluationSettings(**{**values, **changed})


def rollout(problem: int, sample: int, costs: list[float] | None, right: bool = True, **changed) -> RolloutRecord:
    """A rollout with a token for each cost."""
    count = 3 if costs is None else len(costs)
    tokens = changed.pop("tokens", [f"t{place} " for place in range(count)])
    values = {
        "problem": problem,
        "greedy": False,
        "sample": sample,
        "prompt": f"{problem} + 1 =",
        "answer": str(problem + 1),
        "difficulty": f"{1 + problem % 2} steps",
        "completion": "".join(tokens),
        "completion_ids": list(range(len(tokens))),
        "tokens": tokens,
        "truncated": False,
        "right": right,
        "costs": costs,
    }
    return RolloutRecord(**{**values, **changed})


def rollouts(scale: float) -> list[RolloutRecord]:
    """Two rollouts of each of 6 problems; those of later problems cost more."""
    return [
        rollout(problem, sample, [0.05 * scale, scale * problem / 4, 0.02], right=(problem + sample) % 3 > 0)
        for problem in range(6)
        for sample in range(2)
    ]


def write_evaluation(folder: Path, records: list[RolloutRecord], name: str = "constrained", **changed) -> Path:
    """A folder as `trl-cmdp evaluate` leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [settings(name, **changed).to_json(), *(record.to_json() for record in records)]
    (folder / "records.jsonl").write_text("".join(f"{line}\n" for line in lines))
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
