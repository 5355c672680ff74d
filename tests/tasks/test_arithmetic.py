import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_cmdp.tasks.arithmetic import (
    demo_model_path,
    final_answer_reward,
    load_problems,
    make_tokenizer,
    valid_steps,
    worked_solution,
)


PROMPT = "7+5+9+3+8="
WORKED = "7+5=12,12+9=21,21+3=24,24+8=32#32"

prompts = st.lists(st.integers(1, 9), min_size=2, max_size=6).map(lambda digits: "+".join(map(str, digits)) + "=")


class TestLoadProblems:
    def test_columns_and_answers(self):
        problems = load_problems(50, "train", seed=0)
        assert problems.column_names == ["prompt", "answer"]
        for row in problems:
            digits = row["prompt"].removesuffix("=").split("+")
            assert len(digits) == 5
            assert all(digit in "123456789" for digit in digits)
            assert row["answer"] == str(sum(map(int, digits)))

    def test_splits_are_disjoint_and_cover_every_problem(self):
        train = load_problems(47_071, "train", seed=0)["prompt"]
        test = load_problems(11_978, "test", seed=0)["prompt"]
        assert len({*train, *test}) == len(train) + len(test) == 9**5

    def test_split_is_pinned(self):
        # Changing these would put problems that the demo models were trained on into the test split.
        test = sorted(load_problems(11_978, "test", seed=0)["prompt"])
        assert test[:3] == ["1+1+1+1+2=", "1+1+1+1+6=", "1+1+1+1+9="]

    def test_no_duplicates_while_the_split_lasts(self):
        for split in ("train", "test"):
            problems = load_problems(10_000, split, seed=3)["prompt"]
            assert len(set(problems)) == 10_000

    def test_more_problems_than_the_split_holds(self):
        problems = load_problems(12_000, "test", seed=0)["prompt"]
        assert len(problems) == 12_000
        assert len(set(problems[:11_978])) == 11_978

    def test_seed_decides_the_order(self):
        first = load_problems(20, "test", seed=1)["prompt"]
        assert load_problems(20, "test", seed=1)["prompt"] == first
        assert load_problems(100, "test", seed=1)["prompt"][:20] == first
        assert load_problems(20, "test", seed=2)["prompt"] != first

    def test_same_problems_in_another_process(self):
        code = (
            "import json; from trl_cmdp.tasks.arithmetic import load_problems;"
            "print(json.dumps(list(load_problems(20, 'test', 1)['prompt'])))"
        )
        output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert json.loads(output) == list(load_problems(20, "test", seed=1)["prompt"])

    @pytest.mark.parametrize(
        ("n", "split", "seed", "message"),
        [
            (10, "validation", 0, "`split` must be"),
            (0, "train", 0, "`n` must be"),
            (-1, "test", 0, "`n` must be"),
            (2.5, "train", 0, "`n` must be"),
            (10, "train", None, "`seed` must be"),
        ],
    )
    def test_bad_arguments(self, n, split, seed, message):
        with pytest.raises(ValueError, match=message):
            load_problems(n, split, seed)


class TestFinalAnswerReward:
    @pytest.mark.parametrize(
        ("completion", "reward"),
        [
            (WORKED, 1.0),
            ("#32", 1.0),
            ("7+5=99#32", 1.0),
            ("#31#32", 1.0),
            ("#32#31", 0.0),
            ("#31", 0.0),
            ("#032", 0.0),
            ("#32,", 0.0),
            ("#32 ", 0.0),
            ("#3", 0.0),
            ("#", 0.0),
            ("32", 0.0),
            ("", 0.0),
        ],
    )
    def test_hand_cases(self, completion, reward):
        assert final_answer_reward([completion], ["32"]) == [reward]

    def test_answers_that_are_numbers(self):
        assert final_answer_reward(["#32", "#33"], [32, 32]) == [1.0, 0.0]
        with pytest.raises(TypeError, match="must be text or a number, got NoneType"):
            final_answer_reward(["#32"], [None])

    def test_takes_what_trl_passes(self):
        rewards = final_answer_reward(
            prompts=[PROMPT] * 2, completions=["#32", "#33"], answer=["32", "32"], completion_ids=[[1], [2]]
        )
        assert rewards == [1.0, 0.0]


class TestValidSteps:
    def test_worked_solution(self):
        assert worked_solution(PROMPT) == WORKED
        assert worked_solution("1+9=") == "1+9=10#10"
        assert valid_steps(PROMPT, WORKED)

    @pytest.mark.parametrize(
        "completion",
        [
            pytest.param("#32", id="no steps"),
            pytest.param("", id="empty"),
            pytest.param("7+5=13,12+9=21,21+3=24,24+8=32#32", id="corrupted result"),
            pytest.param("7+5=12,12+8=20,21+3=24,24+8=32#32", id="corrupted operand"),
            pytest.param("7+5=13,13+9=22,22+3=25,25+8=33#32", id="consistent from a wrong result"),
            pytest.param("7+5=13,13+9=22,22+3=25,25+8=33#33", id="consistent up to a wrong answer"),
            pytest.param("7+5=12,12+9=21,21+3=24,24+8=32#33", id="wrong answer"),
            pytest.param("7+5=12,12+9=21,21+3=24#32", id="last step skipped"),
            pytest.param("12+9=21,21+3=24,24+8=32#32", id="first step skipped"),
            pytest.param("7+5=12,12+12=24,24+8=32#32", id="two steps in one"),
            pytest.param("12+9=21,7+5=12,21+3=24,24+8=32#32", id="steps reordered"),
            pytest.param("7+9=16,16+5=21,21+3=24,24+8=32#32", id="operands reordered"),
            pytest.param("5+7=12,12+9=21,21+3=24,24+8=32#32", id="sides exchanged"),
            pytest.param("7+5=12,12+9=21,21+3=24,24+8=32,32+0=32#32", id="extra step"),
            pytest.param("7+5=12,7+5=12,12+9=21,21+3=24,24+8=32#32", id="step repeated"),
            pytest.param(WORKED + "#32", id="mark repeated"),
            pytest.param("#32" + WORKED, id="answer first"),
            pytest.param(WORKED + ",", id="text after"),
            pytest.param(WORKED + "\n", id="newline after"),
            pytest.param(" " + WORKED, id="text before"),
            pytest.param(WORKED.replace("=12", "=012"), id="leading zero"),
            pytest.param(WORKED.replace("7", "\N{FULLWIDTH DIGIT SEVEN}"), id="foreign digit"),
            pytest.param(WORKED.removesuffix("#32"), id="no answer"),
            pytest.param(PROMPT + WORKED, id="prompt repeated"),
        ],
    )
    def test_rejects(self, completion):
        assert not valid_steps(PROMPT, completion)

    @given(prompts)
    def test_worked_solution_is_always_valid_and_right(self, prompt):
        completion = worked_solution(prompt)
        assert valid_steps(prompt, completion)
        total = sum(map(int, prompt.removesuffix("=").split("+")))
        assert final_answer_reward([completion], [str(total)]) == [1.0]
        # Checked without the writer: each step holds, takes one more digit, and goes on from the one before.
        steps, stated = completion.split("#")
        digits = prompt.removesuffix("=").split("+")
        running = digits[0]
        for step, digit in zip(steps.split(","), digits[1:], strict=True):
            left, result = step.split("=")
            assert left == f"{running}+{digit}"
            assert int(result) == int(running) + int(digit)
            running = result
        assert stated == running

    @given(prompts, st.data())
    def test_any_corrupted_digit_is_not_valid(self, prompt, data):
        completion = worked_solution(prompt)
        position = data.draw(st.sampled_from([i for i, c in enumerate(completion) if c.isdigit()]))
        digit = data.draw(st.sampled_from([d for d in "0123456789" if d != completion[position]]))
        assert not valid_steps(prompt, completion[:position] + digit + completion[position + 1 :])

    @pytest.mark.parametrize("prompt", ["", "7+5", "7=", "7+0=", "12+5=", "7+5=12", "7-5=", "7+5=\n"])
    def test_malformed_prompt(self, prompt):
        with pytest.raises(ValueError, match="Not a sum"):
            worked_solution(prompt)


class TestTokenizer:
    def test_one_token_per_character_and_nothing_added(self):
        tokenizer = make_tokenizer()
        ids = tokenizer(PROMPT + WORKED)["input_ids"]
        assert len(ids) == len(PROMPT + WORKED)
        assert tokenizer.unk_token_id not in ids

    def test_decode_gives_the_exact_text(self):
        tokenizer = make_tokenizer()
        ids = tokenizer("<pad><pad>" + WORKED + "<eos>")["input_ids"]
        assert len(ids) == len(WORKED) + 3
        assert tokenizer.decode(ids, skip_special_tokens=True) == WORKED

    @given(st.text("0123456789+=,#"))
    def test_round_trip(self, text):
        tokenizer = make_tokenizer()
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text

    def test_pads_on_the_left(self):
        tokenizer = make_tokenizer()
        batch = tokenizer(["1+2=", "#3"], padding=True)
        assert batch["input_ids"][1][:2] == [tokenizer.pad_token_id] * 2
        assert batch["attention_mask"][1] == [0, 0, 1, 1]


@pytest.mark.parametrize("name", ["teacher", "student"])
class TestDemoModels:
    def test_loads_with_its_tokenizer(self, name):
        model = AutoModelForCausalLM.from_pretrained(demo_model_path(name))
        tokenizer = AutoTokenizer.from_pretrained(demo_model_path(name))
        reference = make_tokenizer()
        assert tokenizer.get_vocab() == reference.get_vocab()
        assert tokenizer.padding_side == "left"
        assert tokenizer(PROMPT)["input_ids"] == reference(PROMPT)["input_ids"]
        assert tokenizer.decode(tokenizer(WORKED + "<eos>")["input_ids"], skip_special_tokens=True) == WORKED
        assert model.config.vocab_size == len(tokenizer)
        for config in (model.config, model.generation_config):
            assert config.eos_token_id == tokenizer.eos_token_id
            assert config.pad_token_id == tokenizer.pad_token_id

    def test_answers_held_out_problems(self, name):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(demo_model_path(name))
        tokenizer = AutoTokenizer.from_pretrained(demo_model_path(name))
        problems = load_problems(256, "test", seed=0)
        inputs = tokenizer(list(problems["prompt"]), return_tensors="pt")
        sequences = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=36)
        completions = tokenizer.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right = final_answer_reward(completions, list(problems["answer"]))
        valid = [valid_steps(*pair) for pair in zip(problems["prompt"], completions, strict=True)]
        # Four standard deviations of a sample of 256 around the rates that the models were made for.
        assert 0.81 <= sum(right) / 256 <= 0.97
        expected = {"teacher": 0.895, "student": 0.30}[name]
        assert abs(sum(valid) / 256 - expected) <= 0.12


def test_demo_models_are_small():
    files = [file for name in ("teacher", "student") for file in Path(demo_model_path(name)).iterdir()]
    assert sum(file.stat().st_size for file in files) < 4e6


def test_unknown_demo_model():
    with pytest.raises(ValueError, match="`name` must be"):
        demo_model_path("oracle")
