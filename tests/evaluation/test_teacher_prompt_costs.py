"""Costs of a teacher that reads a prompt of its own: `score_rollouts`, `evaluate` and the commands that measure."""

import json
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from fake_server import serving
from fake_vllm import FakeServer
from helpers import error_line, make_settings, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_cmdp import GKDDistillTrainer
from trl_cmdp.cli import main
from trl_cmdp.cli._run import evaluate_student
from trl_cmdp.cli._setup import embedded_setup
from trl_cmdp.core import token_divergence
from trl_cmdp.evaluation import (
    evaluate,
    read_rollout_records,
    sample_rollouts,
    score_rollouts,
    with_teacher_prompts,
)
from trl_cmdp.tasks.arithmetic import demo_model_path, final_answer_reward, load_problems
from trl_cmdp.teachers import RemoteTeacher


STUDENT, TEACHER = demo_model_path("student"), demo_model_path("teacher")
PROBLEMS = load_problems(4, "test", seed=3)
HINTS = [f"#{row['answer']},{row['prompt']}" if index % 2 else "1+2=" for index, row in enumerate(PROBLEMS)]
SETTINGS = make_settings(num_problems=4, num_samples=2, seed=3, max_new_tokens=12)


@pytest.fixture(scope="module")
def models():
    return [AutoModelForCausalLM.from_pretrained(path) for path in (STUDENT, TEACHER)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(STUDENT)


@pytest.fixture(scope="module")
def rollouts(models, tokenizer):
    return sample_rollouts(models[0], tokenizer, PROBLEMS["prompt"], max_new_tokens=12)


def by_hand(models, prompt_ids, teacher_prompt_ids, completion_ids):
    """Costs (L,) of one rollout, of both models' full logits."""
    logits = []
    for model, ids in zip(models, (prompt_ids, teacher_prompt_ids), strict=True):
        with torch.no_grad():
            row = model(torch.tensor([[*ids, *completion_ids]])).logits[0].double()
        logits.append(row[len(ids) - 1 : -1])
    return token_divergence(*logits)


@pytest.mark.parametrize("on_a_server", [False, True])
def test_costs_are_dense(models, tokenizer, rollouts, on_a_server):
    """Beside a rollout whose teacher reads the student's prompt."""
    if on_a_server:
        with serving(FakeServer(models[1], TEACHER)) as server:
            server.models["data"][0]["max_model_len"] = 128
            teacher = RemoteTeacher(server.url)
            hinted = with_teacher_prompts(rollouts, HINTS, teacher, tokenizer)
            costs = score_rollouts([rollouts[0], *hinted], models[0], teacher, batch_size=3)
    else:
        hinted = with_teacher_prompts(rollouts, HINTS, models[1], tokenizer)
        costs = score_rollouts([rollouts[0], *hinted], models[0], models[1], batch_size=3)
    prompts = [rollouts[0].prompt_ids, *(tokenizer(hint)["input_ids"] for hint in HINTS)]
    for rollout, prompt_ids, cost in zip([rollouts[0], *rollouts], prompts, costs, strict=True):
        expected = by_hand(models, rollout.prompt_ids, prompt_ids, rollout.completion_ids)
        torch.testing.assert_close(cost.double(), expected, rtol=1e-4, atol=1e-5)


def test_messages_are_rendered_by_the_teachers_own_template(models, tokenizer, rollouts, tmp_path):
    own = AutoTokenizer.from_pretrained(TEACHER)
    own.chat_template = "#{{ messages[0].content }}{% if add_generation_prompt %}={% endif %}"
    teacher = save_model(tmp_path / "teacher", models[1], own)
    messages = [[{"role": "user", "content": hint}] for hint in HINTS]
    for rollout, hint in zip(with_teacher_prompts(rollouts, messages, teacher, tokenizer), HINTS, strict=True):
        assert rollout.teacher_prompt_ids == tokenizer(f"#{hint}=")["input_ids"]
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        with_teacher_prompts(rollouts, messages, TEACHER, tokenizer)
    with pytest.raises(ValueError, match=r"Row 2: the prompt \(column 'teacher_prompt'\) is null"):
        with_teacher_prompts(rollouts, [*HINTS[:2], None, *HINTS[3:]], models[1], tokenizer)


def test_evaluate(models, tokenizer, tmp_path):
    """Same rollouts, costs of what the teacher reads, and records that say what it was; equal prompts change no cost."""

    def records(problems, path=None, teacher=models[1], settings=SETTINGS):
        settings = replace(settings, teacher=None if teacher is None else "teacher")
        return evaluate(
            models[0], tokenizer, problems, final_answer_reward, settings=settings, records_path=path, teacher=teacher
        )

    plain = records(PROBLEMS)
    hinted = records(PROBLEMS.add_column("teacher_prompt", HINTS), tmp_path / "records.jsonl")
    assert read_rollout_records(tmp_path / "records.jsonl")[1] == hinted
    for record, other in zip(hinted, plain, strict=True):
        assert record.completion_ids == other.completion_ids
        assert (record.teacher_prompt, other.teacher_prompt) == (HINTS[record.problem], None)
        ids = [tokenizer(text)["input_ids"] for text in (record.prompt, record.teacher_prompt)]
        expected = by_hand(models, *ids, record.completion_ids)
        torch.testing.assert_close(torch.tensor(record.costs).double(), expected, rtol=1e-4, atol=1e-5)
    equal = records(PROBLEMS.add_column("teacher_prompt", PROBLEMS["prompt"]))
    assert [record.costs for record in equal] == [record.costs for record in plain]
    without = records(PROBLEMS.add_column("teacher_prompt", HINTS), teacher=None)
    assert all(record.teacher_prompt is None for record in without)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([*HINTS[:3], ""], r"Row 3 of the dataset of problems.*'teacher_prompt'\) is empty"),
        ([*HINTS[:1], "1" * 200, *HINTS[2:]], r"Row 1 of the dataset of problems: its `teacher_prompt` of 200 tokens"),
    ],
)
def test_bad_input_before_a_rollout(models, tokenizer, prompts, message):
    with serving(FakeServer(models[1], TEACHER)) as server:
        server.models["data"][0]["max_model_len"] = 128
        with pytest.raises(ValueError, match=message):
            evaluate(
                models[0],
                tokenizer,
                PROBLEMS.add_column("teacher_prompt", prompts),
                None,  # no completion is rewarded
                settings=SETTINGS,
                teacher=RemoteTeacher(server.url),
            )


class TestCommands:
    """`--dataset` with the column."""

    @pytest.fixture
    def options(self, tmp_path):
        Dataset.from_list(list(PROBLEMS.add_column("teacher_prompt", HINTS))).to_json(tmp_path / "problems.jsonl")
        models = ["--student", STUDENT, "--teacher", TEACHER, "--max_new_tokens", "12", "--num_problems", "2"]
        return [*map(str, models), "--dataset", str(tmp_path / "problems.jsonl")]

    def test_evaluate(self, options, models, tokenizer, tmp_path):
        assert main(["evaluate", *options, "--output_dir", str(tmp_path / "out")]) == 0
        _, records = read_rollout_records(tmp_path / "out" / "records.jsonl")
        hints = dict(zip(PROBLEMS["prompt"], HINTS, strict=True))
        for record in records:
            assert record.teacher_prompt == hints[record.prompt]
            ids = [tokenizer(text)["input_ids"] for text in (record.prompt, record.teacher_prompt)]
            expected = by_hand(models, *ids, record.completion_ids)
            torch.testing.assert_close(torch.tensor(record.costs).double(), expected, rtol=1e-4, atol=1e-5)

    def test_calibrate_imitates_the_same_teacher(self, options, tmp_path, monkeypatch):
        read, train = [], GKDDistillTrainer.train

        def train_and_look(trainer, *args, **kwargs):
            train(trainer, *args, **kwargs)
            read.extend(trainer.latest_teacher_prompts())

        monkeypatch.setattr(GKDDistillTrainer, "train", train_and_look)
        imitation = ["--imitation_steps", "1", "--imitation_batch_size", "2", "--imitation_learning_rate", "1e-3"]
        assert main(["calibrate", *options, *imitation, "--output_dir", str(tmp_path / "out")]) == 0
        assert len(read) == 2
        assert set(read) < set(HINTS)
        for name in ("start", "imitation"):
            _, records = read_rollout_records(tmp_path / "out" / f"{name}.jsonl")
            assert {record.teacher_prompt for record in records} < set(HINTS)

    def test_a_cell_of_compare(self, models, tokenizer):
        problems = PROBLEMS.add_column("teacher_prompt", HINTS)
        answers = evaluate_student(models[0], tokenizer, models[1], problems, embedded_setup("arithmetic"), seed=0)
        for answer, hint in zip(answers, HINTS, strict=True):
            rollout = answer.rollout
            expected = by_hand(models, rollout.prompt_ids, tokenizer(hint)["input_ids"], rollout.completion_ids)
            torch.testing.assert_close(answer.costs.double(), expected, rtol=1e-4, atol=1e-5)

    def test_a_row_without_one(self, options, tmp_path, capsys):
        with (tmp_path / "problems.jsonl").open("a") as file:
            file.write(json.dumps({"prompt": "1+2=", "answer": "3"}) + "\n")
        assert main(["evaluate", *options, "--output_dir", str(tmp_path / "out")]) == 2
        assert "Row 4 of the dataset" in (line := error_line(capsys))
        assert "'teacher_prompt') is null" in line
