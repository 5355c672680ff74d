"""The parser of every command: errors of one line with a suggestion, and options with dashes or underscores."""

import argparse
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from .._messages import message


# What users of other libraries and of our other commands call an option, and no likeness of the words finds.
_ALSO_CALLED = {
    "student": "model_name_or_path",
    "reward": "reward_funcs",
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "max_new_tokens": "max_completion_length",
    "num_problems": "task_problems",
}


class Mistake(Exception):
    """A mistake in what was asked for, which is shown as one line. Every other error keeps its traceback."""


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """A question that names what is like a name that is not known, or nothing. Each is shown after `prefix`."""
    known = list(known)
    found = [_ALSO_CALLED[name]] if _ALSO_CALLED.get(name) in known else get_close_matches(name, known, 1, 0.75)
    # "teacher" is the beginning of several, of which the first matters most, and is like none of them as a whole.
    found = found or [one for one in known if one.startswith(name)][:1] or get_close_matches(name, known)
    return f" Did you mean {' or '.join(prefix + one for one in found)}?" if found else ""


def underscored(arguments: Sequence[str]) -> list[str]:
    """Arguments with every option as it is declared: `--output-dir` as `--output_dir`."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return [_underscored(word) if word.startswith("--") else word for word in arguments[:end]] + list(arguments[end:])


def _underscored(option: str) -> str:
    name, equals, value = option[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


class Parser(argparse.ArgumentParser):
    """
    A parser whose options are declared with underscores, and whose errors are one line that quotes no secret and nothing
    that a terminal obeys.
    """

    def error(self, text: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message(' '.join(text.split()))}\n")

    @property
    def options(self) -> dict[str, argparse.Action]:
        """The options of the command by their names."""
        return {name[2:]: action for name, action in self._option_string_actions.items() if name.startswith("--")}

    def unknown(self, words: Sequence[str]) -> list[str]:
        """Those of the words that are options, and none of the command nor the beginning of one."""
        end = words.index("--") if "--" in words else len(words)
        options = [word for word in words[:end] if word.startswith("--")]
        known = tuple(self.options)
        return [word for word in options if not any(one.startswith(word[2:].partition("=")[0]) for one in known)]

    def refuse_unknown(self, words: Sequence[str]) -> None:
        """Say which of the words that were left over are no options of the command, and what they are like."""
        if words:
            unknown = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
            listed = ", ".join(f"--{name}" for name in unknown) or " ".join(words)  # no values, where a key may stand
            questions = "".join(did_you_mean(name, self.options, prefix="--") for name in unknown)
            self.error(f"unrecognized arguments: {listed}.{questions}")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except Mistake as mistake:  # of a type
            raise Mistake(": ".join([*action.option_strings, str(mistake)])) from None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += f".{did_you_mean(str(value), map(str, action.choices or ()))}"
            raise
