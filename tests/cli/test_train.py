"""The training commands: files and overrides in, a plain checkpoint out; what is refused; what accelerate is given."""

import contextlib
import json
import os
import pty
import re
import shlex
import subprocess
import sys
import threading

import pytest
import torch
import yaml
from fake_server import KEY, serving
from fake_vllm import FakeServer
from filelock import FileLock
from helpers import (
    CHARACTERS,
    MINUTE_RUN,
    error_line,
    make_dataset,
    make_model,
    make_teacher,
    make_tokenizer,
    save_model,
)
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from trl_cmdp.cli import main
from trl_cmdp.reports import read_runs


COMMANDS = ["constrained", "lagrangian", "gkd", "minillm"]
SETTINGS = {**MINUTE_RUN, "reward_funcs": ["helpers.length_reward"], "max_steps": 3, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A student, teachers, a dataset as JSONL, Parquet and a folder of splits, and a YAML file that names them."""
    folder = tmp_path_factory.mktemp("train")
    save_model(folder / "student", make_model(), make_tokenizer())
    save_model(folder / "teacher", make_teacher(), make_tokenizer())
    save_model(folder / "stranger", make_teacher(), make_tokenizer(CHARACTERS[::-1]))
    dataset = make_dataset()
    dataset.to_json(folder / "data.jsonl")
    dataset.to_parquet(folder / "data.parquet")
    (folder / "splits").mkdir()
    dataset.to_json(folder / "splits" / "train.jsonl")
    dataset.select(range(4)).to_json(folder / "splits" / "test.jsonl")
    write_config(folder / "config.yaml", folder)
    return folder


def write_config(path, folder, **changes):
    named = {
        "model_name_or_path": str(folder / "student"),
        "teacher_model": str(folder / "teacher"),
        "dataset_name": str(folder / "data.jsonl"),
    }
    path.write_text(yaml.safe_dump({**SETTINGS, **named, **changes}))


def train(command, config, output_dir, *arguments):
    return main([command, "--config", str(config), "--output_dir", str(output_dir), *arguments])


def trained_args(output_dir):
    """The arguments that a run used."""
    return torch.load(output_dir / "training_args.bin", weights_only=False)


def check_what_is_said(command, folder, output_dir, out):
    """First what is trained on what, last how the limit held and what comes next."""
    rows = dict(re.findall(r"(?m)^\| ([\w ]+?) +\| (.*?) +\|$", out))
    assert out.count("| rollouts a step") == 1
    assert command in rows["training"].lower()
    assert (rows["student"], rows["teacher"]) == (str(folder / "student"), str(folder / "teacher"))
    assert rows["data"] == f"32 rows, {folder / 'data.jsonl'}"
    assert rows["reward"] == "length_reward" + ", only logged" * (command in ("gkd", "minillm"))
    assert rows["rollouts a step"] == "4 (4 of each prompt), of at most 6 tokens"
    assert rows["limit"] == "0.2 nats per token" + ", only measured against" * (command != "constrained")
    assert rows["device"] == "CPU, float32"
    assert re.search(
        r"Trained to step 1 in \d+ s\.\nWithin the limit .*: [\d.]+% \[[\d.]+, [\d.]+\] of 4 rollouts", out
    )
    assert f"Next: trl-cmdp evaluate --student {output_dir} --dataset HELD_OUT.jsonl\n" in out
    assert f"trl-cmdp report {output_dir}\n" in out
    assert read_runs([output_dir])[0].steps == 1  # what it reads is there


@pytest.mark.parametrize("command", COMMANDS)
def test_trains_and_saves(command, folder, tmp_path, capsys):
    assert train(command, folder / "config.yaml", tmp_path, "--max_steps", "1", "--cost-limit", "0.2") == 0
    check_what_is_said(command, folder, tmp_path, capsys.readouterr().out)
    args = trained_args(tmp_path)
    assert type(args).__name__.lower().startswith(command)
    assert (args.max_steps, args.cost_limit, args.learning_rate) == (1, 0.2, 1e-2)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    student = AutoModelForCausalLM.from_pretrained(folder / "student").state_dict()
    assert any(not torch.equal(saved[name], student[name]) for name in student)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    (run,) = read_runs([tmp_path])  # what `trl-cmdp report --watch` draws
    assert run.steps == 1
    assert "train_runtime" in run.history[-1]


@pytest.mark.parametrize(
    ("dataset", "arguments"),
    [
        ("data.parquet", []),
        ("splits", ["--eval_strategy", "steps", "--eval_steps", "1", "--per_device_eval_batch_size", "4"]),
    ],
)
def test_parquet_and_folders(dataset, arguments, folder, tmp_path, capsys):
    dataset_name = ["--dataset_name", str(folder / dataset)]
    assert train("gkd", folder / "config.yaml", tmp_path, "--max_steps", "1", *dataset_name, *arguments) == 0
    assert ("eval_constraint/cost" in capsys.readouterr().out) == bool(arguments)


def test_a_mixture_and_no_reward(folder, tmp_path):
    """The teacher alone, on a dataset of the YAML file."""
    mixture = [{"path": "json", "data_files": str(folder / "data.jsonl")}]
    config = tmp_path / "config.yaml"
    write_config(config, folder, datasets=mixture, dataset_name=None, reward_funcs=None, max_steps=1)
    assert train("constrained", config, tmp_path / "out") == 0


TASK = ["--max_steps", "1", "--logging_steps", "1", "--task", "table"]


@pytest.mark.parametrize(
    ("arguments", "reward"),
    [([], "final_answer_reward"), (["--reward_funcs", "helpers.length_reward"], "length_reward")],
)
def test_a_task_gives_problems_and_reward(arguments, reward, folder, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    write_config(config, folder, reward_funcs=None, dataset_name=str(folder / "splits"))
    evaluation = ["--eval_strategy", "steps", "--eval_steps", "1", "--per_device_eval_batch_size", "4"]
    assert train("constrained", config, tmp_path / "out", *TASK, *evaluation, *arguments) == 0
    out = capsys.readouterr().out
    assert f"'rewards/{reward}/mean'" in out
    assert f"'eval_rewards/{reward}/mean'" in out


def test_problems_of_a_task_are_drawn_by_seed(folder, tmp_path, monkeypatch):
    from trl_cmdp.tasks import table

    calls = []
    load_problems = table.load_problems
    monkeypatch.setattr(
        table, "load_problems", lambda *args, **kwargs: calls.append((args, kwargs)) or load_problems(*args, **kwargs)
    )
    arguments = [*TASK, "--seed", "7", "--task_problems", "5"]
    assert train("constrained", folder / "config.yaml", tmp_path, *arguments) == 0
    assert calls == [((5, "train", 7), {"path": str(folder / "data.jsonl")})]


def test_the_key_of_a_server_is_read_from_the_environment(folder, tmp_path, monkeypatch, capsys):
    """Without it the mistake names the variable; with it the run trains, and the key is in no file."""
    monkeypatch.setenv("TRL_CMDP_TEACHER_API_KEY", "")  # none
    with serving(FakeServer(make_teacher().eval(), str(folder / "teacher"), key=KEY)) as server:
        arguments = ["--max_steps", "1", "--teacher_model_server_url", server.url]
        assert train("constrained", folder / "config.yaml", tmp_path, *arguments) == 2
        said = error_line(capsys)
        assert "needs an API key" in said
        assert "TRL_CMDP_TEACHER_API_KEY in the environment" in said
        monkeypatch.setenv("TRL_CMDP_TEACHER_API_KEY", KEY)
        assert train("constrained", folder / "config.yaml", tmp_path, *arguments) == 0
    assert trained_args(tmp_path).max_steps == 1
    assert KEY not in "".join(capsys.readouterr())
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_reward_of_the_working_directory(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (tmp_path / "rewards_of_mine.py").write_text(
        "def two(completions, **kwargs):\n    return [2.0] * len(completions)\n"
    )
    arguments = ["--max_steps", "1", "--logging_steps", "1", "--reward_funcs", "rewards_of_mine.two"]
    assert train("constrained", folder / "config.yaml", tmp_path / "out", *arguments) == 0
    assert "'rewards/two/mean': '2'" in capsys.readouterr().out


@pytest.mark.parametrize(("limit", "parsed"), [("auto", "auto"), ("0.3", 0.3), ('{"teacher": 0.4}', {"teacher": 0.4})])
def test_limits_are_numbers_or_words(limit, parsed, folder, tmp_path):
    from trl_cmdp import ConstrainedDistillConfig
    from trl_cmdp.cli._train import TrainingParser

    parser = TrainingParser("constrained", ConstrainedDistillConfig)
    arguments = ["--config", str(folder / "config.yaml"), "--output_dir", str(tmp_path), "--cost_limit", limit]
    arguments += ["--max_steps", "60"]  # more than the imitation phase of "auto"
    assert parser.parse_args_and_config(arguments)[-1].cost_limit == parsed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset_name", "missing.jsonl"], "missing.jsonl"),
        (["--dataset_train_split", "validation"], "no split 'validation', it has 'train'"),
        (["--model_name_or_path", "./missing"], "missing"),
        (["--reward_funcs", "nonsense"], "Unknown reward 'nonsense': give one of accuracy_reward"),
        (["--reward_funcs", "no_such_module.reward"], "No module named 'no_such_module'"),
        (["--reward_funcs", "helpers.nothing"], "The module helpers has no reward 'nothing'"),
        (["--teacher_model", "STRANGER"], "different tokenizers"),
        (["--cost_limit", "-1"], "--cost_limit must be positive"),
        (["--cost_limit", "tight"], "must be a number, 'auto'"),
        (["--max_steps", "many"], "--max_steps: must be an integer, got 'many'"),
        (["--cost-limt", "0.2"], "unrecognized arguments: --cost_limt. Did you mean --cost_limit?"),
        (["--accelerate_config", "fsdp9"], "Accelerate config fsdp9 is neither"),
        (
            ["--teacher_model_server_url", "http://127.0.0.1:9"],
            "teacher server at http://127.0.0.1:9 is not available",
        ),
        (["--task", "chess"], "There is no task 'chess'; there are arithmetic, chains, gsm8k"),
        (["--task", "table", "--task_problems", "99"], "from 1 to the 32 problems"),
        (
            ["--task", "arithmetic", "--task_problems", "9"],
            "The task arithmetic: got an unexpected keyword argument 'path'",
        ),
        (["--resume_from_checkpoint", "missing"], "there is no folder 'missing'"),
        (["--config"], "--config expects a YAML file"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, folder, tmp_path, capsys):
    arguments = [str(folder / "stranger") if argument == "STRANGER" else argument for argument in arguments]
    assert train("constrained", folder / "config.yaml", tmp_path, *arguments) == 2
    assert message in error_line(capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "data.jsonl has no rows"),
        ('{"prompt": "1+2="}\n{"prompt": "3+', "data.jsonl, line 2 is not JSON: Unterminated string"),
        ('{"question": "1+2="}\n', "The training dataset has no column 'prompt', it has 'question'"),
        (
            '{"prompt": "1+2="}\n{"prompt": null}\n',
            "Row 1 of the training dataset: the prompt (column 'prompt') is null",
        ),
        ('{"prompt": [{"from": "human", "value": "1+2="}]}\n', "messages in ShareGPT's format"),
        ('{"prompt": [{"role": "user", "content": "1+2="}]}\n', "messages, and the tokenizer has no chat template"),
    ],
)
@pytest.mark.parametrize("arguments", [[], ["--dataset_streaming"]], ids=["rows", "stream"])
def test_a_dataset_that_cannot_be_trained_on_is_one_line(content, message, arguments, folder, tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text(content)
    dataset = ["--dataset_name", str(tmp_path / "data.jsonl"), *arguments]
    assert train("constrained", folder / "config.yaml", tmp_path / "out", *dataset) == 2
    assert message in error_line(capsys)


@pytest.mark.parametrize(("content", "message"), [("", "a file is empty"), ("words\n", "JSON parse error")])
def test_a_mixture_that_cannot_be_read_is_one_line(content, message, folder, tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text(content)
    mixture = [{"path": "json", "data_files": str(tmp_path / "data.jsonl")}]
    write_config(tmp_path / "config.yaml", folder, datasets=mixture, dataset_name=None)
    assert train("constrained", tmp_path / "config.yaml", tmp_path / "out") == 2
    assert f"The `datasets` of the YAML file cannot be read: {message}" in error_line(capsys)


def test_a_missing_tracker_is_one_line_with_its_extra(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("trl_cmdp.trainers.engine.checks.get_available_reporting_integrations", list)
    assert train("gkd", folder / "config.yaml", tmp_path, "--report_to", "wandb") == 2
    assert "names 'wandb', which is not installed: pip install \"trl-cmdp[wandb]\"" in error_line(capsys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_model": None, "reward_funcs": None}, "A teacher is needed: --teacher_model"),
        ({"model_name_or_path": None}, "--model_name_or_path is needed"),
        ({"dataset_name": None}, "--dataset_name or --task (or datasets in the YAML file) is needed"),
        ({"datasets": [{"pth": "json"}]}, "unexpected keyword argument 'pth'"),
        ({"cost_limt": 0.2}, "config.yaml: there is no option 'cost_limt'. Did you mean cost_limit?"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(changes, message, folder, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    write_config(config, folder, **changes)
    assert train("constrained", config, tmp_path / "out") == 2
    assert message in error_line(capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_forgotten_teacher_is_one_line(command, tmp_path, capsys):
    """With the three ways to name one, before anything is loaded: neither the student nor the data are there."""
    missing = ["--model_name_or_path", "./nothing", "--dataset_name", "./nothing.jsonl"]
    assert main([command, *missing, "--output_dir", str(tmp_path), "--reward_funcs", "helpers.length_reward"]) == 2
    line = error_line(capsys)
    for option in ("--teacher_model with", "--teacher_model_server_url", "--teacher_adapter_name base"):
        assert option in line


INTERRUPTED = """
import os, signal
from pathlib import Path


def reward(completions, **kwargs):
    if not Path("interrupted").exists():
        Path("interrupted").touch()
        os.kill(os.getpid(), signal.SIGINT)
    return [float(len(completion)) for completion in completions]
"""


@pytest.mark.usefixtures("in_foreground")
def test_ctrl_c_and_the_command_that_goes_on(folder, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reward_of_ctrl_c.py").write_text(INTERRUPTED)
    arguments = ["--reward_funcs", "reward_of_ctrl_c.reward", "--resume-from-checkpoint=false"]
    assert train("gkd", folder / "config.yaml", tmp_path / "my out", *arguments) == 130
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "my out" / "model.safetensors").exists()
    (command,) = re.findall(r"Continue with: trl-cmdp (.*)", caplog.text)
    resumed = shlex.split(command)
    assert resumed[-2:] == ["--resume_from_checkpoint", "true"]
    assert "--resume-from-checkpoint=false" not in resumed
    assert main(resumed) == 0
    assert f"continues from step 1 ({tmp_path / 'my out' / 'checkpoint-1'})" in caplog.text
    assert (tmp_path / "my out" / "model.safetensors").exists()


@pytest.mark.slow
def test_ctrl_c_in_processes_of_accelerate(folder, tmp_path):
    """As in a terminal, all processes get it: the one that trains saves a checkpoint, the one that launched it waits."""
    to_all = INTERRUPTED.replace("os.kill(os.getpid()", "os.killpg(os.getpgrp()")
    (tmp_path / "reward_of_ctrl_c.py").write_text(to_all)
    foreground = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    foreground += "from trl_cmdp.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", foreground, "gkd", "--config", str(folder / "config.yaml"), "--output_dir", "out"]
    command += ["--reward_funcs", "reward_of_ctrl_c.reward", "--num_processes", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, start_new_session=True, check=False
    )
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert "Continue with: trl-cmdp gkd " in done.stderr
    assert (tmp_path / "out" / "checkpoint-1" / "trainer_state.json").exists()


def test_what_refuses_a_run_is_one_line(folder, tmp_path, capsys):
    """Another process that holds the folder, another run in it, a checkpoint of another run, and none at all."""
    command = ("constrained", folder / "config.yaml", tmp_path, "--max_steps", "1", "--save_strategy", "steps")
    with FileLock(tmp_path / "_run.lock"):
        assert train(*command) == 2
    assert "Another run is training into" in error_line(capsys)
    assert train(*command, "--resume_from_checkpoint", "true") == 2
    assert "no whole checkpoint" in error_line(capsys)
    assert train(*command) == 0
    for arguments in ([], ["--resume_from_checkpoint", "true"]):
        assert train(*command, "--learning_rate", "0.5", *arguments) == 2
        assert "--learning_rate 0.01, now 0.5" in error_line(capsys)
    named = ["--resume_with_changes", "learning_rate", "--resume_from_checkpoint", str(tmp_path / "checkpoint-1")]
    assert train(*command, "--learning_rate", "0.5", *named) == 0
    assert train(*command, "--learning_rate", "0.5", "--overwrite_output_dir", "true") == 0


def test_a_complete_run_is_saved_again_and_trains_no_further(folder, tmp_path):
    command = ("gkd", folder / "config.yaml", tmp_path, "--max_steps", "1", "--save_strategy", "steps")
    assert train(*command) == 0
    saved = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").unlink()
    assert train(*command, "--resume_from_checkpoint", "true") == 0
    assert (tmp_path / "model.safetensors").read_bytes() == saved
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_full_disk_at_the_final_save_is_one_line(folder, tmp_path, capsys, monkeypatch):
    assert train("gkd", folder / "config.yaml", tmp_path, "--max_steps", "1") == 0
    before = (tmp_path / "model.safetensors").read_bytes()

    def no_room(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", no_room)
    assert train("gkd", folder / "config.yaml", tmp_path, "--max_steps", "1", "--seed", "3") == 2
    line = error_line(capsys)
    assert "could not be written ([Errno 28] No space left on device)" in line
    assert "What was there before is whole" in line
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_what_happens_in_training_is_raised(folder, tmp_path, monkeypatch):
    def broken(completions, **kwargs):
        raise ValueError("of the reward's own")

    monkeypatch.setattr("helpers.length_reward", broken)
    with pytest.raises(ValueError, match="of the reward's own"):
        train("constrained", folder / "config.yaml", tmp_path, "--max_steps", "1")


def test_several_processes_go_through_accelerate(folder, tmp_path, monkeypatch):
    """Launch arguments of the command line and of the file reach accelerate, all others the processes it starts."""
    from trl_cmdp.cli import _train

    launches = []
    monkeypatch.setattr(_train, "launch_command", launches.append)
    config = tmp_path / "config.yaml"
    write_config(config, folder, num_processes=2, max_steps=1)
    rest = ["--config", str(config), "--output_dir", str(tmp_path / "out")]
    assert main(["gkd", *rest, "--accelerate_config", "fsdp2", "--main_process_port", "0", "--lmbda", "1"]) == 0
    (args,) = launches
    assert args.config_file.endswith("fsdp2.yaml")
    assert (args.num_processes, args.main_process_port) == (2, 0)
    assert (args.module, args.training_script) == (True, "trl_cmdp")
    assert args.training_script_args == ["gkd", "--launched", *rest, "--lmbda", "1"]

    # Such a process trains, and does not launch again.
    assert main(args.training_script_args) == 0
    assert len(launches) == 1
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_several_gpus_take_a_process_each(folder, tmp_path, monkeypatch):
    from trl_cmdp import GKDDistillConfig
    from trl_cmdp.cli import _train

    launches = []
    monkeypatch.setattr(_train, "launch_command", launches.append)
    monkeypatch.setattr(GKDDistillConfig, "n_gpu", 2)
    assert train("gkd", folder / "config.yaml", tmp_path) == 0
    assert launches[0].training_script_args[:2] == ["gkd", "--launched"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_grouped(command, capsys):
    with pytest.raises(SystemExit) as error:
        main([command, "--help_all"])
    assert error.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: trl-cmdp {command} [--config FILE.yaml]")
    titles = ["script and dataset:", "model:", "dataset mixture (YAML):", "training (GRPOConfig):", "distillation:"]
    positions = [out.index(f"\n{title}\n") for title in titles]
    assert positions == sorted(positions)
    assert positions[0] < out.index("--teacher_model ") < positions[1]
    assert positions[-1] < out.index("--cost_limit ")


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    for command in (
        *COMMANDS,
        "demo",
        "calibrate",
        "compare",
        "evaluate",
        "report",
        "env",
        "tasks",
        "init",
        "completion",
    ):
        assert re.search(rf"\n    {command}\s", out)


def test_bar_on_a_terminal(folder, tmp_path, monkeypatch):
    """A real terminal shows one bar that is drawn anew, with reward, cost against the limit, and satisfaction."""
    controller, terminal = pty.openpty()
    shown = bytearray()

    def read():
        with contextlib.suppress(OSError):  # the end of a terminal that nobody holds any more
            while part := os.read(controller, 2**16):
                shown.extend(part)

    reader = threading.Thread(target=read)
    reader.start()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    with open(terminal, "w") as stdout, contextlib.redirect_stdout(stdout):
        code = train("constrained", folder / "config.yaml", tmp_path, "--cost_limit", "1.7", "--disable_tqdm", "false")
    reader.join()
    os.close(controller)
    assert code == 0
    text = shown.decode()
    assert "\x1b[" in text  # drawn in place
    assert "3/3" in text
    assert re.search(r"reward \d\.\d{3} · cost \d\.\d{3}/1\.7 · satisfied \d\.\d{3}", text)
