"""The verifier of final answers: what counts as the stated answer, what equals what, and what a model may try."""

import math
import os
import re
import subprocess
import sys
import threading
from datetime import date
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_cmdp.tasks import _verify
from trl_cmdp.tasks._verify import answer_text, final_answer_reward, is_right, last_boxed, stated_answer


def read_answers():
    """Line number, gold, answer and verdict of each line of `answers.txt`, by heading."""
    sections = {}
    for number, line in enumerate(Path(__file__).with_name("answers.txt").read_text("utf-8").splitlines(), 1):
        if line.startswith("## "):
            section = sections.setdefault(line.removeprefix("## "), [])
        elif line and not line.startswith("# "):
            line = re.sub(r"<U\+([0-9A-F]{4})>", lambda match: chr(int(match[1], 16)), line)
            gold, answer, verdict = line.split(" | ")
            section.append((number, gold, answer, {"correct": True, "wrong": False}[verdict]))
    return sections


ANSWERS = read_answers()


class TestStatedAnswer:
    @pytest.mark.parametrize(
        ("completion", "stated"),
        [
            ("so 5.\n#### 42", "42"),
            ("####42", "42"),
            ("#### 42\nQ: next", "42"),
            ("#### 41\n#### 42", "42"),
            (r"Thus \boxed{42}.", "42"),
            (r"\boxed{1} then \boxed{42}", "42"),
            (r"\boxed{42} #### 41", "41"),
            ("#### 41\n" + r"\boxed{42}", "42"),
            (r"\boxed{\frac{1}{\sqrt{2}}} done", r"\frac{1}{\sqrt{2}}"),
            (r"$\boxed{\left\{1, 2\right\}}$", r"\left\{1, 2\right\}"),
            (r"$\boxed{\begin{cases} 1 \\ 2 \end{cases}}$", r"\begin{cases} 1 \\ 2 \end{cases}"),
            (r"\fbox{42}", "42"),
            (r"is $\boxed 42$ then", "42"),
            (r"Put it within \boxed{}. So \boxed{42}, in \boxed{}.", "42"),  # marks that hold nothing
            ("End with '#### ' and the answer. It is 42.", "42"),
            ("#### Step 2: add\nThe sum is 42.", "42"),  # a heading
            ("It is 5, then 42.", "42"),
            ("The answer is 42. ", "42"),
            ("It costs $5 and earns $42.", "$42"),
            (r"so $x = \frac{3}{4}$.", r"x = \frac{3}{4}"),
            (r"so \(x = 42\).", "x = 42"),
            (r"so \[x = 42\]", "x = 42"),
            ("$x = 3$, so 42", "42"),
            (r"It is $\$32,\!348$.", r"\$32,\!348"),
            ("about 1,234.50 in all", "1,234.50"),
            ("from 12-5", "5"),
            ("it was -5 degrees", "-5"),
            ("three quarters, 3/4", "3/4"),
            ("a share of 25%.", "25%"),
            ("It is 42 million.", "42 million"),
            (r"It is \boxed{42}\text{ million}.", "42 million"),
            ("It is 6.63 × 10⁻³⁴ J.", "6.63 × 10⁻³⁴"),
            ("It is 2^41.", "2^41"),
            ("It is 3 1/2 cups.", "3 1/2"),
            ("It is 1\u202f234 m.", "1\u202f234"),
            ("#### ₹500", "₹500"),
            ("", None),
            ("no number", None),
            (r"\boxed{}", None),
            (r"5, so \boxed{4", None),  # cut off: the rest may be 42
            (r"\boxed{" + "1" * 501 + "}", None),
            (r"\boxed{42}" + " " * 20_000, None),  # out of what is read
        ],
    )
    def test_hand_cases(self, completion, stated):
        assert stated_answer(completion) == stated

    @given(st.text(r"\boxed{}#$()[]1,./- " + "\n", max_size=60))
    def test_any_text_has_an_answer_or_none(self, text):
        stated = stated_answer(text)
        assert stated is None or (stated and stated.removeprefix("-") in text)


def spellings(value):
    """A number as models write it."""
    sign, plain = "-" if value < 0 else "", f"{abs(value):f}"
    whole, _, decimals = plain.partition(".")
    grouped = f"{int(whole):,}" + ("." + decimals if decimals else "")
    mantissa, _, exponent = f"{abs(value):e}".lower().partition("e")
    return [
        f"{sign}{plain}",
        f"{sign}{plain} apples",
        f"{sign}\\${plain}",
        f"{sign}₹{grouped}",
        f"{sign}{grouped}\\text{{ cm}}^2",
        f"{sign}" + grouped.replace(",", "{,}"),
        f"{sign}" + grouped.replace(",", "\\,"),
        f"{sign}" + grouped.replace(",", "\u202f"),
        f"\\text{{{sign}{plain}}}",
        f"\\mathbf{{{sign}{{{plain}}}}}",
        f"x = {sign}{plain}",
        f"{sign}{mantissa}e{exponent}",
        f"{sign}{mantissa} \\times 10^{{{int(exponent)}}}",
        f"{sign}{mantissa}·10^({int(exponent)})",
        f"\\frac{{{Fraction(value).numerator}}}{{{Fraction(value).denominator}}}",
        f"{value * 100:f}\\%",
    ]


VALUES = st.builds(
    lambda digits, exponent: Decimal(digits).scaleb(exponent), st.integers(-(10**7), 10**7), st.integers(-30, 6)
).filter(bool)


class TestIsRight:
    @pytest.mark.parametrize("heading", ANSWERS)
    def test_spellings(self, heading):
        judged_wrong = [
            f"line {number}: {gold} | {answer}"
            for number, gold, answer, correct in ANSWERS[heading]
            if is_right(answer if "whole completions" in heading else rf"So \boxed{{{answer}}}.", gold) is not correct
        ]
        assert not judged_wrong

    @given(VALUES, st.data())
    def test_a_number_is_itself_in_any_spelling(self, value, data):
        pairs = st.tuples(st.sampled_from(spellings(value)), st.sampled_from(spellings(value)))
        stated, expected = data.draw(pairs)
        assert is_right(rf"\boxed{{{stated}}}", expected)

    @given(VALUES, st.decimals("1e-5", 9, places=6), st.sampled_from([1, -1]), st.data())
    def test_other_numbers_are_wrong_however_small(self, value, difference, sign, data):
        other = value * (1 + sign * difference)
        stated, expected = (
            data.draw(st.sampled_from([text for text in spellings(number) if "%" not in text]))
            for number in (other, value)
        )
        assert not is_right(rf"\boxed{{{stated}}}", expected)

    @settings(max_examples=15)
    @given(st.integers(2, 60), st.integers(1, 9), st.integers(1, 9))
    def test_irrational_values_however_small(self, exponent, a, b):
        expected = rf"\frac{{{a}\sqrt{{2}}}}{{10^{{{exponent}}}}}"
        assert is_right(rf"\boxed{{{b}\sqrt{{2}} \cdot 10^{{-{exponent}}}}}", expected) is (a == b)
        assert is_right(rf"\boxed{{{a * 2**0.5:.9f} \times 10^{{-{exponent}}}}}", expected)

    @given(st.text(r"42\{}()[]$,;.^_%/-+*'°½²− akdsx", max_size=40))
    def test_any_text_is_judged(self, text):
        assert is_right(rf"\boxed{{{text}}}", "42") in (True, False)
        assert not is_right(rf"\boxed{{{text}}}", "31")  # which cannot be written with these characters

    def test_no_answer_is_wrong(self):
        assert not is_right("", "42")
        assert not is_right("I do not know.", "42")

    def test_only_the_last_number_counts(self):
        assert not is_right("It is 42. No, 43.", "42")
        assert not is_right("42 is right.\n#### 43", "42")

    def test_a_repeated_prompt_is_no_answer(self):
        prompt = "Tom has 42 eggs and buys 3. How many?\nPlease put your final answer within " + r"\boxed{}."
        assert not is_right(prompt, "42")
        assert is_right(prompt + " He has 45.", "45")


class TestAnswerText:
    @pytest.mark.parametrize(
        ("answer", "text"),
        [
            (" 42 ", "42"),
            (42, "42"),
            (-(10**30), "-1" + "0" * 30),
            (True, "True"),
            (0.5, "0.5"),
            (3.0, "3.0"),
            (1e-07, "0.0000001"),
            (1e22, "1" + "0" * 22),
            (0.1 + 0.2, "0.3"),
            (9007199254740991.0, "9007199254740991.0"),
            (Decimal("1E+3"), "1000"),
            (Fraction(3, 4), "3/4"),
            (np.int64(42), "42"),
            (np.float32(0.1), "0.1"),
            (np.float64(0.1), "0.1"),
        ],
    )
    def test_numbers_and_text(self, answer, text):
        assert answer_text(answer) == text
        assert is_right(rf"\boxed{{{text}}}", answer)

    @pytest.mark.parametrize("answer", [None, ["42"], {"ground_truth": "42"}, b"42", date(2024, 1, 1), ("42",)])
    def test_what_is_neither_is_refused(self, answer):
        with pytest.raises(TypeError, match="must be text or a number, got"):
            answer_text(answer)

    @pytest.mark.parametrize("answer", ["", "  ", math.nan, math.inf, Decimal("nan")])
    def test_what_no_completion_can_state_is_refused(self, answer):
        with pytest.raises(ValueError, match="not empty, or a finite number"):
            answer_text(answer)


class TestWhatAModelMayTry:
    @pytest.mark.parametrize(
        ("limit", "other", "depth"), [("_CPU_SECONDS", "_WALL_SECONDS", 400), ("_WALL_SECONDS", "_CPU_SECONDS", 401)]
    )
    def test_what_takes_too_long_is_wrong_and_the_next_answer_is_verified(self, limit, other, depth, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(_verify, limit, 0.2)
            patch.setattr(_verify, other, 10_000.0)
            assert not is_right(r"\boxed{" + "(" * depth + "}", r"\sqrt{2}")  # hours of backtracking
        assert is_right(rf"\boxed{{\frac{{\sqrt{{{2 * depth**2}}}}}{{{depth}}}}}", r"\sqrt{2}")

    @pytest.mark.parametrize(
        "answer", ["9^{9^{9^9}}!", "2^{10^{11}}", "10^{10^{10}} + 1", "(10^9)!", r"1.5 \times 10^{99999999}"]
    )
    def test_giants_are_wrong(self, answer, monkeypatch):
        monkeypatch.setattr(_verify, "_CPU_SECONDS", 0.3)
        assert not is_right(rf"\boxed{{{answer}}}", "2^{100}")
        assert not is_right(rf"\boxed{{{answer}}}", "42")

    @pytest.mark.parametrize(
        "text",
        [
            r"\boxed{" * 3000,
            r"\boxed{}" * 3000,
            r"\(" * 10_000,
            "$$a" * 7000,
            "#### " * 4000,
            "1" * 100_000,
            "#### " + "1" * 5000,
            "1," * 10_000,
            r"\boxed{\input{/etc/passwd}}",
            r"\boxed{__import__('os').abort()}",
            "\\boxed{a\nb\u2028c\0}",
            "\ud800 \\boxed{\ud800}",
        ],
    )
    def test_hostile_text_is_wrong(self, text):
        assert not is_right(text, r"\frac{1}{2}")
        assert is_right(r"\boxed{\frac{7}{14}}", r"\frac{1}{2}")  # still at work

    def test_in_a_thread(self):
        results = []
        threads = [
            threading.Thread(
                target=lambda n=n: results.append(is_right(rf"\boxed{{\sqrt{{{2 * n**2}}}}}", rf"{n}\sqrt{{2}}"))
            )
            for n in range(20, 28)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [True] * 8

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_a_forked_process_has_a_worker_of_its_own(self):
        script = (
            "import os\nfrom trl_cmdp.tasks._verify import is_right\n"
            "def judge(numbers):\n"
            "    texts = [(rf'\\boxed{{\\sqrt{{{2 * n**2 + n % 2}}}}}', rf'{n}\\sqrt{{2}}', n % 2 == 0) for n in numbers]\n"
            "    return all(is_right(text, gold) is right for text, gold, right in texts)\n"
            "assert judge([2])\n"
            "child = os.fork()\n"
            "if child == 0:\n"
            "    os._exit(not judge(range(3, 20)))\n"
            "assert judge(range(4, 20))\n"
            "assert os.waitpid(child, 0)[1] == 0\n"
        )
        subprocess.run([sys.executable, "-c", script], check=True)


class TestFinalAnswerReward:
    def test_text_and_messages(self):
        messages = [[{"role": "assistant", "content": "#### 42"}], [{"role": "assistant", "content": "#### 41"}]]
        assert final_answer_reward(["#### 42", "#### 41"], ["42", "42"]) == [1.0, 0.0]
        assert final_answer_reward(messages, ["42", "42"]) == [1.0, 0.0]

    def test_the_last_message_counts(self):
        turns = [
            {"role": "assistant", "content": "#### 42"},
            {"role": "tool", "content": "42"},
            {"role": "assistant", "content": "#### 41"},
        ]
        assert final_answer_reward(
            [turns, turns[:1], [{"role": "assistant", "content": None}]], ["41", "42", "42"]
        ) == [
            1.0,
            1.0,
            0.0,
        ]

    def test_numbers_as_correct_answers(self):
        assert final_answer_reward(["#### 42", "0.0000001", "#### 3"], [42, 1e-07, 3.5]) == [1.0, 1.0, 0.0]
        with pytest.raises(TypeError, match="must be text or a number, got NoneType: None"):
            final_answer_reward(["#### 42"], [None])

    def test_takes_what_trl_passes(self):
        assert final_answer_reward(
            prompts=["p"], completions=["#### 42"], completion_ids=[[1]], answer=["42"], difficulty=["2"]
        ) == [1.0]

    def test_without_math_verify(self, monkeypatch):
        monkeypatch.setattr(_verify, "_is_math_verify_installed", lambda: False)
        with pytest.raises(ImportError, match=r'pip install "trl-cmdp\[math\]"'):
            final_answer_reward(["#### 42"], ["42"])


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"so $\boxed{1}$ and $\boxed{\frac{a}{b}}$.", r"\frac{a}{b}"),
        (r"so $\boxed 5$ and that is it", "5"),
        (r"$\fbox{5}$ #### 6", "5"),
        ("#### 6", None),
        (r"\boxed{5", None),
    ],
)
def test_last_boxed(solution, answer):
    assert last_boxed(solution) == answer
