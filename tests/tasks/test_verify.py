"""The verifier of final answers: what counts as the stated answer, what equals what, and what a model may try."""

import os
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_cmdp.tasks import _verify
from trl_cmdp.tasks._verify import final_answer_reward, is_right, last_boxed, stated_answer


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
        assert stated is None or (stated and stated in text)


class TestIsRight:
    @pytest.mark.parametrize(
        ("stated", "answer"),
        [
            ("42", "42"),
            ("42.", "42"),
            ("42.00", "42"),
            ("042", "42"),
            ("1,234", "1234"),
            ("1{,}234", "1234"),
            (r"1,\!234", "1,234"),
            (r"11,\! 111,\! 100", "11111100"),
            ("$42", "42"),
            (r"\$42", "42"),
            ("-$42", "-42"),
            ("−42", "-42"),
            ("**42**", "42"),
            ("42 apples", "42"),
            (r"42\text{ square inches}", "42"),
            (r"42^\circ", "42"),
            (r"42^{\circ}", "42"),
            ("x = 42", "42"),
            ("6 * 7 = 42", "42"),
            ("25%", "25"),
            (r"25\%", "0.25"),
            ("0.25", r"25\%"),
            ("1/2", "0.5"),
            (r"\frac{1}{2}", "0.5"),
            (r"\dfrac12", r"\frac{1}{2}"),
            (r"\frac{2}{4}", "1/2"),
            ("0.5", r"\frac{1}{2}"),
            (r"3\sqrt{2}", r"\sqrt{18}"),
            ("(x+1)^2", "x^2+2x+1"),
            ("(1, 2)", r"\left(1,2\right)"),
            ("2, 1", "1, 2"),
            (r"\text{Evelyn}", r"\text{Evelyn}"),
            ("B", r"\text{(B)}"),
        ],
    )
    def test_equal(self, stated, answer):
        assert is_right(rf"So it is \boxed{{{stated}}}.", answer)

    @pytest.mark.parametrize(
        ("stated", "answer"),
        [
            ("43", "42"),
            ("-42", "42"),
            ("4.2", "42"),
            ("42.001", "42"),
            ("42 and 43", "42"),
            ("42, 43", "42"),
            ("42 or 43", "42"),
            (r"\{42, 43\}", "42"),
            (r"\pm 42", "42"),
            ("42x", "42"),
            ("48 + 24", "72"),  # left to the verifier
            (r"6 \cdot 7", "42"),
            ("10^3", "1000"),
            (r"\sqrt{4}", "2"),
            ("x = 40 + 2", "42"),
            (r"\frac{1}{3}", r"\frac{1}{2}"),
            ("0.3", r"\frac{1}{3}"),
            ("(2, 1)", "(1, 2)"),
            ("[1, 2)", "[1, 2]"),
            ("x+1", "x+2"),
            (r"\text{Evelyn}", r"\text{Carla}"),
            ("A", r"\text{(B)}"),
            (r"\frac{", "42"),
            ("}{", "42"),
        ],
    )
    def test_not_equal(self, stated, answer):
        assert not is_right(rf"So it is \boxed{{{stated}}}.", answer)

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

    @given(st.integers(-(10**9), 10**9))
    def test_numbers_of_any_spelling(self, number):
        assert is_right(f"#### {number:,}", str(number))
        assert is_right(f"so {number}.0 in all", f"{number:,}")
        assert not is_right(f"#### {number + 1}", str(number))


class TestWhatAModelMayTry:
    @pytest.mark.parametrize("limit", ["_CPU_SECONDS", "_WALL_SECONDS"])
    def test_what_takes_too_long_is_wrong_and_the_next_answer_is_verified(self, limit, monkeypatch):
        _verify._worker_says_equal.cache_clear()
        assert is_right(r"\boxed{\frac{2}{4}}", r"\frac{1}{2}")
        process = _verify._worker._process
        with monkeypatch.context() as patch:
            patch.setattr(_verify, limit, 0.2)
            assert not is_right(r"\boxed{" + "(" * 400 + "}", r"\frac{1}{2}")  # hours of backtracking
        assert process.poll() is not None
        _verify._worker_says_equal.cache_clear()
        assert is_right(r"\boxed{\frac{2}{4}}", r"\frac{1}{2}")

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
            threading.Thread(target=lambda n=n: results.append(is_right(rf"\boxed{{\frac{{{n}}}{{{2 * n}}}}}", "1/2")))
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
            "import os\nfrom trl_cmdp.tasks import _verify\n"
            "assert _verify.is_right(r'\\boxed{\\frac{2}{4}}', '1/2')\n"
            "mine = _verify._worker._process.pid\n"
            "child = os.fork()\n"
            "if child == 0:\n"
            "    right = _verify.is_right(r'\\boxed{\\frac{3}{6}}', '1/2')\n"
            "    os._exit(0 if right and _verify._worker._process.pid != mine else 1)\n"
            "assert os.waitpid(child, 0)[1] == 0\n"
            "assert _verify.is_right(r'\\boxed{\\frac{4}{8}}', '1/2') and _verify._worker._process.pid == mine\n"
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
