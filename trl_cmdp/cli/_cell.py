"""One cell of a comparison, in a process of its own: `python -m trl_cmdp.cli._cell FOLDER`, the cell on its stdin."""

import json
import math
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._defaults import CostScope
from .._files import write_whole
from .._messages import without_secrets
from ._experiment import Cell
from ._run import as_evaluated, evaluate_student, load_models, set_up_process, train_student, training_args
from ._setup import load_setup, name_of


if TYPE_CHECKING:
    from ..evaluation import CellRecord, Outcome
    from ._run import Answer

RECORD_FILE = "record.json"
# What a trainer logs, and its key in a record's history.
_LOGGED = {
    "reward": "reward",
    "constraint/cost": "cost",
    "constraint/satisfaction_rate": "satisfaction",
    "distill_loss": "distill_loss",
    "lagrange_multiplier": "lagrange_multiplier",
}


def run_cell(cell: Cell, folder: Path, start: float) -> "CellRecord":
    """Train and evaluate one student, or evaluate a reference. The cell began at `start`, by `time.monotonic()`."""
    # Imported here, so that the time it takes is part of the cell's.
    from ..evaluation import CellRecord
    from ..evaluation.provenance import git_state, library_versions

    set_up_process(int(os.environ["OMP_NUM_THREADS"]))
    settings = cell.settings
    commit, dirty = git_state()
    setup = load_setup(settings, Path(cell.folder))
    tokenizer, student, teacher = load_models(setup)
    config: dict[str, Any] = {}
    history: list[dict[str, float]] = []
    if cell.trainer != "none":
        given = {"steps": settings["steps"], "seed": cell.seed, "cost_limit": settings["cost_limit"]}
        fields = (setup.config_fields, settings["fields"])
        args = training_args(cell.trainer, *fields, output_dir=folder / "trainer", **given)
        config = without_secrets(args.to_dict())
        del config["output_dir"]
        history = _history(train_student(student, tokenizer, teacher, args, cell.trainer, setup).state.log_history)
        student, teacher = as_evaluated(student, teacher, setup, args)
    problems = setup.test_dataset.draw(settings["held_out"], cell.seed)
    model = teacher if cell.method == "teacher" else student
    answers = evaluate_student(model, tokenizer, teacher, problems, setup, cell.seed)
    scope = setup.config_fields["cost_scope"]
    usage = os.times()
    return CellRecord(
        method=cell.method,
        trainer=cell.trainer,
        seed=cell.seed,
        task=name_of(settings),
        settings=without_secrets(settings),
        config=config,
        versions=library_versions(),
        git_commit=commit,
        git_dirty=dirty,
        wall_s=round(time.monotonic() - start, 2),
        cpu_s=round(usage.user + usage.system, 2),
        peak_memory_mb=round(_peak_memory_mb(), 1),
        outcomes=_outcomes(answers, scope),
        history=history,
    )


def _outcomes(answers: "list[Answer]", scope: CostScope) -> "list[Outcome]":
    from ..evaluation import Outcome

    # A reward that only says which answers are correct is not recorded twice.
    rewards = [round(answer.reward, 6) for answer in answers]
    repeats = all(reward == answer.correct for reward, answer in zip(rewards, answers, strict=True))
    return [
        Outcome(
            right=int(answer.correct),
            valid=None if answer.valid is None else int(answer.valid),
            cost=round(answer.cost_in(scope), 5),
            length=len(answer.costs),
            reward=None if repeats else reward,
        )
        for answer, reward in zip(answers, rewards, strict=True)
    ]


def _history(log_history: list[dict[str, Any]]) -> list[dict[str, float]]:
    history = []
    for entry in log_history:
        # A rate of no rollouts is NaN: there is nothing to record.
        logged = {key: entry[name] for name, key in _LOGGED.items() if name in entry and math.isfinite(entry[name])}
        if logged:
            history.append({"step": entry["step"], **logged})
    return history


def _peak_memory_mb() -> float:
    status = Path("/proc/self/status")
    if status.exists():  # Linux counts the parent's memory into `ru_maxrss`, which is inherited
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS, in bytes


def _end_with_the_parent() -> None:
    # The parent holds the other end of our stdin for as long as it lives, however it ends.
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def main() -> None:
    """Run the cell of one line of JSON on stdin, and write its record to the folder."""
    start = time.monotonic()
    folder = Path(sys.argv[1])
    cell = Cell(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    record = run_cell(cell, folder, start)
    write_whole(folder / RECORD_FILE, record.to_json() + "\n")


if __name__ == "__main__":
    main()
