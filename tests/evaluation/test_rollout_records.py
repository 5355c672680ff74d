"""Records of an evaluation: back as they were written, and strict about everything else."""

import argparse
import json
from dataclasses import asdict, replace
from importlib.metadata import version

import pytest
from helpers import make_rollout, make_settings

from trl_cmdp.cli._evaluation import add_evaluation_arguments
from trl_cmdp.cli._student_run import with_run_settings
from trl_cmdp.evaluation import EvaluationSettings, read_rollout_records
from trl_cmdp.evaluation.provenance import git_state


SETTINGS = make_settings(student="models/student", teacher="models/teacher", versions={"torch": "2"})
PROMPT = [{"role": "user", "content": "1+2 = ?\n\u2028"}]
RECORD = make_rollout(1, 1, [0.5, 0.0], prompt=PROMPT, difficulty="2 steps", tokens=["é3", "<eos>"])


def text(*records, settings=SETTINGS):
    return "".join(f"{line.to_json()}\n" for line in (settings, *records))


def changed(record=RECORD, **values):
    return json.dumps({**asdict(record), **values})


def test_what_is_not_given_is_as_on_the_command_line():
    settings = EvaluationSettings(name="out", student="out", task="gsm8k", num_problems=200, max_new_tokens=8)
    parser = argparse.ArgumentParser()
    add_evaluation_arguments(parser, "")
    defaults = vars(with_run_settings(parser.parse_args(["--student", "out"])))
    shared = {name for name in defaults.keys() & asdict(settings).keys() if defaults[name] is not None}
    assert {"temperature", "teacher_beta", "split", "num_samples", "batch_size", "seed"} <= shared
    assert {name: getattr(settings, name) for name in shared} == {name: defaults[name] for name in shared}
    assert settings.versions["torch"] == version("torch")
    assert settings.git_commit == git_state()[0]


def test_what_is_written_is_read(tmp_path):
    records = [
        RECORD,
        replace(RECORD, problem=0, prompt="1+2=", difficulty=None),
        replace(RECORD, greedy=True, sample=0),
    ]
    assert read_rollout_records(text(*records)) == (SETTINGS, records)
    (tmp_path / "records.jsonl").write_text(text(*records))
    assert read_rollout_records(tmp_path / "records.jsonl") == (SETTINGS, records)


def test_a_last_line_that_was_cut_is_left_out():
    whole = text(RECORD, replace(RECORD, problem=0))
    assert read_rollout_records(whole[:-1]) == (SETTINGS, [RECORD])
    assert read_rollout_records(whole[:-40]) == (SETTINGS, [RECORD])
    with pytest.raises(ValueError, match="first line"):
        read_rollout_records(SETTINGS.to_json()[:-3])


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "[]",
        changed(extra=1),
        changed(problem=True),
        changed(right=1),
        changed(sample="0"),
        changed(costs=[0.5, "0"]),
        changed(costs=[0.5, True]),
        changed(costs=[0.5]),
        changed(costs=None),
        changed(tokens=["é3"]),
        changed(completion_ids=[4.0, 1]),
        changed(prompt=[{"role": "user", "content": 3}]),
        changed(prompt=["1+2="]),
        changed(problem=2),
        changed(problem=-1),
        changed(sample=2),
        changed(greedy=True),
        RECORD.to_json().replace("0.5", "NaN"),
        json.dumps({key: value for key, value in asdict(RECORD).items() if key != "answer"}),
    ],
)
def test_a_line_that_is_no_record_is_named(line):
    with pytest.raises(ValueError, match="Line 3 is not a record"):
        read_rollout_records(text(replace(RECORD, problem=0)) + line + "\n")


def test_what_an_earlier_release_did_not_write_is_its_default():
    written = asdict(SETTINGS)
    earlier = {name: written[name] for name in written if not name.startswith("chat_template")}
    assert EvaluationSettings.from_json(json.dumps(earlier)) == SETTINGS
    for name in ("name", "versions", "num_problems"):
        with pytest.raises(ValueError, match=f"wrong keys: {name}"):
            EvaluationSettings.from_json(json.dumps({key: written[key] for key in written if key != name}))


def test_a_line_that_is_not_text_is_named(tmp_path):
    (tmp_path / "records.jsonl").write_bytes(text(RECORD).encode() + b"\xff\n")
    with pytest.raises(ValueError, match="Line 3 is not UTF-8"):
        read_rollout_records(tmp_path / "records.jsonl")


@pytest.mark.parametrize(
    "values", [{"seed": 1.5}, {"greedy": 1}, {"versions": {"torch": 2}}, {"teacher": 3}, {"more": 1}]
)
def test_settings_that_are_none_are_an_error(values):
    with pytest.raises(ValueError, match="Line 1"):
        read_rollout_records(changed(SETTINGS, **values) + "\n")


def test_a_rollout_that_is_recorded_twice_is_an_error():
    with pytest.raises(ValueError, match="Line 3: the sample 1 of problem 1 is recorded twice"):
        read_rollout_records(text(RECORD, RECORD))


def test_what_is_not_finite_is_never_written():
    with pytest.raises(ValueError, match="JSON"):
        replace(RECORD, costs=[float("nan"), 0.0]).to_json()
