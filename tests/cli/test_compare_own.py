"""`trl-cmdp compare` on models, data and functions of the user's own: the page's example, and every mistake in one."""

import contextlib
import io
import json
import re
import shlex
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import make_model, make_tokenizer, save_model
from huggingface_hub import constants

from trl_cmdp.cli import main
from trl_cmdp.cli._cell import run_cell
from trl_cmdp.cli._cells import _gpus, load_records
from trl_cmdp.cli._experiment import load_experiment
from trl_cmdp.cli._run import judge
from trl_cmdp.cli._setup import load_setup
from trl_cmdp.evaluation import Rollout
from trl_cmdp.tasks import arithmetic


PAGE = Path(__file__).parents[2] / "docs" / "compare.md"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(), re.DOTALL)
FILES = {
    name: code
    for language, code in BLOCKS
    for name in re.findall(r"\A# (\S+)\n", code)
    if language in ("python", "yaml")
}
EXPERIMENT = FILES["sums.yaml"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of the page's example, with an embedded student and teacher, and problems of theirs."""
    folder = tmp_path_factory.mktemp("own")
    for name, code in FILES.items():
        (folder / name).write_text(code)
    for name in ("student", "teacher"):
        shutil.copytree(arithmetic.demo_model_path(name), folder / "models" / name)
    for split, n in (("train", 100), ("test", 500)):
        rows = arithmetic.load_problems(n, split, 0).to_list()
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


@pytest.fixture
def own(folder, tmp_path):
    """A copy of the example, to be changed."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return tmp_path


def change(folder, old, new):
    assert old in EXPERIMENT
    (folder / "sums.yaml").write_text(EXPERIMENT.replace(old, new))


def cells_of(folder):
    return load_experiment(str(folder / "sums.yaml")).checked().cells()


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """The page's command, for one of its methods: the folder it wrote, and what it printed."""
    commands = [code for language, code in BLOCKS if language == "bash" and "sums.yaml" in code]
    [command] = [line for code in commands for line in code.splitlines()]
    out = tmp_path_factory.mktemp("finished")
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        words = shlex.split(command)[1:]
        assert main([*words, "--methods", "constrained", "--output_dir", str(out), "--jobs", "2"]) == 0
    return out, printed.getvalue()


def test_the_example_of_the_page_runs(finished):
    out, printed = finished
    records = {record.method: record for record in load_records(out)[0]}
    assert set(records) == {"student", "teacher", "constrained"}
    for record in records.values():
        assert record.task == "test.jsonl"
        assert len(record.outcomes) == 60
        assert {outcome.valid for outcome in record.outcomes} == {0, 1}
        assert all(
            outcome.reward == pytest.approx(outcome.right + 0.1 * (1 - (outcome.length - 1) / 40), abs=1e-5)
            for outcome in record.outcomes
            if outcome.length < 40  # each token is a character, but the last, the EOS
        )
    assert all(outcome.cost == 0 for outcome in records["teacher"].outcomes)
    config = records["constrained"].config
    assert (config["learning_rate"], config["per_device_train_batch_size"]) == (3e-4, 64)
    assert [entry["step"] for entry in records["constrained"].history] == list(range(1, 11))
    assert str(Path.home()) not in records["constrained"].to_json()
    table = (out / "table.md").read_text()
    assert "| correct [95%] | reward [95%] | valid [95%] |" in table
    assert table in printed


@pytest.mark.parametrize("changed", ["train_dataset", "test_dataset", "student", "teacher", "reward_funcs"])
def test_a_changed_file_is_noticed(own, finished, capsys, changed):
    """A record of other data, models or functions is none of this experiment."""
    if changed.endswith("_dataset"):
        path = own / f"{changed.removesuffix('_dataset')}.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[::-1]))
    elif changed == "reward_funcs":
        change(own, "[sum_rewards.correct, sum_rewards.brevity]", "[sum_rewards.correct, sum_rewards.length]")
        change(own, "sum_rewards.brevity", "other_rewards.brevity")
        (own / "other_rewards.py").write_text(FILES["sum_rewards.py"])
    else:
        path = own / "models" / changed / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token_id": 3}))
    shutil.copytree(finished[0], own / "out")
    options = ["--output-dir", str(own / "out"), "--quick", "--methods", "constrained"]
    assert main(["compare", str(own / "sums.yaml"), *options]) == 2
    error = capsys.readouterr().err
    assert changed in error
    assert "take another --output_dir" in error


def test_a_trained_student_is_evaluated_as_the_untrained_one(own, monkeypatch):
    """In float32, though it was trained under bfloat16: one that has learned nothing gives the same answers and costs."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    change(own, "learning_rate: 3e-4", "learning_rate: 1e-30\nbf16: true")
    student, _, constrained, _ = [
        replace(cell, settings={**cell.settings, "steps": 1, "held_out": 8})
        for cell in cells_of(own)
        if cell.seed == 0
    ]
    before, after = (run_cell(cell, own / "out", time.monotonic()) for cell in (student, constrained))
    assert after.config["bf16"]
    assert after.outcomes == before.outcomes


OVERLAP = "problems of `train_dataset` too"
MISTAKES = [
    ("student: models/student ", "student: models/studnt ", ["`student`", "models/studnt", "no folder"]),
    ("student: models/student ", "student: ./models/studnt ", ["`student`", "relative to the folder"]),
    ("student: models/student ", "student: train.jsonl ", ["`student`", "is a file"]),
    ("student: models/student ", "student: . ", ["`student`", "config.json"]),
    ("student: models/student ", "student: 3 ", ["`student`", "folder of a model"]),
    ("student: models/student ", "studnt: models/student ", ["'studnt'", "`student`?"]),
    ("teacher: models/teacher\n", "", ["`teacher`", "is missing"]),
    ("train_dataset: train.jsonl", "train_dataset: trian.jsonl", ["`train_dataset`", "trian.jsonl"]),
    ("train_dataset: train.jsonl", "train_dataset: [train.jsonl]", ["`train_dataset`", "the name of a task"]),
    ("train_dataset: train.jsonl", "train_dataset: 2020-01-01", ["not JSON serializable"]),
    ("train_dataset: train.jsonl", "train_dataset: ''", ["`train_dataset`", "the name of a task"]),
    ("train_dataset: train.jsonl", "train_dataset: test.jsonl", [OVERLAP, "500 of the 500"]),
    ("train_dataset: train.jsonl", "train_dataset: arithmetic", ["`train_dataset`", "`num_problems`"]),
    ("train_dataset: train.jsonl", "train_dataset: {task: algebra}", ["`train_dataset`", "'algebra'"]),
    ("train_dataset: train.jsonl", "train_dataset: {path: train.jsonl, n: 3}", ["`train_dataset`", "num_problems"]),
    ("train_dataset: train.jsonl", "train_dataset: {path: train.jsonl, num_problems: 0}", ["`num_problems`"]),
    ("train_dataset: train.jsonl", "train_dataset: {task: gsm8k, levels: 3}", ["`train_dataset`", "levels"]),
    ("test_dataset: test.jsonl", "test_dataset: {path: test.jsonl, split: dev}", ["`test_dataset`", "'dev'"]),
    ("test_dataset: test.jsonl", "test_dataset: {path: test.jsonl, num_problems: 9}", ["`held_out` says"]),
    ("held_out: 500", "held_out: 501", ["`held_out` is 501", "500 problems"]),
    ("sum_rewards.correct,", "correct,", ["`reward_funcs`", "dotted path"]),
    ("sum_rewards.correct,", "sum_rewards.corect,", ["`reward_funcs`", "'corect'"]),
    ("sum_rewards.correct,", "no_rewards.correct,", ["`reward_funcs`", "no_rewards"]),
    ("sum_rewards.correct,", "odd_rewards.NUMBER,", ["`reward_funcs`", "is no function but int"]),
    ("sum_rewards.correct,", "odd_rewards.one,", ["`reward_funcs`", "1 rewards for 2 completions"]),
    ("sum_rewards.correct,", "odd_rewards.texts,", ["`reward_funcs`", "'yes'", "a finite number"]),
    ("sum_rewards.correct,", "odd_rewards.infinite,", ["`reward_funcs`", "inf", "a finite number"]),
    ("sum_rewards.correct,", "odd_rewards.scalar,", ["`reward_funcs`", "TypeError"]),
    ("sum_rewards.correct,", "odd_rewards.fails,", ["`reward_funcs`", "ZeroDivisionError"]),
    ("sum_rewards.correct,", "odd_rewards.graded,", ["`reward_funcs`", "the column 'grade'"]),
    ("sum_rewards.correct,", "broken_rewards.correct,", ["`reward_funcs`", "NameError"]),
    ("[sum_rewards.correct, sum_rewards.brevity]", "[]", ["`reward_funcs`", "dotted path"]),
    ("[sum_rewards.correct, sum_rewards.brevity]", "sum_rewards.correct", ["`reward_weights` holds 2 numbers for 1"]),
    ("reward_weights: [1.0, 0.1]", "correct_func: odd_rewards.graded", ["`correct_func`", "'grade'"]),
    ("valid_steps: sum_rewards.valid_steps", "valid_steps: sum_rewards.correct", ["`valid_steps`", "True or False"]),
    ("valid_steps: sum_rewards.valid_steps", "valid_steps: odd_rewards.list_of", ["`valid_steps`", "[True]"]),
    ("reward_weights: [1.0, 0.1]", "reward_weights: [1.0, high]", ["`reward_weights` must be list[float]"]),
    ("max_completion_length: 40", "max_completion_length: 0", ["`max_completion_length` must be positive"]),
    ("max_completion_length: 40", "max_completion_length: null", ["`max_completion_length` must be positive"]),
    ("max_completion_length: 40", "max_completion_len: 40", ["'max_completion_len'", "`max_completion_length`?"]),
    ("num_generations: 8", "num_generations: 2.5", ["`num_generations` must be int"]),
    ("num_generations: 8", "num_generations: 7", ["num_generations"]),
    ("batch_size: 64 ", "batch_size: 1600 ", ["`train_dataset` has 100 problems", "a step takes 200"]),
    ("learning_rate: 3e-4", "learning_rate: fast", ["`learning_rate` must be float"]),
    ("learning_rate: 3e-4", "learning_rate: .nan", ["JSON"]),
    ("learning_rate: 3e-4", "model_init_kwargs: '{}'", ["`model_init_kwargs` must be a mapping"]),
    ("learning_rate: 3e-4", "learning_rate: -1", ["`learning_rate` must be positive"]),
    ("learning_rate: 3e-4", "seed: 3", ["`seed`", "list it under `seeds`"]),
    ("learning_rate: 3e-4", "teacher_model_server_url: http://x", ["`teacher_model_server_url`", "under `teacher`"]),
    ("learning_rate: 3e-4", "teacher_eos_token: '<end>'", ["`teacher`", "'<end>'"]),
    ("cost_limit: 0.25", "cost_limit: 0.25\ncost_scope: total", ["`cost_scope` must be one of mean, sum"]),
    ("{trainer: constrained}", "{trainer: constrained, model_init_kwargs: {}}", ["beside `methods`"]),
    ("{trainer: constrained}", "{trainer: constrained, violation_penlty: 3}", ["`violation_penalty`?"]),
    ("{trainer: constrained}", "{trainer: constrained, temperature: hot}", ["'constrained'", "must be float"]),
]
ODD_REWARDS = """
NUMBER = 3
def one(completions, **kwargs): return [1.0]
def texts(completions, **kwargs): return ["yes" for _ in completions]
def infinite(completions, **kwargs): return [float("inf") for _ in completions]
def scalar(completions, **kwargs): return 1.0
def fails(completions, **kwargs): return [1 / len(text) for text in completions]
def graded(completions, grade, **kwargs): return [float(value) for value in grade]
def list_of(prompt, completion): return [True]
"""


@pytest.fixture(scope="module")
def with_odd_rewards(folder):
    (folder / "odd_rewards.py").write_text(ODD_REWARDS)
    (folder / "broken_rewards.py").write_text("correct = undefined")
    return folder


@pytest.mark.parametrize(("old", "new", "named"), MISTAKES)
def test_a_mistake_is_named_before_the_first_cell(with_odd_rewards, tmp_path, capsys, monkeypatch, old, new, named):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert old in EXPERIMENT
    path = with_odd_rewards / "mistaken.yaml"
    path.write_text(EXPERIMENT.replace(old, new))
    assert main(["compare", str(path), "--output-dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert all(words in error for words in ["mistaken", *named]), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([{"question": "1+1=", "answer": "2"}], ["`test_dataset`", "'prompt'", "'question'"]),
        ([{"prompt": "1+1=", "solution": "2"}], ["`reward_funcs`", "'answer'", "'solution'"]),
        ([{"prompt": "1+1=", "answer": "2"}, {"prompt": "", "answer": "2"}], ["`test_dataset`", "Row 1"]),
        ([{"prompt": [{"role": "user", "content": "1+1="}], "answer": "2"}], ["`test_dataset`", "no chat template"]),
        ([{"prompt": "1+1=", "answer": "2", "image": "1.png"}], ["`test_dataset`", "on text alone"]),
        (
            [{"prompt": "1+1=", "answer": "2", "teacher_prompt": "2", "image": "1.png"}],
            ["`test_dataset`", "'teacher_prompt' cannot be used together with images"],
        ),
        ([], ["`test_dataset`", "no rows"]),
    ],
)
def test_a_mistake_in_the_data_is_named(own, capsys, rows, named):
    (own / "test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    change(own, "held_out: 500", "held_out: 1")
    assert main(["compare", str(own / "sums.yaml"), "--output-dir", str(own / "out")]) == 2
    error = capsys.readouterr().err
    assert all(words in error for words in named), error


def test_models_that_cannot_be_compared_are_refused(own, capsys):
    def error():
        assert main(["compare", str(own / "sums.yaml"), "--output-dir", str(own / "out")]) == 2
        return capsys.readouterr().err

    save_model(own / "models" / "teacher", make_model(), make_tokenizer())
    assert "`teacher`: Student and teacher have different tokenizers" in error()
    (own / "models" / "teacher" / "model.safetensors").unlink()
    assert "holds no *.safetensors" in error()
    (own / "models" / "student" / "adapter_config.json").write_text("{}")
    assert "`student`" in (message := error())
    assert "merge" in message


def test_tasks_give_problems_and_rewards(own):
    """In place of files; and an embedded task brings what is not named beside it."""
    change(own, "reward_funcs: [sum_rewards.correct, sum_rewards.brevity]\nreward_weights: [1.0, 0.1]\n", "")
    text = (own / "sums.yaml").read_text().replace("test_dataset: test.jsonl", "test_dataset: arithmetic")
    text = text.replace("train.jsonl", "{task: arithmetic, num_problems: 9}")
    (own / "sums.yaml").write_text(text)
    settings = cells_of(own)[0].settings
    setup = load_setup(settings, own)
    assert setup.reward_funcs == [arithmetic.final_answer_reward]
    assert setup.train_problems(2, 5).to_list() == arithmetic.load_problems(9, "train", 5).to_list()
    assert setup.test_dataset.draw(4, 5).to_list() == arithmetic.load_problems(4, "test", 5).to_list()

    beside = {
        "task": "arithmetic",
        "student": "models/student",
        "config_fields": {"learning_rate": 1e-5, "per_device_eval_batch_size": 6},
    }
    setup = load_setup(beside, own)
    assert setup.student == str(own / "models" / "student")
    assert setup.teacher == arithmetic.demo_model_path("teacher")
    assert setup.valid_steps is arithmetic.valid_steps
    assert setup.train_problems(2, 5).to_list() == arithmetic.load_problems(32, "train", 5).to_list()
    assert setup.batch_size == 6
    assert (setup.config_fields["learning_rate"], setup.config_fields["num_generations"]) == (1e-5, 8)


def test_answers_are_judged_as_they_are_rewarded(own):
    """Messages and text; asynchronous rewards, those that ask for what TRL gives, and those that score not all."""
    (own / "many_rewards.py").write_text(
        "async def slow(prompts, completions, trainer_state, log_metric, **kwargs):\n"
        "    log_metric('seen', 1.0)\n"
        "    return [0.5 * len(answer[0]['content']) for answer in completions]\n"
        "def some(completions, completion_ids, answer, **kwargs):\n"
        "    return [None if text == '?' else 1.0 for text in answer]\n"
        "def first(prompts, completions, answer, **kwargs):\n"
        "    return [float(text == 'a') for text in answer]\n"
        "def steps(prompt, completion):\n"
        "    return (prompt, completion) == ('one', 'xy')\n"
    )
    settings = {
        "task": "arithmetic",
        "reward_funcs": ["many_rewards.slow", "many_rewards.some"],
        "correct_func": "many_rewards.first",
        "valid_steps": "many_rewards.steps",
        "config_fields": {"reward_weights": [1.0, 10.0]},
    }
    prompts = [[{"role": "system", "content": "s"}, {"role": "user", "content": text}] for text in ("one", "two")]
    problems = Dataset.from_dict({"prompt": prompts, "answer": ["a", "?"]})
    rollouts = [Rollout(prompt, "xy", [1], [2, 3]) for prompt in prompts]
    correct, valid, rewards = judge(rollouts, problems, load_setup(settings, own))
    assert (correct, valid, rewards) == ([True, False], [True, False], [11.0, 1.0])

    text = Dataset.from_dict({"prompt": ["1+2+3+4+5=", "2+2+3+4+5="], "answer": ["15", "16"]})
    rollouts = [Rollout(prompt, "#15", [1], [2]) for prompt in text["prompt"]]
    of_task = load_setup({"task": "arithmetic"}, own)
    assert judge(rollouts, text, of_task) == ([True, False], [False, False], [1.0, 0.0])
    assert judge(rollouts, text, replace(of_task, valid_steps=None))[1] == [None, None]


def test_cells_are_shared_out_among_the_gpus_that_are_visible(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    assert _gpus() == ["5", "3"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert _gpus() == []


def test_scope_and_unit_of_the_limit_are_the_experiments(own, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    change(own, "cost_limit: 0.25", "cost_limit: 0.25\ncost_scope: sum")
    cells = [replace(cell, settings={**cell.settings, "held_out": 6}) for cell in cells_of(own)[:3]]
    assert all(cell.settings["cost_scope"] == "sum" for cell in cells)
    record = run_cell(cells[0], own / "out", time.monotonic())
    change(own, "cost_limit: 0.25", "cost_limit: 0.25\ncost_scope: mean")
    cell = replace(cells_of(own)[0], settings={**cells_of(own)[0].settings, "held_out": 6})
    mean = run_cell(cell, own / "out", time.monotonic())
    assert [outcome.cost for outcome in record.outcomes] == pytest.approx(
        [outcome.cost * outcome.length for outcome in mean.outcomes], abs=1e-3
    )
