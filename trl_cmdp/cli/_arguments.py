"""Argument types that the commands share, and the errors that they show as one line."""

import argparse
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Mistake(Exception):
    """A mistake in what was asked for, which is shown as one line. Every other error keeps its traceback."""


@contextmanager
def mistakes(*others: type[Exception]) -> Iterator[None]:
    """Turn the errors by which the library says what is wrong with its input, and `others`, into a [`Mistake`]."""
    try:
        yield
    except (ValueError, OSError, ImportError, *others) as error:
        raise Mistake(str(error)) from error


@contextmanager
def refusals() -> Iterator[None]:
    """Turn what refuses a training run, before it begins, into a [`Mistake`]."""
    from ..trainers.engine.guards import RefusedRun

    try:
        yield
    except RefusedRun as refusal:
        raise Mistake(str(refusal)) from refusal


def positive_int(text: str) -> int:
    """An integer of at least 1, for `argparse`."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def positive_float(text: str) -> float:
    """A finite number above 0, for `argparse`."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
    return value


def json_object(text: str) -> dict[str, Any]:
    """A JSON object, for `argparse`."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be JSON ({error}), got {text}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'must be a JSON object, such as {{"enable_thinking": false}}, got {text}')
    return value


def text_of_file(path: str) -> str:
    """What a file holds, for `argparse`."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"cannot be read: {error}") from error
