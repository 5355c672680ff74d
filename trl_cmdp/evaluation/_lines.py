"""Records as lines of JSON, each value checked against the type that the record's field declares."""

import json
import reprlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints


Record = TypeVar("Record")

LARGEST = 1e38  # of a number: sums and squares of thousands stay finite
_DEEPEST = 50  # of values of any type: whoever walks through them recurses


def read_text(path: Path) -> str:
    """What a file of lines holds. A line that is not UTF-8 is a `ValueError`."""
    return "".join(lines_of(path))


def to_line(values: Any) -> str:
    """JSON on one line, without spaces. A NaN is an error."""
    return json.dumps(values, separators=(",", ":"), allow_nan=False)


def from_line(record: Any, line: str) -> dict[str, Any]:
    """
    The values of a record's fields, or a `ValueError` that says what is wrong with them. A field that has a default may
    be missing: an earlier release, which did not have it, wrote the line.
    """
    values = parse_json(line)
    if not isinstance(values, dict):
        raise ValueError(f"it is not a JSON object but {type(values).__name__}.")
    types = _types(record)
    required = {field.name for field in fields(record) if field.default is MISSING}
    if not required <= values.keys() <= types.keys():
        wrong = (required - values.keys()) | (values.keys() - types.keys())
        raise ValueError(f"it has the wrong keys: {', '.join(sorted(wrong))}.")
    for name, value in values.items():
        if not has_type(value, types[name]):
            raise ValueError(f"`{name}` or an element of it has the wrong type: {reprlib.repr(value)}.")
    return values


def parse_json(line: str) -> Any:
    """The value of a line of JSON, or a `ValueError` for one that no figure can be computed from."""
    try:
        return json.loads(line, parse_constant=_refuse, parse_float=_float, parse_int=_int)
    except RecursionError:
        raise ValueError("it is nested too deeply.") from None


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a file, each with its end. One that is not UTF-8 is a `ValueError`."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"Line {number} is not UTF-8 text: {error.reason}.") from error


def read_lines(
    lines: Iterable[str], parse: Callable[[str], Record], kind: str, first: int = 1
) -> Iterator[tuple[int, Record]]:
    """Number and record of each line. A last line without its end was cut while it was written, and is left out."""
    for number, line in enumerate(lines, start=first):
        if not line.endswith("\n"):
            return
        try:
            yield number, parse(line)
        except ValueError as error:
            raise ValueError(f"Line {number} is not a {kind}: {error}") from error


_SCALARS: dict[Any, set[type]] = {int: {int}, str: {str}, bool: {bool}, float: {float, int}}


@cache
def _types(record: Any) -> dict[str, Any]:
    return get_type_hints(record)


def has_type(value: Any, declared: Any) -> bool:
    """Whether a value, of JSON, is of a declared type."""
    # `type`, not `isinstance`: a bool is not a number.
    if declared is Any:
        return _is_shallow(value, _DEEPEST)
    if type(value) is declared or (declared is float and type(value) is int):
        return True
    origin, arguments = get_origin(declared), get_args(declared)
    if origin in (UnionType, Union):  # of a `Literal` and None the latter
        return any(has_type(value, option) for option in arguments)
    if origin is Literal:
        return value in arguments
    if origin is list:
        if type(value) is list and arguments[0] in _SCALARS:  # of a rollout's tokens, of which there are millions
            return set(map(type, value)) <= _SCALARS[arguments[0]]
        return type(value) is list and all(has_type(element, arguments[0]) for element in value)
    if origin is dict:
        return type(value) is dict and all(has_type(element, arguments[1]) for element in value.values())
    if is_dataclass(declared):  # one of thousands: its values alone, in the order of its fields
        types = list(_types(cast(type, declared)).values())
        num_required = sum(field.default is MISSING for field in fields(declared))
        return type(value) is list and num_required <= len(value) <= len(types) and all(map(has_type, value, types))
    return False


def _is_shallow(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return True
    parts = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_is_shallow(part, levels - 1) for part in parts)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number.")


def _float(text: str) -> float:
    if abs(value := float(text)) > LARGEST:
        raise ValueError(f"{text[:20]} is larger than {LARGEST:g}.")
    return value


def _int(text: str) -> int:
    if abs(value := int(text)) > LARGEST:
        raise ValueError(f"an integer of {len(text)} digits is larger than {LARGEST:g}.")
    return value
