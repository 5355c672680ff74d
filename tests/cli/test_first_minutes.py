"""What the command line says before anything heavy is imported: mistakes with what was meant, and what there is."""

import json
import shutil
import subprocess
import sys
from importlib import import_module

import pytest
import yaml
from helpers import error_line, make_dataset, make_model, make_teacher, make_tokenizer, run_python, save_model

from trl_cmdp import __version__
from trl_cmdp.cli import main
from trl_cmdp.cli._parser import Mistake
from trl_cmdp.cli._tasks import EMBEDDED_TASKS, task_names


HEAVY = {"accelerate", "datasets", "numpy", "peft", "scipy", "tokenizers", "torch", "transformers", "trl"}
ON_A_CPU = ["--use_cpu", "--bf16", "false"]
COMMANDS = ["constrained", "lagrangian", "gkd", "minillm"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A student and a teacher in a folder, data, rewards, and a file of settings that begins a training."""
    folder = tmp_path_factory.mktemp("first")
    save_model(folder / "models" / "student", make_model(), make_tokenizer())
    save_model(folder / "models" / "teacher", make_teacher(), make_tokenizer())
    make_dataset().to_json(folder / "data.jsonl")
    (folder / "my_rewards.py").write_text(
        "def final_answer(completions, **kwargs):\n    return [1.0] * len(completions)\n"
    )
    (folder / "broken_rewards.py").write_text("def final_answer(completions:\n")
    (folder / "a_file").write_text("")
    settings = {
        "model-name-or-path": "models/student",
        "teacher_model": "models/teacher",
        "dataset_name": "data.jsonl",
        "reward-funcs": ["my_rewards.final_answer"],
        "output_dir": "out",
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(settings))
    (folder / "typo.yaml").write_text(yaml.safe_dump({**settings, "cost-limt": 0.2}))
    (folder / "twice.yaml").write_text(yaml.safe_dump({**settings, "cost-limit": 0.2, "cost_limit": 0.3}))
    (folder / "value.yaml").write_text(yaml.safe_dump({**settings, "dataset_name": "dta.jsonl"}))
    return folder


# Arguments, and what the one line says of them.
MISTAKES = [
    ("constrianed", "Did you mean constrained?"),
    ("gkd --config mine.yml", "there is no file 'mine.yml'. Did you mean mine.yaml?"),
    ("gkd --config mine.yaml --max-step 5", "unrecognized arguments: --max_step. Did you mean --max_steps?"),
    ("gkd --config mine.yaml --teacher models/teacher", "Did you mean --teacher_model?"),
    ("gkd --config mine.yaml --student models/student", "Did you mean --model_name_or_path?"),
    ("gkd --config mine.yaml --bf16 true --lerning_rate 1", "Did you mean --learning_rate?"),
    ("gkd --config mine.yaml --num_proceses 2", "Did you mean --num_processes?"),
    ("gkd --config typo.yaml", "typo.yaml: there is no option 'cost_limt'. Did you mean cost_limit?"),
    ("gkd --config twice.yaml", "twice.yaml: 'cost_limit' is given twice"),
    ("gkd --config value.yaml", "value.yaml: dataset_name: 'dta.jsonl' is no file. Did you mean data.jsonl?"),
    ("gkd --config mine.yaml --config mine.yaml", "--config is given twice"),
    ("gkd --config data.jsonl", "data.jsonl: it"),
    ("gkd --config mine.yaml --teacher_model ./nofolder", "--teacher_model: './nofolder' is neither a folder nor a Hub id"),
    ("gkd --config=mine.yaml --teacher_model models/x/teachr", "--teacher_model: 'models/x/teachr' is neither"),
    ("gkd --config mine.yaml --model_name_or_path ./models/studnt", "Did you mean models/student?"),
    ("gkd --config mine.yaml --teacher_model models", "--teacher_model: 'models' is a folder without a model"),
    ("gkd --config mine.yaml --teacher_model data.jsonl", "is a file: give the folder of the model"),
    ("gkd --config mine.yaml --dataset_name ./dat", "'./dat' is neither a file, a folder nor a Hub id"),
    ("gkd --config mine.yaml --task aritmetic", "no task 'aritmetic'"),
    ("gkd --config mine.yaml --reward_funcs acuracy_reward", "Did you mean accuracy_reward?"),
    ("gkd --config mine.yaml --reward_funcs my_rewardz.final_answer", "No module named 'my_rewardz'. Did you mean my_rewards?"),
    ("gkd --config mine.yaml --reward_funcs my_rewards.finl_answer", "Did you mean my_rewards.final_answer?"),
    ("gkd --config mine.yaml --reward_funcs broken_rewards.final_answer", "broken_rewards.py, line 1: "),
    ("gkd --config mine.yaml --cost_scope meen", "must be one of mean, sum, worst_prefix, got 'meen'. Did you mean mean?"),
    ("gkd --config mine.yaml --learning_rate fast", "--learning_rate: must be a number, got 'fast'"),
    ("gkd --config mine.yaml --cost-limit 0", "--cost_limit must be positive"),
    ("constrained --config mine.yaml --cost-limit tight", "--cost_limit must be a number, 'auto'"),
    ("constrained --config mine.yaml --cost_limit auto --max_steps 50", "the whole run of 50 steps. Train longer or lower --auto"),
    ("gkd --config mine.yaml --output_dir a_file/out", "'a_file/out' cannot be a folder"),
    ("gkd --model_name_or_path models/student --task gsm8k", "A teacher is needed: --teacher_model with a folder or a Hub"),
    ("constrained --config mine.yaml --cost-limit 0", "use trl-cmdp gkd."),
    ("gkd --config mine.yaml --reward_weights 1 0.5", "one number for each of the 1 rewards, got 2"),
    ("gkd --teacher_model models/teacher", "--model_name_or_path is needed: the student"),
    ("gkd --model_name_or_path models/student", "--dataset_name or --task"),
    ("evaluate --studnt models/student", "unrecognized arguments: --studnt. Did you mean --student?"),
    ("evaluate --student models/studnt --teacher ./teacher", "--teacher: './teacher' is neither"),
    ("calibrate --student models/student --dataset dta.jsonl", "'dta.jsonl' is no file. Did you mean data.jsonl?"),
    ("evaluate --student models/student --task nestd", "Did you mean nested?"),
    ("evaluate --records record.jsonl", "there is no file 'record.jsonl'"),
    ("demo --cost-limt 0.2", "Did you mean --cost_limit?"),
    ("demo --output-dir a_file/out", "'a_file/out' cannot be a folder"),
    ("compare nested --metods constrained", "Did you mean --methods?"),
    ("report nowhere", "nowhere does not exist"),
    ("serve models/techer/", "'models/techer/' is neither a folder nor a Hub id"),
    ("serve models/teacher --prot 8001", "Did you mean --port?"),
    ("serve models/teacher --port 80000", "must lie between 1 and 65535"),
    ("init constraint", "Did you mean constrained?"),
]  # fmt: skip


def run_each(lines: list[str], folder, tmp_path) -> list[dict]:
    """Exit code and standard error of each command, all in one fresh process, and which modules it has loaded at the end."""
    script = tmp_path / "each.py"
    script.write_text(
        "import contextlib, io, json, os, sys\n"
        "from trl_cmdp.cli import main\n"
        "lines, folder = json.loads(sys.argv[1]), sys.argv[2]\n"
        "os.chdir(folder)\n"
        "for line in lines:\n"
        "    error = io.StringIO()\n"
        "    with contextlib.redirect_stderr(error):\n"
        "        try: code = main(line.split())\n"
        "        except SystemExit as ended: code = ended.code\n"
        "    loaded = sorted({name.split('.')[0] for name in sys.modules})\n"
        "    print(json.dumps({'code': code, 'error': error.getvalue(), 'loaded': loaded}))\n"
    )
    done = run_python(script, json.dumps(lines), folder)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_mistake_is_one_line_with_what_was_meant_and_loads_nothing(folder, tmp_path):
    results = run_each([line for line, _ in MISTAKES], folder, tmp_path)
    for (line, expected), result in zip(MISTAKES, results, strict=True):
        assert result["code"] == 2, line
        assert expected in result["error"], line
        assert result["error"].count("\n") == 1, f"{line}: {result['error']}"
        assert "`" not in result["error"], f"Python advice for {line}: {result['error']}"
    assert not HEAVY & set(results[-1]["loaded"])


def test_what_the_command_line_replaces_in_the_file_is_not_looked_at(folder, monkeypatch):
    from trl_cmdp.cli._training_arguments import check_training_arguments

    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    with pytest.raises(Mistake, match=r"value\.yaml: dataset_name: 'dta\.jsonl' is no file"):
        check_training_arguments("gkd", ["--config", "value.yaml"])
    check_training_arguments("gkd", ["--config", "value.yaml", "--dataset_name", "data.jsonl"])


def test_the_installed_command_says_a_mistake_in_one_line(folder):
    done = subprocess.run(
        [sys.executable, "-m", "trl_cmdp", "gkd", "--config", "mine.yaml", "--max-stps", "3"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "trl-cmdp gkd: error: unrecognized arguments: --max_stps. Did you mean --max_steps?\n"


def test_dashes_and_underscores_are_the_same_in_every_option_of_every_command(capsys):
    """Each option is declared with underscores, which is what `main` makes of dashes."""
    from trl_cmdp.cli._parser import Parser, underscored

    declared = []
    add = Parser._add_action
    try:
        Parser._add_action = lambda self, action: declared.extend(action.option_strings) or add(self, action)
        assert main([]) == 0  # builds every parser
    finally:
        Parser._add_action = add
    assert "usage: trl-cmdp" in capsys.readouterr().out
    options = [option for option in declared if option.startswith("--")]
    assert options
    assert underscored(options) == options
    assert underscored(["--a-b=c-d", "e-f", "-g", "--", "--h-i"]) == ["--a_b=c-d", "e-f", "-g", "--", "--h-i"]


def test_version_and_a_bare_call(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"trl-cmdp {__version__}\n"
    assert main([]) == 0
    assert "constrained" in capsys.readouterr().out


def test_tasks_show_a_problem_of_each(capsys):
    assert main(["tasks"]) == 0
    out = capsys.readouterr().out
    for name in task_names():
        task = import_module(f"trl_cmdp.tasks.{name}")
        prompt, answer = task.SAMPLE_PROBLEM
        assert f"{name}\n" in out
        assert prompt in out
        stated = f"#{answer}" if name in EMBEDDED_TASKS else f"\\boxed{{{answer}}}"
        wrong = stated.replace(answer, "7654321")
        completions = [stated, wrong]
        rewards = task.final_answer_reward(completions=completions, prompts=[prompt] * 2, answer=[answer] * 2)
        assert rewards == [1.0, 0.0], name
        if name in EMBEDDED_TASKS:
            assert task.valid_steps(prompt, task.worked_solution(prompt))
            assert task.worked_solution(prompt).endswith(f"#{answer}")


@pytest.mark.parametrize("command", COMMANDS)
def test_init_writes_settings_that_the_command_takes(command, folder, tmp_path, monkeypatch, capsys):
    from trl_cmdp.cli._training_arguments import check_training_arguments

    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    file = tmp_path / "settings" / "mine.yaml"
    assert main(["init", command, "--output", str(file)]) == 0
    assert f"trl-cmdp {command} --config {file} --dry_run" in capsys.readouterr().out
    assert main(["init", command]) == 0
    text = file.read_text()
    assert capsys.readouterr().out == text
    assert max(map(len, text.splitlines())) < 120

    (folder / "data").mkdir(exist_ok=True)
    shutil.copy(folder / "data.jsonl", folder / "data" / "train.jsonl")
    check_training_arguments(command, ["--config", str(file)])
    # Every line that is commented out is a setting, with its default.
    lines = [line.removeprefix("# ") for line in text.splitlines()]
    settings = [line for line in lines if line.partition(":")[0] in yaml.safe_load(text) or line[:1].islower()]
    shown = yaml.safe_load(
        "\n".join(line for line in settings if ": " in f"{line} " and " " not in line.partition(":")[0])
    )
    assert {"model_name_or_path", "teacher_model", "cost_limit", "learning_rate"} <= shown.keys()
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(shown))
    check_training_arguments(command, ["--config", str(tmp_path / "all.yaml")])

    assert main(["init", command, "--output", str(file)]) == 2
    assert "is there already" in error_line(capsys)


def test_a_dry_run_says_what_it_found_and_keeps_nothing(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    tiny = "--num_generations 4 --per-device-train-batch-size 4 --max_completion_length 6 --max-steps 9"
    there = sorted(path.name for path in folder.rglob("*"))
    data = make_dataset()  # with prompts of the teacher's own
    data.add_column("teacher_prompt", ["9+9=18#"] * len(data)).to_json(tmp_path / "data.jsonl")
    tiny += f" --dataset_name {tmp_path / 'data.jsonl'}"
    assert main(["constrained", "--config", "mine.yaml", *tiny.split(), *ON_A_CPU, "--dry-run"]) == 0
    out = capsys.readouterr().out
    for said in (
        "one step was trained and thrown away",
        "32 rows",
        "4 (4 of each prompt)",
        "final_answer 1, cost ",
        "the teacher's:  9+9=18#",
    ):
        assert said in out
    for said in ("limit 0.35", "cut at --max_completion_length", "GiB", "of 9"):
        assert said in out
    assert sorted(path.name for path in folder.rglob("*") if "__pycache__" not in str(path)) == there

    # A run that is there stays as it is, also where the real one would overwrite it.
    trained = [
        *tiny.split(),
        *ON_A_CPU,
        "--max_steps",
        "1",
        "--save_strategy",
        "steps",
        "--save_steps",
        "1",
        "--output_dir",
        "kept",
    ]
    assert main(["gkd", "--config", "mine.yaml", *trained]) == 0
    kept = {path: path.stat().st_mtime_ns for path in (folder / "kept").rglob("*") if path.is_file()}
    other = [*trained, "--seed", "7", "--dry_run"]
    assert main(["gkd", "--config", "mine.yaml", *other]) == 2
    assert "holds another run" in error_line(capsys)
    assert main(["gkd", "--config", "mine.yaml", *other, "--overwrite_output_dir"]) == 0
    assert main(["gkd", "--config", "mine.yaml", *trained, "--dry_run", "--resume_from_checkpoint", "true"]) == 0
    assert "is complete, no step is left" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_dry_run_looks_for_the_trackers_too(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert main(["gkd", "--config", "mine.yaml", "--dry_run", "--report_to", "nothing", *ON_A_CPU]) == 2
    assert "--report_to names 'nothing', which is no tracker" in error_line(capsys)


@pytest.mark.skipif(shutil.which("bash") is None, reason="completes for bash")
def test_completion_in_bash(tmp_path, capsys):
    """The script, asked by a real shell as the TAB key asks it."""
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion.sh"
    script.write_text(capsys.readouterr().out)
    assert main(["completion", "zsh"]) == 0
    assert "bashcompinit" in capsys.readouterr().out

    asked = ["con", "constrained --cost_li", "gkd --cost_scope w", "evaluate --task ne", "evaluate --stud", "gkd x"]
    lines = [f"source {script}"]
    for words in asked:
        lines.append(
            f'COMP_WORDS=(trl-cmdp {words}); COMP_CWORD={len(words.split())}; _trl_cmdp; echo "${{COMPREPLY[*]}}"'
        )
    done = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "constrained",
        "--cost_limit --cost_limit_schedule --cost_limit_start --cost_limit_schedule_steps",
        "worst_prefix",
        "nested",
        "--student",
        "",
    ]
