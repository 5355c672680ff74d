r"""Is the final answer of a completion correct? One verifier for all tasks whose answers are numbers or mathematics.

`_stated.py` finds the answer, `_spelling.py` brings it into one spelling and reads plain numbers, `_reading.py` takes it
apart, and what is no plain number is compared by `_symbolic.py` (`pip install "trl-cmdp[math]"`). That runs in a process
of its own: what a model writes may keep sympy busy for hours (`\boxed{9^{9^9}!}`), math-verify's own timeout works in
the main thread only, and no signal interrupts a long multiplication.
"""

import json
import numbers
import os
import re
import signal
import subprocess
import sys
import threading
from decimal import Decimal
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from ._reading import Answer, read, without_spaces
from ._spelling import number, one_spelling
from ._stated import last_boxed, stated_answer


__all__ = ["answer_text", "final_answer_reward", "is_right", "last_boxed", "stated_answer"]

# For one comparison, which takes milliseconds. Processor time, so that a busy machine does not change rewards; the other
# is for systems that cannot limit it (Windows).
_CPU_SECONDS = 5.0
_WALL_SECONDS = 300.0
_MEMORY_BYTES = 4 * 2**30  # an integer of a hostile answer would take all there is within the time


def final_answer_reward(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    """
    Reward function for TRL trainers: is the final answer correct, whatever the reasoning says?

    Args:
        completions (`list[str]` or `list[list[dict[str, str]]]`):
            Completions as text, or as messages, of which the last one counts.
        answer (`list[str]`):
            Correct final answers, the column `answer` of the task. Numbers are taken too.
        **kwargs:
            The other columns and arguments that TRL passes, unused.

    Returns:
        `list[float]`: 1.0 where [`is_right`], else 0.0.

    Raises:
        ImportError: If math-verify is not installed.
        TypeError: If a correct answer is neither text nor a number.
        ValueError: If a correct answer is empty or not finite.
    """
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [float(is_right(text or "", expected)) for text, expected in zip(texts, answer, strict=True)]


def is_right(completion: str, answer: str | float) -> bool:
    r"""
    Tells whether the final answer that a completion states is correct.

    Where the answer is a number, a number must be stated: `\boxed{48 + 24}` leaves the work to the verifier and is
    wrong. Units, currency signs and thousands separators do not matter; 25% is correct for 25 as well as for 0.25. What
    cannot be compared within 5 seconds of processor time is wrong.

    Args:
        completion (`str`):
            Completion, without special tokens.
        answer (`str` or number):
            Correct final answer, alone: `"42"`, `"\\frac{3}{4}"`, see [`answer_text`].

    Returns:
        `bool`: Whether the answer that [`stated_answer`] finds equals `answer`.

    Raises:
        ImportError: If math-verify is not installed.
        TypeError: If `answer` is neither text nor a number.
        ValueError: If `answer` is empty or not finite.
    """
    # Asked for even where plain numbers need none of it: training must not fail at the first fraction.
    if not _is_math_verify_installed():
        raise ImportError('Answers are verified by math-verify: pip install "trl-cmdp[math]"')
    stated = stated_answer(completion)
    if stated is None:
        return False
    stated, expected = one_spelling(stated), one_spelling(answer_text(answer))
    return stated != "" and _same(stated, expected)


def answer_text(answer: Any) -> str:
    """
    Text of a correct answer that is text or a number.

    Args:
        answer (`str`, `bool`, `int`, `float`, `decimal.Decimal` or `fractions.Fraction`):
            Correct answer. NumPy's numbers are taken too.

    Returns:
        `str`: The text, of a number without an exponent. A `float` has 15 digits: 0.1 + 0.2 is 0.3.

    Raises:
        TypeError: If it is something else, which no completion can state.
        ValueError: If it is empty or not finite.
    """
    if isinstance(answer, str):
        text = answer.strip()
    elif isinstance(answer, numbers.Rational):
        text = str(answer)
    elif isinstance(answer, numbers.Real | Decimal):
        # What a narrower type of NumPy prints is its shortest decimal, 0.1 of float32.
        decimal = Decimal(f"{answer:.15g}" if isinstance(answer, float) and answer % 1 else str(answer))
        text = f"{decimal:f}" if decimal.is_finite() else ""
    else:
        raise TypeError(f"The correct answer must be text or a number, got {type(answer).__name__}: {answer!r:.80}")
    if not text:
        raise ValueError(f"The correct answer must be text that is not empty, or a finite number, got {answer!r}")
    return text


def _same(stated: str, expected: str, in_list: bool = False) -> bool:
    """Whether two answers in one spelling are the same."""
    if without_spaces(stated) == without_spaces(expected):
        return True
    if "…" in stated + expected:  # what it stands for is not known
        return stated.replace(" ", "") == expected.replace(" ", "")
    ours, theirs = read(stated), read(expected)
    if not (_has_value(ours) and _has_value(theirs)):  # an equation or inequality, which may also describe a set
        return number(expected) is None and _worker_says_equal(
            *(answer.value if answer.brackets else answer.text for answer in (ours, theirs))
        )
    if in_list and ours.name and theirs.name and without_spaces(ours.name) != without_spaces(theirs.name):
        return False
    if len(ours.parts) != len(theirs.parts) or (ours.brackets and not theirs.brackets and len(theirs.parts) == 1):
        return False
    if not ours.brackets and not theirs.brackets and len(ours.parts) == 1:
        return _values_agree(ours.parts[0], theirs.parts[0]) or (
            bool(ours.name and theirs.name and number(theirs.value) is None) and _worker_says_equal(stated, expected)
        )
    if ours.in_any_order and theirs.in_any_order:
        return _in_any_order(ours.parts, theirs.parts)
    return (ours.brackets == theirs.brackets or {ours.brackets, theirs.brackets} == {"", "()"}) and all(
        _same(part, other, in_list=True) for part, other in zip(ours.parts, theirs.parts, strict=True)
    )


def _has_value(answer: Answer) -> bool:
    """Whether an answer states a value: left of its last `=` are only names and what is equal to it."""
    return not answer.is_relation and all(
        _same(other, answer.value) or _worker_says_equal(other, answer.value) for other in answer.equals
    )


def _in_any_order(parts: list[str], expected_parts: list[str]) -> bool:
    left = list(parts)
    for expected in expected_parts:
        match = next((part for part in left if _same(part, expected, in_list=True)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _values_agree(stated: str, expected: str) -> bool:
    value, expected_value = number(stated), number(expected)
    if value is not None and expected_value is not None:
        return expected_value.equals(value)
    bases = [re.fullmatch(r"(?=\w*\d\w*_)([\dA-F]+)_\{?(\d+)\}?", answer) for answer in (stated, expected)]
    if any(bases):
        return _in_same_base(stated, expected, *bases)
    if expected_value is not None and "^" not in expected:
        return False  # of a number no expression is the answer
    if all(re.fullmatch(r"\d\d?:\d\d", answer) for answer in (stated, expected)):
        return stated.lstrip("0") == expected.lstrip("0")  # times, no ratios
    words = re.fullmatch("[A-Za-z ]+", expected)
    if words and (len(expected) > 3 or stated.casefold() == expected.casefold()):  # up to three may be a product
        return stated.casefold() == expected.casefold()
    return _worker_says_equal(stated, expected)


def _in_same_base(stated: str, expected: str, base: re.Match[str] | None, expected_base: re.Match[str] | None) -> bool:
    """Whether the digits and the base (25_8) are the same. A stated answer may leave out the base that is expected."""
    if base is None or expected_base is None:
        return stated == expected_base[1] if expected_base else bool(base and base[2] == "10" and base[1] == expected)
    return base.groups() == expected_base.groups()


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
    """[`_symbolic.equal`], asked of the worker. The rollouts of a group often state the same answer."""
    return _worker.ask(stated, expected)


def _limit_cpu_time(seconds: float) -> None:
    """End this process after so much processor time from now, 0 for never."""
    if sys.platform != "win32":
        # Without a handler the signal ends the process, in the middle of a multiplication as well.
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)


def _limit_memory() -> None:
    if sys.platform != "win32":
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_AS)
        allowed = _MEMORY_BYTES if most == resource.RLIM_INFINITY else min(_MEMORY_BYTES, most)
        resource.setrlimit(resource.RLIMIT_AS, (allowed, most))


def _serve() -> None:
    from ._symbolic import equal  # before `ready`: the import takes longer than a comparison

    _limit_memory()
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        stated, expected, seconds = json.loads(line)
        _limit_cpu_time(seconds)
        try:
            answer = equal(stated, expected)
        except Exception:  # of sympy, on whatever a model wrote: such an answer is not equal
            answer = False
        _limit_cpu_time(0.0)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
