"""The records of one evaluation, from which every figure is computed again without a model."""

import io
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from .._defaults import COST_LIMIT, COST_SCOPE, CostScope
from ._lines import from_line, lines_of, read_lines, to_line
from .provenance import git_state, library_versions


# Settings that decide which problems were rolled out: students with others are never compared.
PROBLEM_SETTINGS = ("task", "split", "num_problems", "seed")

IMAGE_PREFIX = "data:image/jpeg;base64,"
_IMAGE = re.compile(f"{IMAGE_PREFIX}[A-Za-z0-9+/]*=*")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """
    What an evaluation was asked for: the first line of its records. An evaluation is resumed only under equal settings.

    Args:
        name (`str`):
            Name of the student in tables and plots, such as its method.
        student (`str`):
            Path or hub id of the student.
        student_fingerprint (`str`, *optional*):
            SHA-256 of the student's weight files, `None` where they are not local files.
        teacher (`str`, *optional*):
            Path or hub id of the teacher, `None` if costs are not measured.
        teacher_fingerprint (`str`, *optional*):
            Fingerprint of its weights. This and what follows to `student_dtype` is `None` where nobody has
            taken it, as in records of earlier versions; the commands take each.
        reward (`str`, *optional*):
            Dotted name of the reward function.
        reward_fingerprint (`str`, *optional*):
            Fingerprint of the source of its module, `None` also where that cannot be read.
        problems_fingerprint (`str`, *optional*):
            Fingerprint of the problems, every column of them.
        tokenizer_fingerprint (`str`, *optional*):
            Fingerprint of the tokenizer: its vocabulary, special tokens and chat template.
        student_dtype (`str`, *optional*):
            Dtype of the student.
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
        chat_template (`str`, *optional*):
            Chat template of prompts that are messages, in place of the tokenizer's own.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Further arguments of the chat template, such as `{"enable_thinking": False}`: those of the training.
        backend (`str`, *optional*, defaults to `"transformers"`):
            What generates: `"transformers"` or `"vllm"`.
        teacher_beta (`float`, *optional*, defaults to `1.0`):
            Divergence: 1 reverse KL, 0 forward KL, generalised JSD between.
        teacher_eos_token (`str`, *optional*):
            Token with which the teacher ends a turn, where it counts as the student's.
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
    teacher_fingerprint: str | None = None
    reward: str | None = None
    reward_fingerprint: str | None = None
    problems_fingerprint: str | None = None
    tokenizer_fingerprint: str | None = None
    student_dtype: str | None = None
    task: str
    split: str = "test"
    num_problems: int
    num_samples: int = 1
    greedy: bool = False
    seed: int = 0
    temperature: float = 1.0
    max_new_tokens: int
    batch_size: int = 32
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    backend: Literal["transformers", "vllm"] = "transformers"
    teacher_beta: float = 1.0
    teacher_eos_token: str | None = None
    cost_limit: float = COST_LIMIT
    cost_scope: CostScope = COST_SCOPE
    versions: dict[str, str] = field(default_factory=library_versions)
    git_commit: str | None = field(default_factory=lambda: git_state()[0])

    def to_json(self) -> str:
        """The settings on one line."""
        return to_line(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> "EvaluationSettings":
        """Read [`~EvaluationSettings.to_json`]'s line. One of other keys, or values of other types, is a `ValueError`."""
        return cls(**from_line(cls, line))


@dataclass(frozen=True)
class RolloutRecord:
    """
    One rollout of an evaluation.

    Args:
        problem (`int`):
            Index of the problem in the split, from 0: the same problem for every student of the same settings.
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
            Whether the completion reached the maximum length without an end-of-sequence token.
        right (`bool`):
            Whether the final answer is correct.
        costs (`list[float]`, *optional*):
            Exact divergence from the teacher at each token, in nats, of length L, `None` without a teacher. Rounded to
            six decimals: the figures are computed from what is written.
        teacher_prompt (`str` or `list[dict[str, str]]`, *optional*):
            What the teacher read in the place of the prompt, `None` where it read the prompt.
        images (`list[str]`, *optional*):
            The prompt's images, small, as data URLs of JPEG, `None` where it has none.
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
    teacher_prompt: str | list[dict[str, str]] | None = None
    images: list[str] | None = None

    @property
    def key(self) -> tuple[int, bool, int]:
        """Problem, whether greedy, and sample: what no other rollout of the evaluation shares."""
        return self.problem, self.greedy, self.sample

    def to_json(self) -> str:
        """The record on one line."""
        values = asdict(self)
        if self.images is None:
            del values["images"]
        return to_line(values)

    @classmethod
    def from_json(cls, line: str) -> "RolloutRecord":
        """
        Read [`~RolloutRecord.to_json`]'s line. One of other keys, values of other types, or lists of different lengths
        is a `ValueError`.
        """
        record = cls(**from_line(cls, line))
        lengths = {len(record.tokens), len(record.completion_ids)}
        if record.costs is not None:
            lengths.add(len(record.costs))
        if len(lengths) > 1:
            raise ValueError("`completion_ids`, `tokens` and `costs` of a record have different lengths.")
        if not all(map(_IMAGE.fullmatch, record.images or [])):
            raise ValueError(f"`images` of a record holds data URLs, `{IMAGE_PREFIX}...`, and nothing else.")
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
        ValueError: If a line is not a record that the settings ask for (its number is named), or if a rollout is
            recorded twice.
    """
    lines = lines_of(source) if isinstance(source, Path) else io.StringIO(source)
    first = next(lines, "")
    if not first.endswith("\n"):
        raise ValueError("There are no settings on the first line: nothing was recorded.")
    try:
        settings = EvaluationSettings.from_json(first)
    except ValueError as error:
        raise ValueError(f"Line 1 holds no settings of an evaluation: {error}") from error

    shared = _Shared()

    def record_of(line: str) -> RolloutRecord:
        record = RolloutRecord.from_json(line)
        _check_expected(record, settings)
        record.tokens[:] = map(shared.__getitem__, record.tokens)
        record.completion_ids[:] = map(shared.__getitem__, record.completion_ids)
        return record

    records: dict[tuple[int, bool, int], RolloutRecord] = {}
    for number, record in read_lines(lines, record_of, "record", first=2):
        if record.key in records:
            raise ValueError(
                f"Line {number}: the {'greedy rollout' if record.greedy else f'sample {record.sample}'} of problem "
                f"{record.problem} is recorded twice: delete one of its lines."
            )
        records[record.key] = record
    return settings, list(records.values())


def difference_of_settings(
    one: EvaluationSettings, other: EvaluationSettings, names: Sequence[str]
) -> tuple[str, object, object] | None:
    """Name and both values of the first of some settings that differs, `None` if they are equal."""
    for name in names:
        values = getattr(one, name), getattr(other, name)
        if values[0] != values[1]:
            return name, *values
    return None


class _Shared(dict[Any, Any]):
    """Equal values as one object, up to a number of them: a file names few tokens, millions of times."""

    def __missing__(self, value: Any) -> Any:
        if len(self) < 2**18:
            self[value] = value
        return value


def _check_expected(record: RolloutRecord, settings: EvaluationSettings) -> None:
    num_samples = int(settings.greedy) if record.greedy else settings.num_samples
    if not (0 <= record.problem < settings.num_problems and 0 <= record.sample < num_samples):
        raise ValueError(
            f"the settings ask for no {'greedy rollout' if record.greedy else f'sample {record.sample}'} of problem "
            f"{record.problem}."
        )
    if (record.costs is None) != (settings.teacher is None):
        raise ValueError("either the record has costs or the settings have a teacher, but not both.")
