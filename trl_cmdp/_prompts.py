"""Prompts: what one may be, which is known before a model is loaded, and how one becomes tokens."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin


Prompt = str | list[dict[str, Any]]

TEACHER_PROMPT_IMAGES = (
    "The column 'teacher_prompt' cannot be used together with images: the teacher's own prompts are text alone. Remove the "
    "column, or the images (`dataset.remove_columns`, or the image parts of the messages)."
)

_FIRST_ROWS = 16  # of a stream, and of rows that are made or decoded when they are read
_BATCH_SIZE = 1000


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """
    Token ids of a prompt, as the trainers make them.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        prompt (`str` or `list[dict[str, Any]]`):
            Text, or messages, which get the chat template's opening of the answer.
        chat_template (`str`, *optional*):
            Chat template in place of the tokenizer's own.
        chat_template_kwargs (`Mapping[str, Any]`, *optional*):
            Further arguments of the chat template, such as `{"enable_thinking": False}`.

    Returns:
        `list[int]`: Token ids.

    Raises:
        ValueError: If the chat template cannot render the messages.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    try:
        encoded: Any = tokenizer.apply_chat_template(
            prompt,
            chat_template=chat_template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **(chat_template_kwargs or {}),
        )
    except Exception as error:  # of many kinds: a template is a program
        raise ValueError(f"The chat template cannot render a prompt: {type(error).__name__}: {error}.") from error
    return list(encoded["input_ids"])


def check_prompts(
    dataset: Dataset | IterableDataset,
    name: str,
    column: str = "prompt",
    *,
    one_kind: bool = True,
    text_only: bool = False,
) -> Prompt:
    """
    Check a column of prompts: all rows of a dataset, the first ones of a stream (and of a dataset whose rows are made,
    or images decoded, when they are read).

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows.
        name (`str`):
            What messages call it, "the training dataset".
        column (`str`, *optional*, defaults to `"prompt"`):
            Column of the prompts.
        one_kind (`bool`, *optional*, defaults to `True`):
            Whether either all are text or all are messages.
        text_only (`bool`, *optional*, defaults to `False`):
            Whether messages with content other than text, such as images, are refused.

    Returns:
        `str` or `list[dict[str, Any]]`: The first prompt.

    Raises:
        ValueError: If there is no row or no such column, or a prompt is neither text nor messages.
    """
    first: Prompt | None = None
    for index, prompt in enumerate(_read(dataset, name, column)):
        fault = prompt_fault(prompt)
        if fault is None and one_kind and first is not None and isinstance(prompt, str) != isinstance(first, str):
            found, expected = ("text", "messages") if isinstance(prompt, str) else ("messages", "text")
            fault = f"is {found}, and that of row 0 is {expected}. Make all of one kind (`dataset.map`)."
        if fault is None and text_only and any(part["type"] != "text" for part in parts_of(prompt)):
            fault = "has content other than text. Leave it out (`dataset.map`)."
        if fault is not None:
            raise ValueError(f"Row {index} of {name}: the prompt (column {column!r}) {fault}")
        first = prompt if first is None else first
    if first is None:
        raise ValueError(f"{name[0].upper()}{name[1:]} has no rows.")
    return first


def check_prompts_of_teacher(dataset: Dataset | IterableDataset, name: str) -> None:
    """Check the column `teacher_prompt` as [`check_prompts`] does. Images there or in the prompts are a `ValueError`."""
    prompts = _read(dataset, name, "prompt")
    if where_images(dataset, name) is not None or any(images_of({"prompt": prompt}) for prompt in prompts):
        raise ValueError(TEACHER_PROMPT_IMAGES)
    check_prompts(dataset, name, "teacher_prompt", text_only=True)


def prompt_fault(prompt: Any) -> str | None:
    """What is wrong with a prompt, and what to do about it; `None` for text and for messages as TRL takes them."""
    if prompt is None:
        return "is null. Leave such rows out (`dataset.filter`)."
    if isinstance(prompt, str):
        return None if prompt else "is empty. Leave such rows out (`dataset.filter`)."
    if not isinstance(prompt, list):
        return f"is {_described(prompt)}: make text of it, or a list of messages (`dataset.map`)."
    if not prompt:
        return "is an empty list. Leave such rows out (`dataset.filter`)."
    faults = (_message_fault(number, message) for number, message in enumerate(prompt))
    return next((fault for fault in faults if fault is not None), None)


def images_of(row: Mapping[str, Any]) -> list[Any]:
    """The images of a row of a dataset, as TRL reads them: of its columns `images` and `image`, or of its messages."""
    if in_columns := _images_in_columns(row):
        return in_columns
    return [part.get("image") for part in parts_of(row.get("prompt")) if part.get("type") == "image"]


def parts_of(prompt: Any) -> list[dict[str, Any]]:
    """The parts of messages whose content is a list of them, of text, images or other kinds."""
    messages = [message for message in prompt if isinstance(message, dict)] if isinstance(prompt, list) else []
    contents = [content for message in messages if isinstance(content := message.get("content"), list)]
    return [part for content in contents for part in content if isinstance(part, dict)]


def with_images(row: Mapping[str, Any], *more: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a row, and more behind them, with its images where a processor looks for them, as TRL puts them."""
    from trl.data_utils import prepare_multimodal_messages

    return prepare_multimodal_messages([*row["prompt"], *more], _images_in_columns(row))


def _images_in_columns(row: Mapping[str, Any]) -> list[Any]:
    if row.get("images") is not None:
        return list(row["images"])
    return [] if row.get("image") is None else [row["image"]]


def where_images(dataset: Dataset | IterableDataset | None, name: str) -> str | None:
    """Where a dataset has images by its first row, in words; `None` if it has none there."""
    for row in islice(dataset or [], 1):
        columns = sorted({"image", "images"} & row.keys())
        if columns:
            return f"{name[0].upper()}{name[1:]} has the column {columns[0]!r}."
        if images_of(row):
            return f"A message of {name} has an image."
    return None


def check_chat_template(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    messages: list[dict[str, Any]],
    name: str,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Check that messages can be rendered: those of the first row stand for all. An error is a `ValueError`."""
    if (chat_template or processing_class.chat_template) is None:
        raise ValueError(
            f"The prompts of {name} are messages, and the tokenizer has no chat template. Set "
            "`tokenizer.chat_template`, take the tokenizer of an instruction-tuned model, or make text of the prompts."
        )
    if isinstance(processing_class, ProcessorMixin):
        return  # of messages with images that TRL has yet to put in
    try:
        processing_class.apply_chat_template(
            messages,
            chat_template=chat_template,
            add_generation_prompt=True,
            tokenize=False,
            **(chat_template_kwargs or {}),
        )
    except Exception as error:  # of many kinds: a template is a program
        raise ValueError(
            f"The chat template cannot render the first prompt of {name}: {error}. Change the messages, the template or "
            "`chat_template_kwargs`."
        ) from error


def check_column(columns: Iterable[str], name: str, column: str = "prompt") -> None:
    """A column of prompts that is not among those there are is a `ValueError`."""
    if column not in columns:
        raise ValueError(
            f"{name[0].upper()}{name[1:]} has no column {column!r}, it has {', '.join(map(repr, columns))}. Rename the "
            "column of the prompts (`dataset.rename_column`), or make one (`dataset.map`)."
        )


def _read(dataset: Dataset | IterableDataset, name: str, column: str) -> Iterator[Any]:
    """The values of a column, as far as they are checked."""
    whole = isinstance(dataset, Dataset) and dataset.format["type"] != "custom"
    if whole:
        check_column(dataset.column_names, name, column)
        # Images are stored as bytes, which would all be read and decoded.
        whole = "binary" not in str(dataset.features.arrow_schema.field(column).type)
    if whole:
        num_read = 0
        try:
            for batch in dataset.select_columns([column]).with_format(None).iter(_BATCH_SIZE):
                yield from batch[column]
                num_read += _BATCH_SIZE
        except UnicodeDecodeError as error:
            raise ValueError(
                f"Of the rows {num_read} to {num_read + _BATCH_SIZE - 1} of {name}, one has a prompt (column {column!r}) "
                f"that is not UTF-8 text: {error.reason}."
            ) from error
        return
    for row in islice(dataset, _FIRST_ROWS):
        check_column(row, name, column)
        yield row[column]


def _message_fault(number: int, message: Any) -> str | None:
    if not isinstance(message, dict):
        return f"is a list whose element {number} is {_described(message)}, not `{{'role': ..., 'content': ...}}`."
    if message.get("role") is None and {"from", "value"} & message.keys():
        return (
            "has messages in ShareGPT's format (`from`, `value`). Convert them "
            "(`dataset.map(trl.maybe_convert_to_chatml)`), and call their roles 'user' and 'assistant'."
        )
    if not isinstance(message.get("role"), str) or not message["role"]:
        return f"has no `role` in its message {number}. A message is `{{'role': ..., 'content': ...}}`."
    if "content" not in message or (message["content"] is None and not message.get("tool_calls")):
        return f"has no `content` in its message {number}. It may be null beside `tool_calls` alone."
    content = message["content"]
    parts = content if isinstance(content, list) else []
    if not (content is None or isinstance(content, str | list)) or not all(map(_is_part, parts)):
        return (
            f"has a `content` in its message {number} that is {_described(content)}, and must be text or a list of parts "
            "such as `{'type': 'text', 'text': ...}`."
        )
    return None


def _is_part(part: Any) -> bool:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        return False
    return part["type"] != "text" or isinstance(part.get("text"), str)


def _described(value: Any) -> str:
    return "null" if value is None else f"of type `{type(value).__name__}` ({repr(value)[:60]})"
