"""Argument types that the commands share, and the errors that they show as one line."""

import argparse
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement


class Mistake(Exception):
    """A mistake in what was asked for, which is shown as one line. Every other error keeps its traceback."""


@contextmanager
def mistakes(*others: type[Exception]) -> Iterator[None]:
    """Turn the errors by which the library says what is wrong with its input, and `others`, into a [`Mistake`]."""
    try:
        yield
    except (ValueError, OSError, ImportError, *others) as error:
        raise Mistake(_with_extra(str(error))) from error


def _with_extra(text: str) -> str:
    """What an error says, with the extra that installs the package which it is about, if that is missing."""
    if "trl-cmdp[" in text:
        return text
    for requirement in map(Requirement, requires("trl-cmdp") or ()):
        extra = re.search(r"extra == \W([\w-]+)", str(requirement.marker))
        if extra is None or extra[1] in ("dev", "docs"):
            continue
        for package in (requirement.name, *requirement.extras):  # `trl[vllm]` brings vllm
            module = package.replace("-", "_")
            named = re.search(rf"\b({re.escape(package)}|{re.escape(module)})\b", text, re.IGNORECASE)
            if named and find_spec(module) is None:
                return f'{text.rstrip(".")}. The package comes with: pip install "trl-cmdp[{extra[1]}]"'
    return text


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


def true_or_false(text: str) -> bool:
    """A truth value, for `argparse`."""
    try:
        return {"true": True, "false": False}[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"must be true or false, got {text}") from None


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
