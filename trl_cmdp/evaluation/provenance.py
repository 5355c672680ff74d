"""Where a record comes from: versions, commit, and the weights that it is of."""

import hashlib
import inspect
import platform
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..core.fingerprint import fingerprint


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def library_versions() -> dict[str, str]:
    """Versions of Python, of the libraries that decide a result, and of this package."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "trl")},
        "trl_cmdp": __version__,
    }


def git_state() -> tuple[str | None, bool]:
    """Commit of the checkout that this package is run from, and whether the package differs from it."""
    package = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An environment inside somebody's repository is no checkout of ours.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "."))
    except (OSError, subprocess.CalledProcessError):
        return None, False


def weights_fingerprint(model: str | Path) -> str | None:
    """SHA-256 over a local checkpoint's safetensors files in the order of their names, `None` if there are none."""
    files = sorted(Path(model).glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


def dotted_name(function: Callable[..., Any]) -> str:
    """Module and name of a function, of an object that is called its class's."""
    named = _named(function)
    return f"{named.__module__}.{named.__qualname__}"


def source_fingerprint(function: Callable[..., Any]) -> str | None:
    """Fingerprint of the source of a function's module, `None` where it cannot be read."""
    try:
        return fingerprint(inspect.getsource(sys.modules[_named(function).__module__]))
    except (OSError, TypeError, KeyError):
        return None


def _named(function: Callable[..., Any]) -> Any:
    while isinstance(function, partial):
        function = function.func
    return function if inspect.isroutine(function) else type(function)


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Fingerprint of what turns a prompt into tokens, and tokens into text."""
    return fingerprint([tokenizer.chat_template, tokenizer.special_tokens_map, tokenizer.get_vocab()])
