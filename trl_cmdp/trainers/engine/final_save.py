"""A model on disk that is whole or not there: written beside, and then moved over an earlier one."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


_WEIGHTS = re.compile(r"(adapter_|pytorch_)?model([-.].*)?\.(safetensors|bin)(\.index\.json)?")
_LOADED_BY = {"config.json", "adapter_config.json"}  # a folder without loads nothing
_BESIDE = "_saving"  # the Hub's uploads leave out what begins with an underscore


@contextmanager
def written_beside(folder: Path, writes: bool) -> Iterator[Path]:
    """Where the model of `folder` is to be written, by the process that writes. Once it is, it is moved to `folder`."""
    beside = folder / _BESIDE
    if not writes:
        yield beside
        return
    shutil.rmtree(beside, ignore_errors=True)  # what a process that was killed has left
    beside.mkdir(parents=True)
    try:
        yield beside
        _put_in_place(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _put_in_place(beside: Path, folder: Path) -> None:
    """
    The file by which a model is loaded goes first and comes last: wherever this ends, parts of two models never load
    together.
    """
    names = [path.relative_to(beside) for path in beside.rglob("*") if path.is_file()]
    for name in _LOADED_BY & set(map(str, names)):
        (folder / name).unlink(missing_ok=True)
    if any(_WEIGHTS.fullmatch(str(name)) for name in names):
        for path in folder.iterdir():  # an earlier model may have more parts
            if _WEIGHTS.fullmatch(path.name) and Path(path.name) not in names:
                path.unlink()
    for name in sorted(names, key=lambda name: str(name) in _LOADED_BY):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(beside / name, folder / name)
