"""Docstrings in TRL's format, for mkdocstrings, which knows Google's."""

import re
from typing import Any

import griffe


# "name (`type`, *optional*, defaults to `1.0`):" and "`type`: what is returned"
_PARAMETER = re.compile(r"^( +)(\w+|\*\*\w+) \((.+)\):$", re.MULTILINE)
_RETURNS = re.compile(r"^( +)`([^`]+)`: ", re.MULTILINE)
# "beta, temperature, memory_mb:", described together
_TOGETHER = re.compile(r"^( +)(\w+(?:, \w+)+):\n((?:\1 +.+\n?)+)", re.MULTILINE)
_REFERENCE = re.compile(r"\[`~?(?:\w+\.)*(\w+)`\](?!\()")


class TrlDocstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = to_google(obj.docstring.value)


def to_google(docstring: str) -> str:
    """The same docstring in Google's format: types without backticks; defaults stand in the signature."""
    text = _REFERENCE.sub(r"`\1`", docstring)
    text = _PARAMETER.sub(_parameter, text)
    text = _TOGETHER.sub(_each, text)
    return _RETURNS.sub(r"\1\2: ", text)


def _parameter(match: re.Match[str]) -> str:
    indent, name, description = match.groups()
    annotation, *_ = re.split(r", \*optional\*|, keyword-only", description)
    annotation = re.sub("`(?:, | or )`", " | ", annotation).replace("`", "")
    return f"{indent}{name} ({annotation}{', optional' if '*optional*' in description else ''}):"


def _each(match: re.Match[str]) -> str:
    indent, names, description = match.groups()
    return "".join(f"{indent}{name}:\n{description}" for name in names.split(", "))
