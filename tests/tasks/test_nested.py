import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_cmdp.tasks.nested import (
    MAX_COMPLETION_LENGTH,
    demo_model_path,
    final_answer_reward,
    load_problems,
    make_tokenizer,
    valid_steps,
    worked_solution,
)


PROMPT = "(3+4)*(2+5)="
WORKED = "3+4=7,2+5=7,7*7=49#49"
NUM_TRAIN, NUM_TEST = 109_887, 28_015

digits = st.sampled_from("123456789")
operators = st.sampled_from("+*")
expressions = st.recursive(
    st.tuples(digits, operators, digits),
    lambda pairs: st.tuples(pairs | digits, operators, pairs | digits),
    max_leaves=3,
)


def write(expression):
    """Text of nested tuples, every pair but the outermost one in parentheses."""
    sides = [f"({write(side)})" if isinstance(side, tuple) else side for side in (expression[0], expression[2])]
    return expression[1].join(sides)


prompts = expressions.map(lambda expression: write(expression) + "=")


class TestLoadProblems:
    def test_columns_and_answers(self):
        problems = load_problems(500, "train", seed=0)
        assert problems.column_names == ["prompt", "answer"]
        for row in problems:
            assert len(re.findall("[1-9]", row["prompt"])) == 4
            assert row["prompt"].count("(") == 2
            assert "*" in row["prompt"]
            assert row["answer"] == str(eval(row["prompt"].removesuffix("=")))
            results = re.findall("=([0-9]+)", worked_solution(row["prompt"]))
            assert all(int(result) <= 99 for result in results)

    def test_every_shape_is_there(self):
        problems = load_problems(500, "test", seed=0)["prompt"]
        shapes = {re.sub("[+*]", ".", re.sub("[1-9]", "d", prompt)) for prompt in problems}
        assert shapes == {"((d.d).d).d=", "(d.(d.d)).d=", "(d.d).(d.d)=", "d.((d.d).d)=", "d.(d.(d.d))="}

    def test_splits_are_disjoint(self):
        train = load_problems(NUM_TRAIN, "train", seed=0)["prompt"][:]
        test = load_problems(NUM_TEST, "test", seed=0)["prompt"][:]
        assert len({*train, *test}) == len(train) + len(test) == NUM_TRAIN + NUM_TEST

    def test_split_and_order_are_pinned(self):
        # Changing these would put problems that the demo models were trained on into the test split.
        assert load_problems(3, "test", seed=0)["prompt"][:] == ["((9+3)+1)*1=", "(2*8)+(4*2)=", "((4+1)*8)+1="]

    def test_more_problems_than_the_split_holds(self):
        problems = load_problems(NUM_TEST + 10, "test", seed=0)["prompt"]
        assert len(problems) == NUM_TEST + 10
        assert len(set(problems)) == len(set(problems[:NUM_TEST])) == NUM_TEST

    def test_seed_decides_the_order(self):
        first = load_problems(20, "test", seed=1)["prompt"]
        assert load_problems(20, "test", seed=1)["prompt"] == first
        assert load_problems(100, "test", seed=1)["prompt"][:20] == first
        assert load_problems(20, "test", seed=2)["prompt"] != first

    @pytest.mark.parametrize(
        ("n", "split", "seed", "message"),
        [
            (10, "pretrain", 0, "`split` must be 'train' or 'test'"),
            (0, "train", 0, "`n` must be"),
            (2.5, "train", 0, "`n` must be"),
            (10, "train", None, "`seed` must be"),
        ],
    )
    def test_bad_arguments(self, n, split, seed, message):
        with pytest.raises(ValueError, match=message):
            load_problems(n, split, seed)


class TestValidSteps:
    @pytest.mark.parametrize(
        ("prompt", "completion"),
        [
            (PROMPT, WORKED),
            ("2*3=", "2*3=6#6"),
            ("((3+4)*2)+5=", "3+4=7,7*2=14,14+5=19#19"),
            ("(3+(4*2))+5=", "4*2=8,3+8=11,11+5=16#16"),
            ("3+((4*2)+5)=", "4*2=8,8+5=13,3+13=16#16"),
            ("3*(4+(2*5))=", "2*5=10,4+10=14,3*14=42#42"),
            ("(1+2)*(1+2)=", "1+2=3,1+2=3,3*3=9#9"),
        ],
    )
    def test_worked_solution(self, prompt, completion):
        assert worked_solution(prompt) == completion
        assert valid_steps(prompt, completion)

    @pytest.mark.parametrize(
        ("prompt", "completion"),
        [
            (PROMPT, "2+5=7,3+4=7,7*7=49#49"),
            ("((1+2)*(3+4))+(5*6)=", "5*6=30,3+4=7,1+2=3,3*7=21,21+30=51#51"),
            ("((1+2)*(3+4))+(5*6)=", "3+4=7,1+2=3,3*7=21,5*6=30,21+30=51#51"),
        ],
    )
    def test_any_possible_order(self, prompt, completion):
        assert completion != worked_solution(prompt)
        assert valid_steps(prompt, completion)

    @pytest.mark.parametrize(
        "completion",
        [
            pytest.param("#49", id="no steps"),
            pytest.param("", id="empty"),
            pytest.param("3+4=8,2+5=7,7*7=49#49", id="corrupted result"),
            pytest.param("3+5=8,2+5=7,7*7=49#49", id="corrupted operand"),
            pytest.param("3*4=7,2+5=7,7*7=49#49", id="corrupted operator"),
            pytest.param("3+4=7,2+5=7,7*7=9#49", id="tens digit missing"),
            pytest.param("3+4=8,2+5=7,8*7=56#49", id="consistent from a wrong result"),
            pytest.param("3+4=8,2+5=7,8*7=56#56", id="consistent up to a wrong answer"),
            pytest.param("3+4=7,2+5=7,7*7=49#48", id="wrong answer"),
            pytest.param("3+4=7,2+5=7#49", id="last step skipped"),
            pytest.param("2+5=7,7*7=49#49", id="first step skipped"),
            pytest.param("3+4=7,7*7=49#49", id="one of two equal results skipped"),
            pytest.param("3+4=7,2+5=7#7*7", id="unfinished expression stated"),
            pytest.param("7*7=49,3+4=7,2+5=7#49", id="step before those it needs"),
            pytest.param("4*2=8,3+4=7,2+5=7,7*7=49#49", id="pair across parentheses"),
            pytest.param("(3+4)=7,2+5=7,7*7=49#49", id="parentheses written"),
            pytest.param("3+4=7,(7)*(2+5)=49#49", id="two steps in one"),
            pytest.param("4+3=7,2+5=7,7*7=49#49", id="sides exchanged"),
            pytest.param(WORKED.replace("#", ",49*1=49#"), id="extra step"),
            pytest.param("3+4=7," + WORKED, id="step repeated"),
            pytest.param(WORKED + "#49", id="mark repeated"),
            pytest.param("#49" + WORKED, id="answer first"),
            pytest.param(WORKED + ",", id="text after"),
            pytest.param(WORKED + "\n", id="newline after"),
            pytest.param(" " + WORKED, id="text before"),
            pytest.param(WORKED.replace("#", ",#"), id="empty step"),
            pytest.param(WORKED.replace("#", "=49#"), id="result repeated"),
            pytest.param(WORKED.replace("=7", "=07"), id="leading zero"),
            pytest.param(WORKED.replace("3", "\N{FULLWIDTH DIGIT THREE}"), id="foreign digit"),
            pytest.param(WORKED.removesuffix("#49"), id="no answer"),
            pytest.param(PROMPT + WORKED, id="prompt repeated"),
        ],
    )
    def test_rejects(self, completion):
        assert not valid_steps(PROMPT, completion)

    @given(prompts)
    def test_worked_solution_is_always_valid_and_right(self, prompt):
        completion = worked_solution(prompt)
        assert valid_steps(prompt, completion)
        # Checked without the writer: each step holds, there is one per operator, and the value is Python's.
        steps, stated = completion.split("#")
        for step in steps.split(","):
            pair, result = step.split("=")
            assert eval(pair) == int(result)
        assert len(steps.split(",")) == len(re.findall("[+*]", prompt))
        assert int(stated) == eval(prompt.removesuffix("="))
        assert final_answer_reward([completion], [stated]) == [1.0]

    @given(prompts, st.data())
    def test_any_corrupted_digit_is_not_valid(self, prompt, data):
        completion = worked_solution(prompt)
        position = data.draw(st.sampled_from([i for i, c in enumerate(completion) if c.isdigit()]))
        digit = data.draw(st.sampled_from([d for d in "0123456789" if d != completion[position]]))
        assert not valid_steps(prompt, completion[:position] + digit + completion[position + 1 :])

    @pytest.mark.parametrize(
        "prompt",
        ["", "=", "7+5", "7=", "7+0=", "12+5=", "7-5=", "7+5=\n", "7+5+9=", "(7+5)=", "(7+5=", "7+(5)=", "(7+5)(3)="],
    )
    def test_malformed_prompt(self, prompt):
        for function in (worked_solution, lambda prompt: valid_steps(prompt, WORKED)):
            with pytest.raises(ValueError, match="Not a nested expression"):
                function(prompt)


def test_right_completions_fit():
    longest = max(len(worked_solution(prompt)) for prompt in load_problems(NUM_TEST, "test", seed=0)["prompt"])
    assert longest == 25
    assert longest + 1 < MAX_COMPLETION_LENGTH


@given(st.text("0123456789+*()=,#"))
def test_tokenizer_round_trip(text):
    tokenizer = make_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("name", ["teacher", "student"])
class TestDemoModels:
    def test_loads_with_its_tokenizer(self, name):
        model = AutoModelForCausalLM.from_pretrained(demo_model_path(name))
        tokenizer = AutoTokenizer.from_pretrained(demo_model_path(name))
        assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
        assert tokenizer.padding_side == "left"
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
        sequences = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=MAX_COMPLETION_LENGTH)
        completions = tokenizer.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right = final_answer_reward(completions, list(problems["answer"]))
        valid = [valid_steps(*pair) for pair in zip(problems["prompt"], completions, strict=True)]
        # At least four standard deviations of a sample of 256 around the rates that the models were made for.
        expected_right, expected_valid = {"teacher": (0.93, 0.93), "student": (0.79, 0.30)}[name]
        assert abs(sum(right) / 256 - expected_right) <= 0.1
        assert abs(sum(valid) / 256 - expected_valid) <= 0.12


def test_demo_models_are_small():
    files = [file for name in ("teacher", "student") for file in Path(demo_model_path(name)).iterdir()]
    assert sum(file.stat().st_size for file in files) < 4e6


def test_unknown_demo_model():
    with pytest.raises(ValueError, match="`name` must be"):
        demo_model_path("oracle")
