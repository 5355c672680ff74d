"""`trl-cmdp compare`: cells in processes of their own, each run once; what is refused; what survives a kill."""

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
from filelock import FileLock

from trl_cmdp.cli import main
from trl_cmdp.cli._cell import _history
from trl_cmdp.cli._cells import load_records, missing_cells
from trl_cmdp.cli._experiment import load_experiment, preset_names
from trl_cmdp.tasks.arithmetic import demo_model_path


EXPERIMENT = """
task: arithmetic
cost_limit: 0.25
steps: 2
seeds: [7]
held_out: 8
model_init_kwargs: {token: planted-5678}
methods:
  constrained: {trainer: constrained, learning_rate: 3e-4, hub_token: planted-1234}
  broken: {trainer: constrained, loss_type: nonsense}
"""
METHODS = ["--methods", "constrained"]


def write(folder, text=EXPERIMENT):
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An experiment of which one method fails, run once: its folder, its exit code and what it printed."""
    folder = tmp_path_factory.mktemp("compare")
    write(folder)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = compare(folder)
    return folder, code, out.getvalue(), err.getvalue()


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of its outputs, to be changed."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


def compare(folder, *options):
    return main(["compare", str(folder / "mine.yaml"), "--output-dir", str(folder / "out"), *options])


def test_every_cell_is_recorded_and_reported(finished):
    out = finished[0] / "out"
    records, cut = load_records(out)
    assert not cut
    assert {record.method for record in records} == {"constrained", "student", "teacher"}
    cells = {record.method: record for record in records}
    for record in records:
        assert (record.seed, record.task, len(record.outcomes)) == (7, "arithmetic", 8)
        assert record.wall_s > 0
        assert record.cpu_s > 0
        assert record.peak_memory_mb > 50
        assert set(record.versions) == {"python", "torch", "transformers", "trl", "trl_cmdp"}
        assert str(finished[0]) not in record.to_json()  # no path of a machine
    assert cells["teacher"].config == {}
    assert all(outcome.cost == 0 for outcome in cells["teacher"].outcomes)
    assert [entry["step"] for entry in cells["constrained"].history] == [1, 2]
    assert {"reward", "cost", "satisfaction", "distill_loss"} <= cells["constrained"].history[0].keys()
    config = cells["constrained"].config
    assert (config["learning_rate"], config["max_steps"], config["seed"], config["cost_limit"]) == (3e-4, 2, 7, 0.25)

    summary = json.loads((out / "summary.json").read_text())
    assert {row["method"] for row in summary["methods"]} == set(cells)
    assert summary["reference"] == "constrained"
    assert "| constrained |" in (out / "table.md").read_text()
    for name in ("pareto.png", "curves.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert not (out / "running").exists()


def test_secrets_of_a_method_are_in_no_file_and_in_nothing_printed(finished):
    """The trainer gets them, the records say that there are some."""
    folder, _, out, err = finished
    for path in (folder / "out").rglob("*"):
        assert path.is_dir() or b"planted-" not in path.read_bytes(), path
    assert "planted-" not in out + err
    cells = {record.method: record for record in load_records(folder / "out")[0]}
    assert cells["constrained"].settings["fields"]["hub_token"] == "***"
    assert cells["constrained"].settings["config_fields"]["model_init_kwargs"] == {"token": "***"}


def test_a_failing_cell_is_shown_and_leaves_the_others_alone(finished):
    folder, code, out, err = finished
    assert code == 1
    log = folder / "out" / "logs" / "broken-seed-7.log"
    assert "nonsense" in log.read_text()
    assert "broken seed 7 FAILED after" in out
    assert str(log) in out
    assert "Unknown loss type: nonsense" in out  # the log's last lines
    assert "cell 4/4" in out
    assert "1 of 4 cells failed" in err


def test_history_keeps_what_is_logged_and_finite():
    logs = [
        {"step": 1, "reward": 0.5, "loss": 0.1},  # GRPO
        {"step": 2, "reward": 0.6, "constraint/cost": 0.3, "constraint/satisfaction_rate": float("nan")},
        {"step": 3, "reward": 0.7, "distill_loss": 0.2, "lagrange_multiplier": 0.1},
        {"step": 3, "train_runtime": 9.0},
    ]
    assert _history(logs) == [
        {"step": 1, "reward": 0.5},
        {"step": 2, "reward": 0.6, "cost": 0.3},
        {"step": 3, "reward": 0.7, "distill_loss": 0.2, "lagrange_multiplier": 0.1},
    ]


def test_a_machine_gets_json_alone(copied, capsys):
    assert compare(copied, *METHODS, "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads((copied / "out" / "summary.json").read_text())
    assert "pareto.png" in err


def test_a_second_run_runs_nothing(copied, capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a cell was run again"))
    before = (copied / "out" / "records.jsonl").read_bytes()
    (copied / "out" / "table.md").unlink()
    assert compare(copied, *METHODS) == 0
    assert (copied / "out" / "records.jsonl").read_bytes() == before
    assert (copied / "out" / "table.md").exists()  # the report is made from the records alone
    assert "3 of 3 cells are recorded already" in capsys.readouterr().out


def test_a_second_run_at_the_same_time_is_refused(copied, capsys):
    path = copied / "out" / "records.jsonl"
    before = path.read_bytes()
    with FileLock(copied / "out" / ".lock"):
        assert compare(copied) == 2
    assert "another run is writing" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_a_record_that_was_cut_is_dropped_and_its_cell_missing(copied):
    path = copied / "out" / "records.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines)[:-20])
    records, cut = load_records(copied / "out")
    assert cut
    assert path.read_bytes() == b"".join(lines[:-1])
    cells = load_experiment(str(copied / "mine.yaml")).select(["constrained"], None).cells()
    missing = missing_cells(cells, records, copied / "out")
    assert [cell.method for cell in missing] == [json.loads(lines[-1])["method"]]


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("learning_rate: 3e-4", "learning_rate: 1e-4", "learning_rate"),
        ("steps: 2", "steps: 3", "steps 2, and now it is 3"),
        ("held_out: 8", "held_out: 9", "held_out"),
        ("{trainer: constrained, learning", "{trainer: grpo, learning", "trainer constrained, and now it is grpo"),
    ],
)
def test_other_settings_need_another_folder(copied, capsys, old, new, named):
    write(copied, EXPERIMENT.replace(old, new))
    assert compare(copied, *METHODS) == 2
    error = capsys.readouterr().err
    assert named in error
    assert "take another --output_dir" in error


def test_an_interrupted_run_keeps_its_records(copied, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("trl_cmdp.cli._cells.run_cells", interrupt)
    assert compare(copied) == 130
    assert "run the same command again to resume" in capsys.readouterr().err


def test_a_damaged_records_file_is_an_error(copied, capsys):
    path = copied / "out" / "records.jsonl"
    path.write_text("{}\n" + path.read_text())
    assert compare(copied) == 2
    assert "Line 1 is not a record" in capsys.readouterr().err


KILLED = """
import sys
from pathlib import Path
from trl_cmdp.cli._cells import run_cells
from trl_cmdp.cli._experiment import Cell
cells = [Cell(name, "none", 0, {"task": "arithmetic", "cost_limit": 0.25, "held_out": 8}) for name in "abc"]
quiet = lambda *arguments: None
run_cells(cells, Path(sys.argv[1]), jobs=2, num_threads=1, num_done=0, report=quiet, running_changed=quiet)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_leaves_no_cell_behind(tmp_path, number):
    """Politely or not: its cells end, and its records are whole."""
    parent = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(_processes_in(str(tmp_path / "running"))) < 2:
        assert parent.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.send_signal(number)
    assert parent.wait() != 0
    if number == signal.SIGTERM:
        assert not _processes_in(str(tmp_path / "running"))
        assert not (tmp_path / "running").exists()
    while _processes_in(str(tmp_path / "running")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert load_records(tmp_path) == ([], False)


def _processes_in(folder):
    lines = subprocess.run(
        ["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [line for line in lines if folder in line]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps: 2", "step: 2", "unknown key 'step'"),
        ("steps: 2\n", "", "`steps` is missing"),
        ("steps: 2", "steps: 0", "`steps` must be an integer of at least 1"),
        ("task: arithmetic", "task: algebra", "unknown task 'algebra': take one of arithmetic, nested, chains"),
        ("cost_limit: 0.25", "cost_limit: 0", "`cost_limit` must be a positive number"),
        ("seeds: [7]", "seeds: []", "`seeds` must list at least one integer"),
        ("seeds: [7]", "seeds: [7, 7]", "`seeds` must be different integers"),
        ("trainer: constrained, loss", "trainer: ppo, loss", "unknown trainer 'ppo': take one of constrained, grpo"),
        ("{trainer: constrained, loss_type: nonsense}", "{}", "'broken' must name its trainer"),
        ("learning_rate: 3e-4", "learnin_rate: 3e-4", "unknown config field `learnin_rate`"),
        ("learning_rate: 3e-4", "multiplier: dual", "unknown config field `multiplier`"),
        ("learning_rate: 3e-4", "credit_assignment: word", "method 'constrained': `credit_assignment` must be one of"),
        ("learning_rate: 3e-4", "run_name: 2020-01-01", "not JSON serializable"),
        ("learning_rate: 3e-4", "seed: 3", "list it under `seeds`"),
        ("learning_rate: 3e-4", "max_steps: 3", "set `steps`"),
        ("  broken:", "  constrained:", "'constrained' is given twice"),
        ("  broken:", "  ../broken:", "the method name '../broken'"),
        ("  broken:", "  0.1:", "the method name 0.1"),
        ("  broken:", "  teacher:", "'teacher' is taken"),
        (EXPERIMENT[EXPERIMENT.index("methods:") :], "methods: {}", "`methods` must map at least one name"),
        (EXPERIMENT, "[1, 2]", "an experiment is a mapping"),
        (EXPERIMENT, "task: [", "not valid YAML"),
        ("steps: 2", "steps: 1" + 400 * "0", "`steps` must be an integer"),
        ("learning_rate: 3e-4", "learning_rate: 1" + 400 * "0", "method 'constrained'"),
        (EXPERIMENT, "a: &a {b: *a}", "an alias stands inside what it stands for"),
        (EXPERIMENT, "[" * 5000, "nested too deeply"),
        (EXPERIMENT, "# " + "x" * 2**19, "more than"),
    ],
)
def test_a_mistake_in_an_experiment_says_what_to_do(tmp_path, capsys, old, new, message):
    assert old in EXPERIMENT
    write(tmp_path, EXPERIMENT.replace(old, new))
    assert compare(tmp_path) == 2
    error = capsys.readouterr().err
    assert "mine.yaml" in error
    assert message in error
    assert not (tmp_path / "out").exists()


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 30)
)


def test_aliases_that_stand_for_billions_of_values_are_refused(tmp_path, capsys):
    write(tmp_path, BOMB)
    assert compare(tmp_path) == 2
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1="}\n')
    student, teacher = demo_model_path("student"), demo_model_path("teacher")
    models = ["--model_name_or_path", student, "--teacher_model", teacher]
    named = [*models, "--dataset_name", str(tmp_path / "train.jsonl")]
    for option in ("--config", "--accelerate_config"):
        assert main(["constrained", option, str(tmp_path / "mine.yaml"), *named]) == 2
    assert capsys.readouterr().err.count("with its aliases written out it has more than") == 3


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("steps: 2", "steps: 0"),  # what is wrong stands elsewhere
        ("{token: planted-5678}", "{token: planted-5678, when: 2020-01-01}"),
        ("hub_token: planted-1234", "hub_token: planted-1234: x"),  # no YAML
        ("hub_token: planted-1234", "hub_token: *planted-1234"),
        ("hub_token: planted-1234", "hub_token: !planted-1234 x"),
        ("hub_token: planted-1234", "teacher_model_server_api_key: 'planted-1234 with space', teacher_beta: 7"),
        ("hub_token: planted-1234", "hub_tokn: hf_planted-1234, hub_token: planted-1234"),
    ],
)
def test_a_mistake_in_an_experiment_quotes_no_secret(tmp_path, capsys, old, new):
    assert old in EXPERIMENT
    write(tmp_path, EXPERIMENT.replace(old, new))
    assert compare(tmp_path) == 2
    assert "planted-" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["algebra"], "no preset 'algebra': take one of arithmetic"),
        (["missing.yaml"], "There is no file missing.yaml"),
        (["arithmetic", "--methods", "constrained", "nothing"], "has no 'nothing', only constrained, "),
        (["arithmetic", "--seeds", "1", "1"], "--seeds must be different integers"),
    ],
)
def test_a_mistake_in_the_arguments_exits_with_2(tmp_path, capsys, arguments, message):
    assert main(["compare", *arguments, "--output-dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_the_presets_are_valid_and_packaged():
    assert "arithmetic" in preset_names()
    for name in preset_names():
        experiment = load_experiment(name)
        assert len(experiment.cells()) == len(experiment.seeds) * (len(experiment.methods) + 2)
    experiment = load_experiment("arithmetic")
    assert {method.trainer for method in experiment.methods} == {"constrained", "grpo", "lagrangian", "gkd", "minillm"}
    assert [cell.seed for cell in experiment.select(["dual"], [4, 5]).cells() if cell.method == "dual"] == [4, 5]
