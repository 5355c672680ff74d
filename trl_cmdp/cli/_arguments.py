"""Argument types that the commands share, and the errors that they show as one line."""

import argparse
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from .._files import is_data_file
from ._parser import Mistake, did_you_mean


_CHECKPOINT_FILES = ("config.json", "adapter_config.json")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@contextmanager
def mistakes(*others: type[Exception]) -> Iterator[None]:
    """Turn the errors by which the library says what is wrong with its input, and `others`, into a [`Mistake`]."""
    try:
        yield
    except (ValueError, OSError, ImportError, *others) as error:
        raise Mistake(_with_extra(str(error)) if isinstance(error, ImportError) else str(error)) from error


def _with_extra(text: str) -> str:
    """What an error says, with the extra that installs the package which it is about, if that is missing."""
    if "trl-cmdp[" in text:
        return text
    try:
        requirements = requires("trl-cmdp") or ()
    except PackageNotFoundError:  # run from a checkout that nobody installed
        return text
    for requirement in map(Requirement, requirements):
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
def mistakes_of(file: str | Path) -> Iterator[None]:
    """The same, of a file that is named."""
    try:
        with mistakes():
            yield
    except Mistake as error:
        raise Mistake(f"{file}: {error}") from error


@contextmanager
def models_named(**models: str | None) -> Iterator[None]:
    """Name the model that could not be loaded, of those that the options name: the libraries' errors often do not."""
    try:
        yield
    except OSError as error:
        from transformers.utils import cached_file

        for option, source in models.items():
            if source is None or Path(source).is_dir():
                continue
            try:
                cached_file(source, "config.json")
            except OSError as cause:
                reason = str(cause).splitlines()[0].rstrip(".")
                question = _question(Path(source).parent, Path(source).name, _is_checkpoint)
                raise Mistake(f"--{option}: {source!r} cannot be loaded: {reason}.{question}") from error
        raise


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


def model_source(text: str) -> str:
    """The folder of a checkpoint, or what may be the id of a model on the Hub, for `argparse`."""
    path = Path(text)
    if path.is_dir():
        if not _is_checkpoint(path):
            raise Mistake(
                f"{text!r} is a folder without a model: it has no config.json.{_question(path, '', _is_checkpoint)}"
            )
    elif path.is_file():
        raise Mistake(f"{text!r} is a file: give the folder of the model.")
    elif not _HUB_ID.fullmatch(text):
        question = _question(path.parent, path.name, Path.is_dir)
        raise Mistake(f"{text!r} is neither a folder nor a Hub id.{question}")
    return text


def data_source(text: str) -> str:
    """A file or folder of data, or what may be the id of a dataset on the Hub, for `argparse`."""
    path = Path(text)
    if "://" in text or path.exists() or any(letter in text for letter in "*?["):
        return text
    is_file = is_data_file(path)
    if is_file or not _HUB_ID.fullmatch(text):
        what = "no file" if is_file else "neither a file, a folder nor a Hub id"
        raise Mistake(f"{text!r} is {what}.{_question(path.parent, path.name, Path.exists)}")
    return text


def existing_file(text: str) -> Path:
    """A file that there is, for `argparse`."""
    path = Path(text)
    if path.is_dir():
        raise Mistake(f"{text!r} is a folder: give a file.{_question(path, '', Path.is_file)}")
    if not path.exists():
        question = _question(path.parent, path.name, Path.is_file)
        raise Mistake(f"there is no file {text!r}.{question}")
    return path


def existing_path(text: str) -> Path:
    """A file or folder that there is, for `argparse`."""
    path = Path(text)
    if not path.exists():
        question = _question(path.parent, path.name, Path.exists)
        raise Mistake(f"{text} does not exist.{question}")
    return path


def writable_folder(text: str) -> Path:
    """A folder that is there or can be made, for `argparse`."""
    path = Path(text)
    there = next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
    if not there.is_dir():
        raise Mistake(f"{text!r} cannot be a folder: {there} is a file.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise Mistake(f"{text!r} cannot be written to: no permission in {there}.")
    return path


def _is_checkpoint(folder: Path) -> bool:
    return folder.is_dir() and (
        any((folder / name).is_file() for name in _CHECKPOINT_FILES) or any(folder.glob("*.gguf"))
    )


def _question(folder: Path, name: str, fits: Callable[[Path], bool]) -> str:
    """What in a folder is meant by a name: what is like it, or where there is no name the only one that fits."""
    if not folder.is_dir():
        return ""
    names = [path.name for path in folder.iterdir() if not path.name.startswith(".") and fits(path)]
    prefix = "" if folder == Path() else f"{folder}{os.sep}"
    if not name:
        return f" Did you mean {prefix}{names[0]}?" if len(names) == 1 else ""
    return did_you_mean(name, names, prefix=prefix)
