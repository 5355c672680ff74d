"""What may be shown or kept: no keys, tokens or addresses that hold them, and nothing that a terminal obeys."""

import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any


_HIDDEN = "***"
_SECRET_NAME = (
    r"(?:[\w-]*[_-])?(?:token|api[_-]?key|access[_-]?key|private[_-]?key|secret|password|passwd|credentials?)"
)
# Of a tokenizer: no secrets.
_NOT_SECRET = r"(?:[\w-]*[_-])?(?:eos|pad|bos|unk|sep|cls|mask|image|stop)[_-]token"
_FEWEST_CHARACTERS = 8  # of a secret in the environment: what is shorter may stand in any word
_PATTERNS = (
    (re.compile(r"(\b\w+://)[^/\s@]+@"), rf"\1{_HIDDEN}@"),  # https://user:password@host
    (re.compile(r"(\b\w+://[^\s?\"']+\?)[^\s\"']+"), rf"\1{_HIDDEN}"),  # signatures in what follows the path
    (re.compile(r"\b(?:hf_\w{8,}|sk-[\w-]{8,})"), _HIDDEN),
    (re.compile(r"\b(Bearer\s+)[!-~]+", re.IGNORECASE), rf"\1{_HIDDEN}"),
)
_QUOTED = r""""(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'"""
# What is before the value, the name in it, and the value: in JSON, of an option, in an assignment.
_NAMED = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"""(["']({_SECRET_NAME})["']\s*:\s*)({_QUOTED})""",
        rf"""((?<![\w-])--({_SECRET_NAME})(?:=|\s+))({_QUOTED}|[^\s"']+)""",
        rf"""((?<![\w-])({_SECRET_NAME})=)({_QUOTED}|[^\s"',)]+)""",
    )
)


def is_secret(name: str) -> bool:
    """Whether a setting, an option or a variable is named like a secret."""
    named = re.fullmatch(_SECRET_NAME, name, re.IGNORECASE) is not None
    return named and re.fullmatch(_NOT_SECRET, name, re.IGNORECASE) is None


def hide_secrets(text: str, known: Iterable[str | None] = ()) -> str:
    """Hide what looks like a secret or is named like one, and those that are known."""
    for secret in known:
        if secret:
            text = text.replace(secret, _HIDDEN)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    for named in _NAMED:
        text = named.sub(_without_value, text)
    return text


def without_secrets(values: Any) -> Any:
    """A record's values with the secrets among them hidden, however deep they are."""
    if isinstance(values, dict):
        return {
            key: _HIDDEN if value and isinstance(key, str) and is_secret(key) else without_secrets(value)
            for key, value in values.items()
        }
    if isinstance(values, list | tuple):
        return [without_secrets(value) for value in values]
    return hide_secrets(values) if isinstance(values, str) else values


def secrets_in(values: Any) -> Iterator[str]:
    """The texts that stand under a secret's name, however deep they are."""
    if isinstance(values, dict):
        for key, value in values.items():
            if isinstance(key, str) and is_secret(key) and isinstance(value, str) and len(value) >= 4:
                yield value  # a shorter one may stand in any word
            else:
                yield from secrets_in(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from secrets_in(value)


def printable(text: str) -> str:
    """
    Text that a terminal shows and never obeys, and that can be written as UTF-8: without control characters but line
    breaks and tabs, changes of the writing direction, and halves of characters.
    """
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else " " if letter.isspace() else "�" for letter in text
    )


def message(text: str, known: Iterable[str | None] = ()) -> str:
    """A text as any command shows it: without secrets, those of the environment among them, and printable."""
    environment = [value for name, value in os.environ.items() if is_secret(name) and len(value) >= _FEWEST_CHARACTERS]
    return printable(hide_secrets(text, [*environment, *known]))


def say(text: str, *, error: bool = False) -> None:
    """Print a [`message`]."""
    print(message(text), file=sys.stderr if error else sys.stdout, flush=True)


def shell_command(argv: Sequence[str], known: Iterable[str | None] = ()) -> str:
    """A command as it can be shown, with the values of options that are named like a secret hidden."""
    known = list(known)
    program = Path(argv[0]).name
    words, hide_next = (["python", program] if program.endswith(".py") else [program]), False
    for argument in argv[1:]:
        option, equals, _ = argument.partition("=")
        secret = option.startswith("--") and is_secret(option.removeprefix("--"))
        if hide_next:
            argument, secret = _HIDDEN, False
        elif secret and equals:
            argument, secret = f"{option}={_HIDDEN}", False
        words.append(hide_secrets(argument, known))
        hide_next = secret
    return " ".join(word if _HIDDEN in word and " " not in word else shlex.quote(word) for word in words)


def _without_value(match: re.Match[str]) -> str:
    before, name, value = match.groups()
    if not is_secret(name):
        return match[0]
    quote = value[0] if value[0] in "\"'" else ""
    return f"{before}{quote}{_HIDDEN}{quote}"
