"""Any dataset with a column of prompts and one of final answers: a local JSONL, Parquet or CSV file, or from the Hub."""

import json
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from .._files import DATA_FORMATS, is_data_file
from .._prompts import Prompt, check_prompts
from ._verify import answer_text, final_answer_reward


__all__ = ["MAX_COMPLETION_LENGTH", "final_answer_reward", "load_problems", "load_splits"]

# A problem and its answer, for `trl-cmdp tasks`.
SAMPLE_PROBLEM = ('a row of your own: {"prompt": "What is 1 + 2?", "answer": "3"}', "3")
MAX_COMPLETION_LENGTH = 1024
_FLOAT_DIGITS = {"float16": 3, "float32": 7}  # significant digits that survive


def load_splits(path: str, name: str | None = None, streaming: bool = False) -> Any:
    """
    Loads every split of a dataset.

    Args:
        path (`str`):
            File (JSON, JSONL, Parquet or CSV, a URL too), whose rows are the split `"train"`; folder of such files,
            of which `train.*` and `test.*` become splits of these names; or a dataset on the Hub.
        name (`str`, *optional*):
            Configuration of a dataset on the Hub.
        streaming (`bool`, *optional*, defaults to `False`):
            Read rows when they are asked for.

    Returns:
        `datasets.DatasetDict` or `datasets.IterableDatasetDict`: The splits.

    Raises:
        ValueError: If a file is empty or damaged. Of lines of JSON the first damaged one is named.
    """
    file_format = DATA_FORMATS.get(Path(path).suffix)
    files = {} if file_format is None else {"data_files": path}
    try:
        splits = load_dataset(file_format or path, name=name, streaming=streaming, **files)
        for split in splits.values() if streaming else ():
            next(iter(split), None)
        return splits
    except (DatasetGenerationError, StopIteration, ValueError) as error:  # which hide what they are about
        cause = _damage(Path(path)) or error.__cause__ or error
        raise ValueError(f"The dataset {path!r} cannot be read: {cause}") from error


def _damage(path: Path) -> str | None:
    """Of a local file, or of those in a folder: which is empty, or which line of which is not JSON."""
    files = [path] if path.is_file() else sorted(file for file in path.glob("*") if is_data_file(file))
    for file in files:
        content = file.read_bytes()
        if b"\n" not in content.strip() and (not content.strip() or file.suffix == ".csv"):
            return f"{file.name} has no rows."
        if DATA_FORMATS.get(file.suffix) == "json" and (found := _damaged_line(content, file.suffix == ".jsonl")):
            return f"{file.name}, {found}"
    return None


def _damaged_line(content: bytes, as_lines: bool) -> str | None:
    lines = content.splitlines()
    if not as_lines:  # one document, or lines all the same
        try:
            json.loads(lines[0])
        except ValueError:
            lines = [content]
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            return f"line {number} is not JSON: {error}"
        if len(lines) > 1 and not isinstance(row, dict):
            return f"line {number} is no JSON object but {type(row).__name__}."
        if isinstance(row, list) and not row:
            return "which is an empty list."
    return None


def load_problems(
    n: int | None,
    split: str,
    seed: int,
    *,
    path: str,
    name: str | None = None,
    prompt_column: str = "prompt",
    answer_column: str = "answer",
    difficulty_column: str | None = None,
    system_prompt: str | None = None,
    conversational: bool = False,
) -> Dataset:
    """
    Loads problems of a dataset by the names of its columns.

    Args:
        n (`int` or `None`):
            Number of problems, at least 1, or `None` for the whole split.
        split (`str`):
            Split. The rows of a single file are the split `"train"`.
        seed (`int`):
            Seed of the order. The problems of a smaller `n` are the first ones of a larger `n` at the same seed.
        path (`str`):
            File, folder or dataset on the Hub, see [`load_splits`].
        name (`str`, *optional*):
            Configuration of a dataset on the Hub.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column of prompts, text or messages. Messages stay what they are. So does a column `teacher_prompt` beside it,
            the teacher's own prompts.
        answer_column (`str`, *optional*, defaults to `"answer"`):
            Column of correct final answers, each alone: a number, or text that is one or LaTeX.
        difficulty_column (`str`, *optional*):
            Column by which results are split.
        system_prompt (`str`, *optional*):
            First message of every prompt. Needs prompts that are messages.
        conversational (`bool`, *optional*, defaults to `False`):
            Make a user's message of each prompt that is text.

    Returns:
        `datasets.Dataset`: Dataset with the columns `prompt`, `answer` and, if asked for, `difficulty`, the last two
        as strings; and `teacher_prompt`, `images` or `image`, where the dataset has them.

    Raises:
        ValueError: If there is no such split or column, `n` is larger than the split, a prompt is neither text nor
            messages, or a row has no answer that a completion could state.
    """
    rows = open_split(path, split, name)
    check_columns(rows, [prompt_column, answer_column, *([difficulty_column] if difficulty_column else [])], path)
    first = check_prompts(rows, f"the dataset {path!r}", prompt_column, one_kind=not conversational)
    messages = conversational or not isinstance(first, str)
    has_own = "teacher_prompt" in rows.column_names
    if has_own:
        check_prompts(rows, f"the dataset {path!r}", "teacher_prompt", one_kind=False, text_only=True)
    if system_prompt is not None and not messages:
        raise ValueError("`system_prompt` is a message, but the prompts are text: set `conversational`.")

    feature = rows.features[answer_column]
    for index, answer in enumerate(rows[answer_column]):
        try:
            _final_answer(answer, feature)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Row {index} of {path!r} has no final answer in its column {answer_column!r}. {error}. Name a column "
                "of final answers, or leave out the row."
            ) from None

    images = [name for name in ("images", "image") if name in rows.column_names]

    def problem(row: dict[str, Any]) -> dict[str, Any]:
        prompt, of_teacher = row[prompt_column], {"teacher_prompt": row["teacher_prompt"]} if has_own else {}
        if messages and isinstance(prompt, str):
            prompt, of_teacher = _as_message(prompt), {name: _as_message(text) for name, text in of_teacher.items()}
        if system_prompt is not None:
            prompt = [{"role": "system", "content": system_prompt}, *prompt]
        texts = {"answer": _final_answer(row[answer_column], feature)}
        if difficulty_column:
            texts["difficulty"] = str(row[difficulty_column])
        return {"prompt": prompt, **texts, **of_teacher, **{name: row[name] for name in images}}

    return Dataset.from_list([problem(row) for row in draw(rows, n, seed)])


def _as_message(prompt: Prompt) -> Prompt:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _final_answer(answer: Any, feature: Any) -> str:
    """Text of one answer, of a class its name, of a narrow float what it was rounded from (0.1, not 0.10000000149)."""
    if isinstance(feature, ClassLabel):
        answer = None if answer is None or answer < 0 else feature.int2str(answer)
    elif isinstance(answer, float) and feature.dtype in _FLOAT_DIGITS:
        answer = float(f"{answer:.{_FLOAT_DIGITS[feature.dtype]}g}")
    return answer_text(answer)


def open_split(path: str, split: str, name: str | None = None) -> Dataset:
    """One split of what [`load_splits`] loads, or an error that lists those there are."""
    splits = load_splits(path, name)
    if split not in splits:
        raise ValueError(f"The dataset {path!r} has no split {split!r}, it has {', '.join(map(repr, splits))}.")
    return splits[split]


def check_columns(rows: Dataset, columns: list[str], path: str) -> None:
    """An error that lists the columns there are, if one is missing."""
    for column in columns:
        if column not in rows.column_names:
            there = ", ".join(map(repr, rows.column_names))
            raise ValueError(f"The dataset {path!r} has no column {column!r}, it has {there}.")


def check_text(rows: Dataset, column: str, path: str) -> None:
    """An error that names the row, if the column holds anything but text there."""
    for index, value in enumerate(rows[column]):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(
                f"Row {index} of the dataset {path!r}: its {column!r} must be text, got {repr(value)[:60]}. Leave such "
                "rows out."
            )


class FewerProblems(ValueError):
    """A split holds fewer problems than were asked for."""

    def __init__(self, n: int, available: int):
        super().__init__(f"`n` must be None, or from 1 to the {available} problems of the split, got {n}.")
        self.available = available


def draw(rows: Dataset, n: int | None, seed: int) -> Dataset:
    """The first `n` rows in the order of the seed, all of them if `None`."""
    if n is not None and not 1 <= n <= len(rows):
        raise FewerProblems(n, len(rows))
    return rows.shuffle(seed=seed).select(range(len(rows) if n is None else n))
