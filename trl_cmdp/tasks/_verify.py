r"""Is the final answer of a completion right? One verifier for all tasks whose answers are numbers or mathematics.

The stated answer is the last `\boxed{...}` or `#### ...`, else the last number or formula. Plain numbers are compared
exactly, everything else by math-verify (`pip install "trl-cmdp[math]"`), in a process of its own: what a model writes
may keep sympy busy for hours (`\boxed{9^{9^9}!}`), math-verify's own timeout works in the main thread only, and no
signal interrupts a long multiplication.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from fractions import Fraction
from functools import lru_cache
from importlib.util import find_spec
from typing import Any


__all__ = ["final_answer_reward", "is_right", "last_boxed", "stated_answer"]

_LONGEST_TEXT = 20_000  # characters at the end of a completion that are read
_LONGEST_ANSWER = 500  # characters of an answer; the longest of MATH has 159
# For one comparison, which takes milliseconds. Processor time, so that a busy machine does not change rewards; the other
# is for systems that cannot limit it (Windows).
_CPU_SECONDS = 5.0
_WALL_SECONDS = 300.0
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_MARK = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)|\\boxed\s+(?=\S)|####[ \t]*[*_]*[ \t]*(?=[-+−\d.$€£¥\\(\[{])")
_FORMULA = re.compile(
    # Bounded, or text full of opening signs would take quadratic time.
    rf"\$\$(.{{1,{_LONGEST_ANSWER}}}?)\$\$|(?<!\\)\$((?:\\.|[^$\\\n]){{1,{_LONGEST_ANSWER}}})\$"
    rf"|\\\((.{{1,{_LONGEST_ANSWER}}}?)\\\)|\\\[(.{{1,{_LONGEST_ANSWER}}}?)\\\]",
    re.DOTALL,
)
_LAST_NUMBER = re.compile(rf"(?<![\w.])(?:(?<![)\]}}])[-+−])?\\?[$€£¥]?(?:{_DIGITS})(?:\s?/\s?\d+)?(?:\s?\\?%)?")
_NUMBER = re.compile(
    rf"(?P<number>[-+]?(?:{_DIGITS}))\.?"
    r"(?:\^?\{?\\circ\}?|°)?"  # what is left is a unit: 'apples', '\text{ square inches}'
    r"(?:\s+[A-Za-z]{2,}[A-Za-z .-]*|\s*\\(?:text|mathrm|mbox)\{[^{}\d]*\})?"
)


def final_answer_reward(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    """
    Reward function for TRL trainers: is the final answer right, whatever the reasoning says?

    Args:
        completions (`list[str]` or `list[list[dict[str, str]]]`):
            Completions as text, or as messages, of which the last one counts.
        answer (`list[str]`):
            Right final answers, the column `answer` of the task.
        **kwargs:
            The other columns and arguments that TRL passes, unused.

    Returns:
        `list[float]`: 1.0 where [`is_right`], else 0.0.

    Raises:
        ImportError: If math-verify is not installed.
    """
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [float(is_right(text or "", expected)) for text, expected in zip(texts, answer, strict=True)]


def is_right(completion: str, answer: str) -> bool:
    r"""
    Tells whether the final answer that a completion states is right.

    Where the answer is a number, a number must be stated: `\boxed{48 + 24}` leaves the work to the verifier and is
    wrong. Units, currency signs and thousands separators do not matter; 25% is right for 25 as well as for 0.25. What
    cannot be compared within 5 seconds of processor time is
    wrong.

    Args:
        completion (`str`):
            Completion, without special tokens.
        answer (`str`):
            Right final answer, alone: `"42"`, `"\\frac{3}{4}"`.

    Returns:
        `bool`: Whether the answer that [`stated_answer`] finds equals `answer`.

    Raises:
        ImportError: If math-verify is not installed.
    """
    # Asked for even where plain numbers need none of it: training must not fail at the first fraction.
    if not _is_math_verify_installed():
        raise ImportError('Answers are verified by math-verify: pip install "trl-cmdp[math]"')
    stated = stated_answer(completion)
    if stated is None:
        return False
    stated, expected = _tidy(stated), _tidy(answer)
    if stated == expected:
        return True
    stated_number, expected_number = _plain_number(stated), _plain_number(expected)
    if stated_number is not None and expected_number is not None:
        return stated_number == expected_number
    return _worker_says_equal(stated, expected)


def stated_answer(completion: str) -> str | None:
    r"""
    Finds the final answer that a completion states.

    It is what the last `\boxed{}` holds, or follows the last `####` in its line, whichever comes later. A completion
    without either states the last number, or the last formula between `$` signs or the like if that ends later. Marks
    that hold nothing, as in a repeated prompt, do not count.

    Args:
        completion (`str`):
            Completion, without special tokens.

    Returns:
        `str` or `None`: The answer, `None` if there is none, or it is cut off (a box never closed) or longer than any
        answer (500 characters).
    """
    text = completion[-_LONGEST_TEXT:]
    for mark in reversed(list(_MARK.finditer(text))):
        content = _marked(text, mark)
        if content is None:
            return None
        if content:
            return content if len(content) <= _LONGEST_ANSWER else None
    candidates = [(match.end(), match[match.lastindex or 0]) for match in _FORMULA.finditer(text)][-1:]
    candidates += [(match.end(), match[0]) for match in _LAST_NUMBER.finditer(text)][-1:]
    if not candidates:
        return None
    _, content = max(candidates, key=lambda candidate: candidate[0])
    return content.strip() if len(content) <= _LONGEST_ANSWER else None


def last_boxed(text: str) -> str | None:
    r"""
    What the last `\boxed{}` of a worked solution holds.

    Args:
        text (`str`):
            Solution, also in the older spellings `\fbox{5}` and `\boxed 5`.

    Returns:
        `str` or `None`: The answer, `None` if there is none.
    """
    marks = [mark for mark in _MARK.finditer(text) if mark[0].startswith("\\")]
    return _marked(text, marks[-1]) if marks else None


def _marked(text: str, mark: re.Match[str]) -> str | None:
    """What a mark marks, `None` if it is a box that is never closed."""
    if mark[0].startswith("\\") and text[mark.end()] == "{":
        return _braced(text, mark.end())
    line = text[mark.end() :].partition("\n")[0]
    return (line.partition("$")[0] if mark[0].startswith("\\") else line).strip()


def _braced(text: str, start: int) -> str | None:
    """What is between the brace at `start` and the one that closes it. Escaped braces, as of sets, do not count."""
    depth = 0
    for token in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0 and token[0] == "}":
            return text[start + 1 : start + token.start()].strip()
    return None


def _tidy(answer: str) -> str:
    """One spelling of what is written in several ways: signs, separators, currency, emphasis, math delimiters."""
    answer = answer.replace("−", "-").replace("{,}", ",").replace("~", " ")
    answer = re.sub(r"\\[!,]\s*|\\[()\[\]]|\\?\$|[€£¥]", "", answer)
    return re.sub(r"^-\s+", "-", answer.lstrip(" *_").rstrip(" *_."))


def _plain_number(answer: str) -> Fraction | None:
    """The value of a plain number, a unit after it or not, also as the right side of an equation. `None` if not one."""
    match = _NUMBER.fullmatch(answer.rpartition("=")[2].strip())
    return Fraction(match["number"].replace(",", "")) if match else None


@lru_cache(maxsize=1)
def _is_math_verify_installed() -> bool:
    return find_spec("math_verify") is not None


class _Worker:
    """A process that compares answers for this one, and ends if one of them takes too long: then the next is started."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # rewards may be computed in threads
        self._owner: int | None = None
        self._process: subprocess.Popen[str] | None = None

    def ask(self, stated: str, expected: str) -> bool:
        with self._lock:
            process = self._running()
            timer = threading.Timer(_WALL_SECONDS, process.kill)
            timer.start()
            try:
                process.stdin.write(json.dumps([stated, expected, _CPU_SECONDS]) + "\n")
                process.stdin.flush()
                reply = process.stdout.readline()
            finally:
                timer.cancel()
            if not reply:  # it took too long
                process.wait()
            return reply == "true\n"

    def _running(self) -> "subprocess.Popen[str]":
        # A forked process must not talk to the worker of its parent.
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "utf-8"},
            )
            self._owner = os.getpid()
            if self._process.stdout.readline() != "ready\n":
                raise RuntimeError(f"The process that verifies answers did not start; see `python -m {__name__}`.")
        return self._process


_worker = _Worker()


@lru_cache(maxsize=4096)
def _worker_says_equal(stated: str, expected: str) -> bool:
    """[`_equal`], asked of the worker. The rollouts of a group often state the same answer."""
    return _worker.ask(stated, expected)


def _equal(stated: str, expected: str) -> bool:
    """Compare two answers by math-verify, without a timeout."""
    import sympy
    from math_verify import parse, verify
    from math_verify.grader import get_pct_val

    gold = parse(f"\\boxed{{{expected}}}", parsing_timeout=None)
    target = parse(f"\\boxed{{{stated}}}", parsing_timeout=None)
    if not gold or not target:
        return False
    value, gold_value = target[0], gold[0]
    while isinstance(value, sympy.Eq):
        value = value.rhs
    # Of a number no unevaluated expression is the answer, a percentage is (math-verify leaves it as a product).
    if isinstance(gold_value, sympy.Number) and not isinstance(get_pct_val(value, value), sympy.Number):
        return False
    return bool(verify(gold, target, timeout_seconds=None))


def _limit_cpu_time(seconds: float) -> None:
    """End this process after so much processor time from now, 0 for never."""
    if sys.platform != "win32":
        # Without a handler the signal ends the process, in the middle of a multiplication as well.
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)


def _serve() -> None:
    import math_verify  # noqa: F401  # before `ready`: the import takes longer than a comparison

    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        stated, expected, seconds = json.loads(line)
        _limit_cpu_time(seconds)
        try:
            equal = _equal(stated, expected)
        except Exception:  # of sympy, on whatever a model wrote: such an answer is not equal
            equal = False
        _limit_cpu_time(0.0)
        print(json.dumps(equal), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
