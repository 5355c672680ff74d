"""Reading what a report is made from: records of evaluations, records of comparisons, and states of trainers."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .._files import LIVE_STATE
from ..evaluation import CellRecord, EvaluationSettings, RolloutRecord, read_records, read_rollout_records
from ..evaluation._lines import read_text
from ..evaluation.rollout_records import PROBLEM_SETTINGS, difference_of_settings


TRAINER_STATE = "trainer_state.json"
_PROGRESS = "trl_cmdp_progress.json"
_CHECKPOINT = re.compile(r"checkpoint-([0-9]+)")
_TOO_MANY = 2**53  # steps or rollouts, which a float counts no longer
# What has to be equal for two students to stand in one table.
_SHARED_SETTINGS = (
    *PROBLEM_SETTINGS,
    *("temperature", "max_new_tokens", "teacher", "teacher_beta", "teacher_eos_token", "cost_limit", "cost_scope"),
)


@dataclass(frozen=True)
class TrainingRun:
    """The log of one training run, with its name in plots and the file that it was read from."""

    name: str
    source: str
    history: list[dict[str, Any]]  # `log_history` of the trainer's state
    batch_size: int | None  # of a micro-batch on one device: each logged rate is of at least as many rollouts
    steps: int  # optimizer steps done


@dataclass(frozen=True)
class EvaluationRun:
    """The records of one evaluation, with its name in tables and plots and the file that they were read from."""

    name: str
    source: str
    settings: EvaluationSettings
    records: list[RolloutRecord]

    @property
    def is_teacher(self) -> bool:
        """Whether the rollouts are the teacher's own, which cost nothing."""
        return self.settings.student == self.settings.teacher


@dataclass(frozen=True)
class ComparisonRun:
    """The records of one `trl-cmdp compare`, with the name of its folder and the file that they were read from."""

    name: str
    source: str
    records: list[CellRecord]


Run = TrainingRun | EvaluationRun | ComparisonRun


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read runs."""
    runs: list[Run] = []
    for path in paths:
        if path.is_dir():
            found = _read_folder(path)
        elif path.is_file():
            found = [_read_file(path)]
        else:
            raise ValueError(f"{path} does not exist.")
        runs += found
    sources = [str(Path(run.source).resolve()) for run in runs]
    if twice := sorted({source for source in sources if sources.count(source) > 1}):
        raise ValueError(f"{twice[0]} is given twice.")
    _check_comparable([run for run in runs if isinstance(run, EvaluationRun)])
    return [run for kind in (TrainingRun, EvaluationRun, ComparisonRun) for run in _with_own_names(runs, kind)]


def _read_folder(folder: Path) -> list[Run]:
    runs: list[Run] = []
    state = _newest_state(folder)
    # Without one by its usual name, any.
    states = [state] if state is not None else [path for path in sorted(folder.glob("*.json")) if _is_state(path)]
    runs += map(_read_state, states)
    # Other files of lines, such as a dataset, may lie beside records: they are left alone.
    runs += [_read_records(path) for path in sorted(folder.glob("*.jsonl")) if _kind(path) is not None]
    if not runs:
        raise ValueError(
            f"{folder} holds no run: no {TRAINER_STATE} or other state of a trainer (nor a checkpoint-N with one), and "
            "no records (.jsonl) of `trl-cmdp evaluate` or `trl-cmdp compare`."
        )
    return runs


def _newest_state(folder: Path) -> Path | None:
    beside = [folder / name for name in (TRAINER_STATE, LIVE_STATE) if (folder / name).is_file()]
    if beside:
        return max(beside, key=lambda path: path.stat().st_mtime_ns)
    # A checkpoint that was cut off while it was written may lack its state.
    states = {
        (_session_of(path), int(match[1])): path / TRAINER_STATE
        for path in folder.iterdir()
        if (match := _CHECKPOINT.fullmatch(path.name)) and (path / TRAINER_STATE).is_file()
    }
    return states[max(states)] if states else None


def _session_of(checkpoint: Path) -> int:
    """Number of the training that wrote it: a later one may have begun at an earlier step."""
    try:
        return int(json.loads((checkpoint / _PROGRESS).read_text(encoding="utf-8"))["session"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return 0


def _read_file(path: Path) -> Run:
    if _kind(path) is not None:  # which reads a line alone
        return _read_records(path)
    if path.name == TRAINER_STATE or _is_state(path):
        return _read_state(path)
    raise ValueError(
        f"{path} is neither the state of a trainer ({TRAINER_STATE} or by another name) nor records of "
        "`trl-cmdp evaluate` or `trl-cmdp compare`."
    )


def _is_state(path: Path) -> bool:
    """Whether a file is a trainer's state, whatever its name."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if '"log_history"' not in text:  # which other JSON need not be parsed for
        return False
    try:
        state = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(state, dict) and isinstance(state.get("log_history"), list)


def _read_state(path: Path) -> TrainingRun:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        history, batch_size, steps = state["log_history"], state.get("train_batch_size"), state.get("global_step")
        if not (isinstance(history, list) and all(isinstance(entry, dict) for entry in history)):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a state that a trainer saved, or it is damaged.") from error
    folder = path.resolve().parent
    if path.name not in (TRAINER_STATE, LIVE_STATE):
        name = path.stem
    else:
        name = folder.parent.name if _CHECKPOINT.fullmatch(folder.name) else folder.name
    # A state of another version may lack either.
    steps = steps if _is_count(steps) else max((e["step"] for e in history if _is_count(e.get("step"))), default=0)
    batch_size = batch_size if _is_count(batch_size) and batch_size > 0 else None
    return TrainingRun(name, str(path), history, batch_size, steps)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _TOO_MANY


def _kind(path: Path) -> type[EvaluationRun] | type[ComparisonRun] | None:
    """What a file of lines holds, by its first line."""
    with path.open(encoding="utf-8", errors="replace") as file:
        try:
            first = json.loads(file.readline())
        except (ValueError, RecursionError):
            return None
    if not isinstance(first, dict):
        return None
    if first.keys() >= {"student", "num_samples", "cost_scope"}:
        return EvaluationRun
    return ComparisonRun if first.keys() >= {"method", "trainer", "outcomes"} else None


def _read_records(path: Path) -> Run:
    try:
        if _kind(path) is EvaluationRun:
            settings, rollouts = read_rollout_records(path)
            if not rollouts:
                raise ValueError("There are no rollouts yet.")
            return EvaluationRun(settings.name, str(path), settings, rollouts)
        cells = read_records(read_text(path))
        if not cells:
            raise ValueError("There is no complete record yet.")
        return ComparisonRun(path.resolve().parent.name, str(path), cells)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_comparable(runs: Sequence[EvaluationRun]) -> None:
    for run in runs[1:]:
        if found := difference_of_settings(runs[0].settings, run.settings, _SHARED_SETTINGS):
            raise ValueError(
                f"{runs[0].source} and {run.source} cannot stand in one table: their `{found[0]}` are {found[1]!r} and "
                f"{found[2]!r}. Make a report of each."
            )
    prompts: dict[int, Any] = {}
    for run in runs:
        for record in run.records:
            read = record.prompt, record.teacher_prompt
            if prompts.setdefault(record.problem, read) != read:
                raise ValueError(
                    f"{run.source}: problem {record.problem} has another prompt than in {runs[0].source}. Make a "
                    "report of each."
                )


def _with_own_names(runs: Sequence[Run], kind: type[Run]) -> list[Run]:
    """Runs of one kind. Those that would have the same name have their file's path beside it."""
    of_kind = [run for run in runs if isinstance(run, kind)]
    names = [run.name for run in of_kind]
    return [run if names.count(run.name) == 1 else replace(run, name=f"{run.name} ({run.source})") for run in of_kind]
