"""`evaluate` and `calibrate` on a trained student: its folder says what the command line leaves open."""

import json
import shutil

import pytest
from helpers import MINUTE_RUN, error_line, flags

from trl_cmdp.cli import main
from trl_cmdp.evaluation import read_rollout_records
from trl_cmdp.tasks.arithmetic import demo_model_path


RUN_FILE = "_run.json"
GIVEN = {"cost_limit": 0.2, "cost_scope": "worst_prefix", "temperature": 0.9, "max_completion_length": 12}
ROWS = [{"prompt": f"{number}+2+3+4+5=", "answer": str(number + 14)} for number in range(1, 7)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher, six rows of data, and a student trained on the command line for one step."""
    folder = tmp_path_factory.mktemp("student_run")
    shutil.copytree(demo_model_path("teacher"), folder / "teacher")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run = {
        **{name: value for name, value in MINUTE_RUN.items() if name != "max_completion_length"},
        **{"model_name_or_path": demo_model_path("student"), "teacher_model": "teacher", "dataset_name": "rows.jsonl"},
        **{"reward_funcs": "helpers.length_reward", "max_steps": 1, "output_dir": "out"},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["constrained", *flags(run | GIVEN)]) == 0
    return folder


def evaluate(folder, out, *options):
    """Of six rows of data, of which the default is two hundred."""
    command = ["evaluate", "--student", folder / "out", "--dataset", folder / "rows.jsonl", "--output_dir", out]
    return main([str(word) for word in (*command, *options)])


def test_what_the_run_knew_is_taken_and_said(folder, tmp_path, capsys):
    assert evaluate(folder, tmp_path) == 0
    settings, records = read_rollout_records(tmp_path / "records.jsonl")
    assert (settings.teacher, settings.num_problems, settings.split) == (str(folder / "teacher"), 6, "train")
    assert (settings.cost_limit, settings.cost_scope) == (0.2, "worst_prefix")
    assert (settings.temperature, settings.max_new_tokens) == (0.9, 12)
    assert len(records) == 6
    assert all(record.costs is not None for record in records)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "Of the student's training" in line)
    for text in (f"teacher {folder / 'teacher'}", "cost_limit 0.2", "temperature 0.9", "max_new_tokens 12"):
        assert text in line


def test_a_teacher_that_read_prompts_of_its_own_is_said(folder, tmp_path, capsys):
    (tmp_path / RUN_FILE).write_text('{"teacher_prompt": true}')
    shutil.copytree(folder / "out", tmp_path / "student", ignore=shutil.ignore_patterns(RUN_FILE))
    shutil.move(tmp_path / RUN_FILE, tmp_path / "student")
    options = ["--student", str(tmp_path / "student"), "--dataset", str(folder / "rows.jsonl"), "--num_problems", "1"]
    assert main(["evaluate", *options, "--output_dir", str(tmp_path / "records"), "--max_new_tokens", "2"]) == 0
    assert "The teacher of its training read prompts of its own" in capsys.readouterr().out


def test_the_command_line_wins(folder, tmp_path, capsys):
    """Another scope leaves the limit out too, which was of the first one."""
    given = {"cost_scope": "mean", "temperature": 1.0, "max_new_tokens": 8, "num_problems": 2}
    assert evaluate(folder, tmp_path, "--teacher", demo_model_path("student"), *flags(given)) == 0
    settings, _ = read_rollout_records(tmp_path / "records.jsonl")
    assert (settings.teacher, settings.num_problems) == (demo_model_path("student"), 2)
    assert (settings.cost_limit, settings.cost_scope) == (0.35, "mean")
    assert (settings.temperature, settings.max_new_tokens) == (1.0, 8)
    assert "cost_limit" not in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "_run.json is damaged"),
        ("[1]", "is not what a training writes: delete it"),
        ('{"temperature": "hot"}', "is not what a training writes (`temperature`)"),
        ('{"cost_limit": NaN}', "is not what a training writes (`cost_limit`)"),
    ],
)
def test_a_damaged_file_is_one_line(content, message, folder, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / RUN_FILE).write_text(content)
    (tmp_path / "out" / "config.json").write_text("{}")  # a folder of a model, as far as the command line looks
    shutil.copy(folder / "rows.jsonl", tmp_path)
    assert evaluate(tmp_path, tmp_path / "evaluation") == 2
    assert message in error_line(capsys)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"teachers": ["near", "far"]}, "with the teachers near, far: name one with --teacher"),
        ({"teacher_model_server_url": "http://gpu:8000"}, "give --teacher_model_server_url http://gpu:8000"),
        ({"limit_of_another_cost": 3.0}, "was on another cost than the divergence"),
    ],
)
def test_what_cannot_be_taken_is_said(content, said, folder, tmp_path, capsys):
    """A key goes to no address that a file names, and a limit is of the cost that it was on."""
    shutil.copytree(folder / "out", tmp_path / "out")
    (tmp_path / "out" / RUN_FILE).write_text(json.dumps(content))
    shutil.copy(folder / "rows.jsonl", tmp_path)
    assert evaluate(tmp_path, tmp_path / "evaluation", "--num_problems", "1", "--max_new_tokens", "4") == 0
    assert said in capsys.readouterr().out
    settings, _ = read_rollout_records(tmp_path / "evaluation" / "records.jsonl")
    assert settings.teacher is None
    assert settings.cost_limit == 0.35


@pytest.mark.parametrize(("options", "kind"), [([], str), (["--conversational", "true"], list)])
def test_prompts_are_what_they_were_in_training(options, kind, folder, tmp_path):
    """Text, although there is a chat template, unless messages are asked for."""
    shutil.copytree(folder / "out", tmp_path / "out")
    (tmp_path / "out" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    shutil.copy(folder / "rows.jsonl", tmp_path)
    sizes = ["--num_problems", "1", "--max_new_tokens", "4"]
    assert evaluate(tmp_path, tmp_path / "evaluation", *sizes, *options) == 0
    _, (record,) = read_rollout_records(tmp_path / "evaluation" / "records.jsonl")
    assert type(record.prompt) is kind
