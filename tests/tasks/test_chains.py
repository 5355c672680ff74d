from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_cmdp.tasks import arithmetic
from trl_cmdp.tasks.chains import (
    MAX_COMPLETION_LENGTH,
    demo_model_path,
    final_answer_reward,
    load_problems,
    make_tokenizer,
    valid_steps,
    worked_solution,
)


PROMPT = "7+5+9+3+8+6="
WORKED = "7+5=12,12+9=21,21+3=24,24+8=32,32+6=38#38"
LENGTHS = {"train": {3, 4, 5}, "test": {6, 7, 8}, "pretrain": {3, 4, 5, 6, 7, 8}}


def num_operands(prompt):
    return len(prompt.split("+"))


class TestLoadProblems:
    @pytest.mark.parametrize("split", LENGTHS)
    def test_columns_lengths_and_answers(self, split):
        problems = load_problems(600, split, seed=0)
        assert problems.column_names == ["prompt", "answer"]
        for row in problems:
            operands = row["prompt"].removesuffix("=").split("+")
            assert all(operand in "123456789" for operand in operands)
            assert row["answer"] == str(sum(map(int, operands)))
        counts = Counter(map(num_operands, problems["prompt"]))
        assert counts.keys() == LENGTHS[split]
        assert min(counts.values()) >= 600 / len(counts) / 2

    def test_only_test_holds_test_problems(self):
        train, test, pretrain = (set(load_problems(20_000, split, seed=0)["prompt"]) for split in LENGTHS)
        assert not train & test
        assert not pretrain & test
        # A whole pass over other splits cannot be drawn: the hash that decides must be the one of chained sums.
        assert all(arithmetic._is_test(prompt) for prompt in test)
        assert not any(arithmetic._is_test(prompt) for prompt in pretrain if num_operands(prompt) > 5)
        assert any(arithmetic._is_test(prompt) for prompt in pretrain if num_operands(prompt) <= 5)

    def test_split_and_order_are_pinned(self):
        # Changing these would put problems that the demo models were trained on into the test split.
        assert load_problems(3, "test", seed=0)["prompt"][:] == ["6+8+3+7+7+1=", "5+3+1+8+3+3+2+8=", "8+9+9+5+4+7="]

    def test_a_problem_comes_again_only_after_its_length_is_used_up(self):
        for split in ("test", "pretrain"):
            problems = [prompt for prompt in load_problems(5_000, split, seed=3)["prompt"] if num_operands(prompt) > 3]
            assert len(set(problems)) == len(problems)
        shortest = [prompt for prompt in load_problems(12_000, "train", seed=3)["prompt"] if num_operands(prompt) == 3]
        assert len(shortest) > 9**3
        assert len(set(shortest[: 9**3])) == 9**3

    def test_seed_decides_the_order(self):
        first = load_problems(20, "test", seed=1)["prompt"]
        assert load_problems(20, "test", seed=1)["prompt"] == first
        assert load_problems(100, "test", seed=1)["prompt"][:20] == first
        assert load_problems(20, "test", seed=2)["prompt"] != first

    @pytest.mark.parametrize(
        ("n", "split", "seed", "message"),
        [
            (10, "validation", 0, "`split` must be 'train' or 'test' or 'pretrain'"),
            (0, "train", 0, "`n` must be"),
            (2.5, "pretrain", 0, "`n` must be"),
            (10, "test", None, "`seed` must be"),
        ],
    )
    def test_bad_arguments(self, n, split, seed, message):
        with pytest.raises(ValueError, match=message):
            load_problems(n, split, seed)


def test_steps_are_those_of_chained_sums():
    assert worked_solution(PROMPT) == WORKED
    for name in ("final_answer_reward", "make_tokenizer", "valid_steps", "worked_solution"):
        assert globals()[name] is getattr(arithmetic, name)


@pytest.mark.parametrize(
    "completion",
    [
        pytest.param("#38", id="no steps"),
        pytest.param("7+5=2,2+9=1,1+3=4,4+8=2,2+6=8#38", id="tens digits missing"),
        pytest.param("7+5=12,12+9=21,21+3=24,24+8=32#38", id="last step skipped"),
        pytest.param("7+5=12,12+9=22,22+3=25,25+8=33,33+6=39#39", id="consistent up to a wrong answer"),
        pytest.param(WORKED + "#38", id="mark repeated"),
    ],
)
def test_rejects(completion):
    assert not valid_steps(PROMPT, completion)


def test_right_completions_fit():
    longest = len(worked_solution("9+9+9+9+9+9+9+9="))
    assert longest == 57
    assert longest + 1 < MAX_COMPLETION_LENGTH


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

    @pytest.mark.parametrize("split", ["train", "test"])
    def test_answers_problems_of_every_length(self, name, split):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(demo_model_path(name))
        tokenizer = AutoTokenizer.from_pretrained(demo_model_path(name))
        problems = load_problems(256, split, seed=0)
        inputs = tokenizer(list(problems["prompt"]), padding=True, return_tensors="pt")
        sequences = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=MAX_COMPLETION_LENGTH)
        completions = tokenizer.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right = final_answer_reward(completions, list(problems["answer"]))
        valid = [valid_steps(*pair) for pair in zip(problems["prompt"], completions, strict=True)]
        # At least four standard deviations of a sample of 256 around the rates that the models were made for.
        expected_right, expected_valid = {"teacher": (0.94, 0.94), "student": (0.89, 0.31)}[name]
        assert abs(sum(right) / 256 - expected_right) <= 0.1
        assert abs(sum(valid) / 256 - expected_valid) <= 0.12


def test_demo_models_are_small():
    files = [file for name in ("teacher", "student") for file in Path(demo_model_path(name)).iterdir()]
    assert sum(file.stat().st_size for file in files) < 4e6


def test_unknown_demo_model():
    with pytest.raises(ValueError, match="`name` must be"):
        demo_model_path("oracle")
