"""What must not be shown: keys, tokens, and addresses that hold them."""

import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path


_HIDDEN = "***"
_SECRET_NAME = r"(?:\w*[_-])?(?:token|api[_-]?key|secret|password)"
_NOT_SECRET = ("eos_token", "pad_token", "bos_token")
_PATTERNS = (
    (re.compile(r"(\w+://)[^/\s@]+@"), rf"\1{_HIDDEN}@"),  # https://user:password@host
    (re.compile(r"(\w+://[^\s?\"']+\?)[^\s\"']+"), rf"\1{_HIDDEN}"),  # signatures in what follows the path
    (re.compile(rf"""(["']{_SECRET_NAME}["']\s*:\s*)(["']).*?\2""", re.IGNORECASE), rf"\1\2{_HIDDEN}\2"),  # in JSON
    (re.compile(r"\b(?:hf_\w{8,}|sk-[\w-]{8,})"), _HIDDEN),
)


def hide_secrets(text: str, known: Iterable[str | None] = ()) -> str:
    """Hide what looks like a secret, and those that are known."""
    for secret in known:
        if secret:
            text = text.replace(secret, _HIDDEN)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def shell_command(argv: Sequence[str], known: Iterable[str | None] = ()) -> str:
    """A command as it can be shown, with the values of options that are named like a secret hidden."""
    known = list(known)
    program = Path(argv[0]).name
    words, hide_next = (["python", program] if program.endswith(".py") else [program]), False
    for argument in argv[1:]:
        option, equals, _ = argument.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        secret = (
            option.startswith("--")
            and name not in _NOT_SECRET
            and re.fullmatch(_SECRET_NAME, name, re.IGNORECASE) is not None
        )
        if hide_next:
            argument, secret = _HIDDEN, False
        elif secret and equals:
            argument, secret = f"{option}={_HIDDEN}", False
        words.append(hide_secrets(argument, known))
        hide_next = secret
    return " ".join(word if _HIDDEN in word and " " not in word else shlex.quote(word) for word in words)
