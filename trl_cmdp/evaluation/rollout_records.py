"""The records of one evaluation, from which every figure is computed again without a model."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .provenance import git_state, library_versions


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """
    What an evaluation was asked for: the first line of its records. An evaluation goes on only under equal settings.

    Args:
        name (`str`):
            Name of the student in tables and plots, such as its method.
        student (`str`):
            Path or hub id of the student.
        student_fingerprint (`str`, *optional*):
            SHA-256 of the student's weight files, `None` where they are not local files.
        teacher (`str`, *optional*):
            Path or hub id of the teacher, `None` if costs are not measured.
        task (`str`):
            Name of the task, or of the dataset.
        split (`str`, *optional*, defaults to `"test"`):
            Its split.
        num_problems (`int`):
            Number of problems.
        num_samples (`int`, *optional*, defaults to `1`):
            Sampled rollouts of each problem.
        greedy (`bool`, *optional*, defaults to `False`):
            Whether each problem has a greedy rollout too.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the problems and of the sampling.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the sampling, and of both models in the costs (of greedy rollouts as well).
        max_new_tokens (`int`):
            Longest completion, in tokens.
        batch_size (`int`, *optional*, defaults to `32`):
            Rollouts generated at a time. Part of what the seed means.
        backend (`str`, *optional*, defaults to `"transformers"`):
            What generates: `"transformers"` or `"vllm"`.
        teacher_beta (`float`, *optional*, defaults to `1.0`):
            Divergence: 1 reverse KL, 0 forward KL, generalised JSD between.
        cost_limit (`float`, *optional*, defaults to `0.35`):
            Limit, in the unit of the scope.
        cost_scope (`str`, *optional*, defaults to `"mean"`):
            Cost of a rollout: `"mean"`, `"sum"` or `"worst_prefix"`.
        versions (`dict[str, str]`, *optional*):
            Versions of Python and of the libraries; those that are running unless given.
        git_commit (`str`, *optional*):
            Commit of the source checkout, `None` if the package was not run from one; found unless given.
    """

    name: str
    student: str
    student_fingerprint: str | None = None
    teacher: str | None = None
    task: str
    split: str = "test"
    num_problems: int
    num_samples: int = 1
    greedy: bool = False
    seed: int = 0
    temperature: float = 1.0
    max_new_tokens: int
    batch_size: int = 32
    backend: str = "transformers"
    teacher_beta: float = 1.0
    cost_limit: float = 0.35
    cost_scope: str = "mean"
    versions: dict[str, str] = field(default_factory=library_versions)
    git_commit: str | None = field(default_factory=lambda: git_state()[0])

    def to_json(self) -> str:
        """The settings on one line."""
        return _to_json(self)

    @classmethod
    def from_json(cls, line: str) -> "EvaluationSettings":
        """
        Read [`~EvaluationSettings.to_json`]'s line.

        Raises:
            ValueError: If it holds no settings: no JSON, a key missing or unknown, a value of another type.
        """
        return cls(**_from_json(cls, line))


@dataclass(frozen=True)
class RolloutRecord:
    """
    One rollout of an evaluation.

    Args:
        problem (`int`):
            Place of the problem in the split, from 0: the same problem for every student of the same settings.
        greedy (`bool`):
            Whether it is the problem's greedy rollout.
        sample (`int`):
            Number of the sample, from 0; 0 for a greedy rollout.
        prompt (`str` or `list[dict[str, str]]`):
            Prompt, text or messages.
        answer (`str`):
            Gold answer.
        difficulty (`str`, *optional*):
            Stratum of the problem, such as its number of steps, `None` where the data has none.
        completion (`str`):
            Completion as text, without special tokens.
        completion_ids (`list[int]`):
            Its tokens, the end-of-sequence token included where there is one, of length L.
        tokens (`list[str]`):
            The text of each, of length L.
        truncated (`bool`):
            Whether the completion reached the greatest length without an end-of-sequence token.
        right (`bool`):
            Whether the final answer is right.
        costs (`list[float]`, *optional*):
            Exact divergence from the teacher at each token, in nats, of length L, `None` without a teacher. Rounded to
            six decimals: the figures are computed from what is written.
    """

    problem: int
    greedy: bool
    sample: int
    prompt: str | list[dict[str, str]]
    answer: str
    difficulty: str | None
    completion: str
    completion_ids: list[int]
    tokens: list[str]
    truncated: bool
    right: bool
    costs: list[float] | None

    @property
    def key(self) -> tuple[int, bool, int]:
        """Problem, whether greedy, and sample: what no other rollout of the evaluation shares."""
        return self.problem, self.greedy, self.sample

    def to_json(self) -> str:
        """The record on one line."""
        return _to_json(self)

    @classmethod
    def from_json(cls, line: str) -> "RolloutRecord":
        """
        Read [`~RolloutRecord.to_json`]'s line.

        Raises:
            ValueError: If it is not a record: no JSON, a key missing or unknown, a value of another type, or lists of
                different lengths.
        """
        record = cls(**_from_json(cls, line))
        lengths = {len(record.tokens), len(record.completion_ids)}
        if record.costs is not None:
            lengths.add(len(record.costs))
        if len(lengths) > 1:
            raise ValueError("`completion_ids`, `tokens` and `costs` of a record have different lengths.")
        return record


def read_rollout_records(source: Path | str) -> tuple[EvaluationSettings, list[RolloutRecord]]:
    """
    Read the records of an evaluation.

    Args:
        source (`Path` or `str`):
            The file, or its text: the settings on the first line, a record on each further one. A last line without
            its end was cut while it was written, and is left out.

    Returns:
        `tuple[EvaluationSettings, list[RolloutRecord]]`: The settings, and the records in the file's order.

    Raises:
        ValueError: If a line is not what it should be (its number is named), is none that the settings ask for, or if
            a rollout is there twice.
    """
    text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
    lines = text.split("\n")[:-1]
    if not lines:
        raise ValueError("There are no settings on the first line: nothing was recorded.")
    try:
        settings = EvaluationSettings.from_json(lines[0])
    except ValueError as error:
        raise ValueError(f"Line 1 holds no settings of an evaluation: {error}") from error
    records = []
    seen: set[tuple[int, bool, int]] = set()
    for number, line in enumerate(lines[1:], start=2):
        try:
            record = RolloutRecord.from_json(line)
            _check_asked_for(record, settings)
        except ValueError as error:
            raise ValueError(f"Line {number} is not a record: {error}") from error
        if record.key in seen:
            raise ValueError(
                f"Line {number}: the {'greedy rollout' if record.greedy else f'sample {record.sample}'} of problem "
                f"{record.problem} is there twice: delete one of its lines."
            )
        seen.add(record.key)
        records.append(record)
    return settings, records


def _check_asked_for(record: RolloutRecord, settings: EvaluationSettings) -> None:
    num_samples = int(settings.greedy) if record.greedy else settings.num_samples
    if not (0 <= record.problem < settings.num_problems and 0 <= record.sample < num_samples):
        raise ValueError(
            f"problem {record.problem}, {'greedy, ' if record.greedy else ''}sample {record.sample} is none that the "
            "settings ask for."
        )
    if (record.costs is None) != (settings.teacher is None):
        raise ValueError("it has costs and the settings no teacher, or the other way round.")


_NONE = type(None)
_SETTINGS_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "student": (str,),
    "student_fingerprint": (str, _NONE),
    "teacher": (str, _NONE),
    "task": (str,),
    "split": (str,),
    "num_problems": (int,),
    "num_samples": (int,),
    "greedy": (bool,),
    "seed": (int,),
    "temperature": (float, int),
    "max_new_tokens": (int,),
    "batch_size": (int,),
    "backend": (str,),
    "teacher_beta": (float, int),
    "cost_limit": (float, int),
    "cost_scope": (str,),
    "versions": (dict,),
    "git_commit": (str, _NONE),
}
_RECORD_TYPES: dict[str, tuple[type, ...]] = {
    "problem": (int,),
    "greedy": (bool,),
    "sample": (int,),
    "prompt": (str, list),
    "answer": (str,),
    "difficulty": (str, _NONE),
    "completion": (str,),
    "completion_ids": (list,),
    "tokens": (list,),
    "truncated": (bool,),
    "right": (bool,),
    "costs": (list, _NONE),
}
_ELEMENTS: dict[str, tuple[type, ...]] = {
    "prompt": (dict,),
    "completion_ids": (int,),
    "tokens": (str,),
    "costs": (float, int),
}


def _to_json(record: Any) -> str:
    return json.dumps(asdict(record), separators=(",", ":"), allow_nan=False)


def _from_json(cls: type, line: str) -> dict[str, Any]:
    values = json.loads(line, parse_constant=_refuse_constant)
    if not isinstance(values, dict):
        raise ValueError(f"it is no JSON object but {type(values).__name__}.")
    types = _SETTINGS_TYPES if cls is EvaluationSettings else _RECORD_TYPES
    if values.keys() != types.keys():
        raise ValueError(f"it has the wrong keys: {', '.join(sorted(values.keys() ^ types.keys()))}.")
    for name, kinds in types.items():
        # `type`, not `isinstance`: a bool is no number.
        if type(values[name]) not in kinds:
            raise ValueError(f"`{name}` has the wrong type: {type(values[name]).__name__}.")
        if isinstance(values[name], list) and not all(type(element) in _ELEMENTS[name] for element in values[name]):
            raise ValueError(f"`{name}` has an element of the wrong type.")
    texts = [values["versions"]] if cls is EvaluationSettings else values["prompt"]
    if not isinstance(texts, str) and not all(type(text) is str for mapping in texts for text in mapping.values()):
        raise ValueError(f"`{'versions' if cls is EvaluationSettings else 'prompt'}` holds what is no text.")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number.")
