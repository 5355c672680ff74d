"""What the embedded tasks share: pinned splits, the reward, characters as tokens, and models of known rates."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_cmdp.tasks import arithmetic, chains, nested


TASKS = pytest.mark.parametrize("task", [arithmetic, chains, nested], ids=lambda task: task.__name__.split(".")[-1])
MODELS = pytest.mark.parametrize("name", ["teacher", "student"])
# The first test problems at seed 0. Others would put problems that the models were trained on into the test split.
PINNED = {
    arithmetic: ["5+7+9+5+4=", "6+2+8+1+3=", "1+5+5+3+8="],
    chains: ["6+8+3+7+7+1=", "5+3+1+8+3+3+2+8=", "8+9+9+5+4+7="],
    nested: ["((9+3)+1)*1=", "(2*8)+(4*2)=", "((4+1)*8)+1="],
}
# Shares of correct answers and of answers with valid steps that the models were made for.
RATES = {
    arithmetic: {"teacher": (0.89, 0.895), "student": (0.89, 0.30)},
    chains: {"teacher": (0.94, 0.94), "student": (0.89, 0.31)},
    nested: {"teacher": (0.93, 0.93), "student": (0.79, 0.30)},
}
WORKED = "7+5=12,12+9=21,21+3=24,24+8=32#32"


@TASKS
class TestLoadProblems:
    def test_columns_and_correct_answers(self, task):
        problems = task.load_problems(500, "train", seed=0)
        assert problems.column_names == ["prompt", "answer"]
        for row in problems:
            assert row["answer"] == str(eval(row["prompt"].removesuffix("=")))

    def test_the_split_and_the_order_are_pinned(self, task):
        assert list(task.load_problems(3, "test", seed=0)["prompt"]) == PINNED[task]

    def test_the_seed_decides_the_order(self, task):
        first, more, other = (
            list(task.load_problems(n, "test", seed)["prompt"]) for n, seed in ((20, 1), (100, 1), (20, 2))
        )
        assert more[:20] == first != other

    @pytest.mark.parametrize(
        ("n", "split", "seed", "message"),
        [
            (10, "validation", 0, "`split` must be 'train' or 'test'"),
            (0, "train", 0, "`n` must be"),
            (2.5, "train", 0, "`n` must be"),
            (10, "train", None, "`seed` must be"),
        ],
    )
    def test_bad_arguments(self, task, n, split, seed, message):
        with pytest.raises(ValueError, match=message):
            task.load_problems(n, split, seed)


@pytest.mark.parametrize(("task", "sizes"), [(arithmetic, (47_071, 11_978)), (nested, (109_887, 28_015))])
def test_splits_are_disjoint_and_come_again_only_when_they_are_used_up(task, sizes):
    train = list(task.load_problems(sizes[0], "train", seed=0)["prompt"])
    test = list(task.load_problems(sizes[1], "test", seed=0)["prompt"])
    assert len({*train, *test}) == sum(sizes)
    again = list(task.load_problems(sizes[1] + 10, "test", seed=0)["prompt"])
    assert again[: sizes[1]] == test
    assert set(again) == set(test)


class TestChains:
    """Short chains to train on, long ones to test on."""

    LENGTHS = {"train": {3, 4, 5}, "test": {6, 7, 8}, "pretrain": {3, 4, 5, 6, 7, 8}}

    @pytest.mark.parametrize("split", LENGTHS)
    def test_every_length_has_its_share(self, split):
        counts = Counter(prompt.count("+") + 1 for prompt in chains.load_problems(600, split, seed=0)["prompt"])
        assert counts.keys() == self.LENGTHS[split]
        assert min(counts.values()) >= 600 / len(counts) / 2

    def test_only_test_holds_test_problems(self):
        train, test, pretrain = (set(chains.load_problems(20_000, split, seed=0)["prompt"]) for split in self.LENGTHS)
        assert not (train | pretrain) & test

    def test_a_problem_comes_again_only_after_its_length_is_used_up(self):
        for split in ("test", "pretrain"):
            problems = [p for p in chains.load_problems(5_000, split, seed=3)["prompt"] if p.count("+") > 2]
            assert len(set(problems)) == len(problems)
        shortest = [p for p in chains.load_problems(12_000, "train", seed=3)["prompt"] if p.count("+") == 2]
        assert len(shortest) > 9**3
        assert len(set(shortest[: 9**3])) == 9**3


class TestFinalAnswerReward:
    @pytest.mark.parametrize("completion", [WORKED, "#32", "7+5=99#32", "#31#32"])
    def test_correct(self, completion):
        assert arithmetic.final_answer_reward([completion], ["32"]) == [1.0]

    @pytest.mark.parametrize("completion", ["#32#31", "#31", "#032", "#32,", "#32 ", "#3", "#", "32", ""])
    def test_wrong(self, completion):
        assert arithmetic.final_answer_reward([completion], ["32"]) == [0.0]

    def test_answers_that_are_numbers(self):
        assert arithmetic.final_answer_reward(["#32", "#33"], [32, 32]) == [1.0, 0.0]
        with pytest.raises(TypeError, match="must be text or a number, got NoneType"):
            arithmetic.final_answer_reward(["#32"], [None])

    def test_takes_what_trl_passes(self):
        columns = {"prompts": ["7+5+9+3+8="] * 2, "completion_ids": [[1], [2]]}
        rewards = nested.final_answer_reward(completions=["#32", "#33"], answer=["32", "32"], **columns)
        assert rewards == [1.0, 0.0]


class TestTokenizer:
    @given(st.text("0123456789+*()=,#"))
    def test_one_token_per_character_and_back(self, text):
        tokenizer = nested.make_tokenizer()
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text

    def test_pads_on_the_left(self):
        tokenizer = arithmetic.make_tokenizer()
        batch = tokenizer(["1+2=", "#3"], padding=True)
        assert batch["input_ids"][1][:2] == [tokenizer.pad_token_id] * 2
        assert batch["attention_mask"][1] == [0, 0, 1, 1]


@TASKS
class TestDemoModels:
    @MODELS
    def test_loads_with_its_tokenizer(self, task, name):
        model = AutoModelForCausalLM.from_pretrained(task.demo_model_path(name))
        tokenizer = AutoTokenizer.from_pretrained(task.demo_model_path(name))
        assert tokenizer.get_vocab() == task.make_tokenizer().get_vocab()
        assert tokenizer.padding_side == "left"
        assert tokenizer.decode(tokenizer(WORKED + "<eos>")["input_ids"], skip_special_tokens=True) == WORKED
        assert model.config.vocab_size == len(tokenizer)
        for config in (model.config, model.generation_config):
            assert config.eos_token_id == tokenizer.eos_token_id
            assert config.pad_token_id == tokenizer.pad_token_id

    @MODELS
    @pytest.mark.parametrize("split", ["train", "test"])
    def test_answers_problems_at_the_rates_it_was_made_for(self, task, name, split):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(task.demo_model_path(name))
        tokenizer = AutoTokenizer.from_pretrained(task.demo_model_path(name))
        problems = task.load_problems(256, split, seed=0)
        inputs = tokenizer(list(problems["prompt"]), padding=True, return_tensors="pt")
        sequences = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=task.MAX_COMPLETION_LENGTH)
        completions = tokenizer.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        correct = task.final_answer_reward(completions, list(problems["answer"]))
        valid = [task.valid_steps(*pair) for pair in zip(problems["prompt"], completions, strict=True)]
        # At least four standard deviations of a sample of 256.
        expected = RATES[task][name]
        assert abs(sum(correct) / 256 - expected[0]) <= 0.1
        assert abs(sum(valid) / 256 - expected[1]) <= 0.12

    def test_is_small(self, task):
        files = [file for name in ("teacher", "student") for file in Path(task.demo_model_path(name)).iterdir()]
        assert sum(file.stat().st_size for file in files) < 4e6

    def test_an_unknown_one_is_an_error(self, task):
        with pytest.raises(ValueError, match="`name` must be"):
            task.demo_model_path("oracle")
