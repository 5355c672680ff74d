"""What a report is made from: found by what files hold, refused with what to do."""

import json
import os
import shutil
from pathlib import Path

import pytest
from report_runs import rollout, rollouts, settings, write_evaluation, write_state

from trl_cmdp.reports.runs import ComparisonRun, EvaluationRun, TrainingRun, read_runs


COMPARISON = Path(__file__).parents[2] / "benchmarks" / "results" / "arithmetic"


def test_every_kind_is_found_by_what_its_file_holds(tmp_path):
    evaluation = write_evaluation(tmp_path / "evaluation", rollouts(1))
    state = write_state(tmp_path / "run" / "checkpoint-3")
    shutil.copy(COMPARISON / "records.jsonl", tmp_path)
    training, evaluated, compared = read_runs([tmp_path, evaluation / "records.jsonl", state / "trainer_state.json"])
    assert isinstance(training, TrainingRun)
    assert (training.name, training.steps, training.batch_size) == ("run", 12, 8)
    assert isinstance(evaluated, EvaluationRun)
    assert (evaluated.settings, evaluated.records) == (settings(), rollouts(1))
    assert isinstance(compared, ComparisonRun)
    assert len(compared.records) == len((COMPARISON / "records.jsonl").read_text().splitlines())


def test_an_output_folder_gives_its_newest_checkpoint_that_has_a_state(tmp_path):
    for steps in (8, 9, 10):
        write_state(tmp_path / f"checkpoint-{steps}", steps)
    (tmp_path / "checkpoint-11").mkdir()  # cut off while it was written
    (tmp_path / "train.jsonl").write_text('{"prompt": "1 + 1 ="}\n')  # no records: left alone
    (run,) = read_runs([tmp_path])
    assert run.steps == 10


@pytest.mark.parametrize("name", ["grpo.json", "_trainer_state.json", "state.txt"])
def test_a_state_is_one_whatever_its_name(tmp_path, name):
    source = write_state(tmp_path / "run") / "trainer_state.json"
    source.rename(source.with_name(name))
    (run,) = read_runs([source.with_name(name)])
    assert (run.name, run.steps, run.batch_size) == ("grpo" if name == "grpo.json" else run.name, 12, 8)
    if name != "state.txt":
        (source.parent / "config.json").write_text('{"hidden_size": 8}')  # no state: left alone
        assert read_runs([source.parent]) == [run]


def test_a_live_state_is_newer_than_a_checkpoint(tmp_path):
    write_state(tmp_path / "checkpoint-8", 8)
    (write_state(tmp_path, 9) / "trainer_state.json").rename(tmp_path / "_trainer_state.json")
    (run,) = read_runs([tmp_path])
    assert (run.name, run.steps) == (tmp_path.name, 9)
    for earlier, newest in ((1, 9), (3, 11)):  # what an earlier training left at its end, and what this one did
        os.utime(write_state(tmp_path, 11) / "trainer_state.json", (earlier, earlier))
        os.utime(tmp_path / "_trainer_state.json", (2, 2))
        assert [run.steps for run in read_runs([tmp_path])] == [newest]


def test_a_state_needs_no_more_than_its_log(tmp_path):
    history = [{"step": 3, "reward": 1.0}, {"step": 5, "reward": 1.0}, {"train_runtime": 1.0}]
    (tmp_path / "old.json").write_text(json.dumps({"log_history": history}))
    (run,) = read_runs([tmp_path / "old.json"])
    assert (run.steps, run.batch_size) == (5, None)


def test_runs_of_one_name_have_their_paths_beside_it(tmp_path):
    paths = [write_state(tmp_path / folder / "out" / "checkpoint-1") for folder in ("a", "b")]
    assert [run.name for run in read_runs(paths)] == [f"out ({path / 'trainer_state.json'})" for path in paths]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "nothing", "does not exist"),
        ("{}", "trainer_state.json", "not a state that a trainer saved"),
        ("{", "trainer_state.json", "damaged"),
        ('{"log_history": [1], "train_batch_size": 1, "global_step": 1}', "trainer_state.json", "damaged"),
        ('{"prompt": "1"}\n', "train.jsonl", "neither"),
        ("[" * 100_000, "deep.jsonl", "neither"),
        ("text", "notes.md", "neither"),
        (settings().to_json() + "\n", "records.jsonl", "no rollouts yet"),
        (settings().to_json() + '\n{"problem": 1}\n', "records.jsonl", "Line 2 is not a record"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, content, name, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_runs([tmp_path / name])
    assert name in str(error.value)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        read_runs([tmp_path])


def test_a_file_given_twice_is_refused(tmp_path):
    folder = write_evaluation(tmp_path / "one", rollouts(1))
    with pytest.raises(ValueError, match="given twice"):
        read_runs([folder, folder / "records.jsonl"])


@pytest.mark.parametrize("changed", [{"cost_limit": 0.4}, {"temperature": 0.5}, {"task": "products"}, {"seed": 1}])
def test_evaluations_that_cannot_stand_in_one_table_are_refused(tmp_path, changed):
    one = write_evaluation(tmp_path / "one", rollouts(1))
    other = write_evaluation(tmp_path / "other", rollouts(1), "grpo", **changed)
    with pytest.raises(ValueError, match=f"`{next(iter(changed))}`"):
        read_runs([one, other])


def test_evaluations_whose_teacher_saw_other_prompts_are_refused(tmp_path):
    one = write_evaluation(tmp_path / "one", [rollout(0, 0, [0.1], teacher_prompt="hint")])
    assert len(read_runs([one])) == 1
    other = write_evaluation(tmp_path / "other", [rollout(0, 0, [0.1])], "grpo")
    with pytest.raises(ValueError, match="problem 0 has another prompt"):
        read_runs([one, other])


def test_evaluations_on_other_prompts_are_refused(tmp_path):
    one = write_evaluation(tmp_path / "one", rollouts(1))
    other = write_evaluation(tmp_path / "other", [rollout(0, 0, [0.1], prompt="2 + 2 =")], "grpo")
    with pytest.raises(ValueError, match="problem 0 has another prompt"):
        read_runs([one, other])


def test_a_state_with_nan_is_read(tmp_path):
    write_state(tmp_path, log_history=[{"step": 1, "reward": float("nan")}, {"step": 2, "reward": 1.0}])
    assert "NaN" in (tmp_path / "trainer_state.json").read_text()
    assert json.loads(json.dumps(read_runs([tmp_path])[0].history[1])) == {"step": 2, "reward": 1.0}
