"""Records as lines of JSON, each value checked against the type that the record's field declares."""

import json
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints


Record = TypeVar("Record")


def read_text(path: Path) -> str:
    """What a file of lines holds. A line that is not UTF-8 is a `ValueError`."""
    content = path.read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"Line {number} is not UTF-8 text: {error.reason}.") from error


def to_line(values: Any) -> str:
    """JSON on one line, without spaces. A NaN is an error."""
    return json.dumps(values, separators=(",", ":"), allow_nan=False)


def from_line(record: Any, line: str) -> dict[str, Any]:
    """
    The values of a record's fields, or a `ValueError` that says what is wrong with them. A field that has a default may
    be missing: an earlier release, which did not have it, wrote the line.
    """
    values = json.loads(line, parse_constant=_refuse)
    if not isinstance(values, dict):
        raise ValueError(f"it is not a JSON object but {type(values).__name__}.")
    types = get_type_hints(record)
    required = {field.name for field in fields(record) if field.default is MISSING}
    if not required <= values.keys() <= types.keys():
        wrong = (required - values.keys()) | (values.keys() - types.keys())
        raise ValueError(f"it has the wrong keys: {', '.join(sorted(wrong))}.")
    for name, value in values.items():
        if not _has_type(value, types[name]):
            raise ValueError(f"`{name}` or an element of it has the wrong type: {str(value)[:80]}.")
    return values


def read_lines(text: str, parse: Callable[[str], Record], kind: str, first: int = 1) -> Iterator[tuple[int, Record]]:
    """Number and record of each line. A last line without its end was cut while it was written, and is left out."""
    for number, line in enumerate(text.split("\n")[first - 1 : -1], start=first):
        try:
            yield number, parse(line)
        except ValueError as error:
            raise ValueError(f"Line {number} is not a {kind}: {error}") from error


def _has_type(value: Any, declared: Any) -> bool:
    # `type`, not `isinstance`: a bool is not a number.
    if declared is Any or type(value) is declared or (declared is float and type(value) is int):
        return True
    origin, arguments = get_origin(declared), get_args(declared)
    if origin is UnionType:
        return any(_has_type(value, option) for option in arguments)
    if origin is Literal:
        return value in arguments
    if origin is list:
        return type(value) is list and all(_has_type(element, arguments[0]) for element in value)
    if origin is dict:
        return type(value) is dict and all(_has_type(element, arguments[1]) for element in value.values())
    if is_dataclass(declared):  # one of thousands: its values alone, in the order of its fields
        types = list(get_type_hints(declared).values())
        return type(value) is list and len(value) == len(types) and all(map(_has_type, value, types))
    return False


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number.")
