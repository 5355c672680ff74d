"""No code of a model folder runs unasked, not even if somebody answers "y": student, teacher, judge, commands."""

import io
import re

import pytest
from helpers import MINUTE_RUN, flags, make_dataset, make_model, make_teacher, make_tokenizer, make_trainer, save_model
from hostile import with_remote_code

from trl_cmdp.cli import main
from trl_cmdp.teachers import load_teacher


@pytest.fixture
def trace(tmp_path, monkeypatch):
    """What the code makes when it runs. Every question on the terminal is answered with yes."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "it ran"


@pytest.fixture
def hostile(tmp_path, trace):
    return with_remote_code(tmp_path / "hostile", trace, make_teacher())


def build(tmp_path, model, teacher, **args):
    return make_trainer(tmp_path / "out", model=model, teacher_model=teacher, **args)


def test_a_model_is_refused(tmp_path, trace, hostile):
    teacher = (lambda: load_teacher(hostile), lambda: build(tmp_path, make_model(), hostile))
    for load in (*teacher, lambda: build(tmp_path, hostile, make_teacher())):
        with pytest.raises(ValueError, match="trust_remote_code"):
            load()
    assert not trace.exists()


def test_the_code_of_a_teachers_tokenizer_does_not_run(tmp_path, trace, caplog):
    folder = with_remote_code(tmp_path / "llama", trace, make_teacher(), "llama")
    assert build(tmp_path, make_model(), folder).teachers
    assert "No tokenizer found for the teacher" in caplog.text
    assert not trace.exists()


def test_trust_in_the_student_is_none_in_the_teacher(tmp_path, trace, hostile):
    student = with_remote_code(tmp_path / "student", tmp_path / "the student's ran", make_model())
    with pytest.raises(ValueError, match="trust_remote_code"):
        build(tmp_path, student, hostile, trust_remote_code=True)
    assert (tmp_path / "the student's ran").exists()
    assert not trace.exists()
    # Asked for, it is run: the folder is as hostile as it looks.
    build(tmp_path, make_model(), hostile, teacher_model_init_kwargs={"trust_remote_code": True})
    assert trace.exists()


@pytest.mark.parametrize(
    ("command", "who", "model_type"),
    [
        ("constrained", "student", "own"),
        ("constrained", "student", "llama"),
        ("constrained", "teacher", "own"),
        ("constrained", "teacher", "llama"),
        ("evaluate", "student", "llama"),
        ("evaluate", "teacher", "own"),
        ("evaluate", "teacher", "llama"),
    ],
)
def test_commands_refuse_it(command, who, model_type, tmp_path, trace, capfd):
    """With a mistake's exit code, and the word to say where transformers gives it (its processors do not). A teacher whose
    tokenizer alone has code serves without it."""
    folders = {
        name: with_remote_code(tmp_path / name, trace, model, model_type)
        if name == who
        else save_model(tmp_path / name, model, make_tokenizer())
        for name, model in (("student", make_model()), ("teacher", make_teacher()))
    }
    make_dataset(1).to_json(tmp_path / "data.jsonl")
    student, teacher, data = folders["student"], folders["teacher"], tmp_path / "data.jsonl"
    options = {
        "constrained": {
            **MINUTE_RUN,
            **{"model_name_or_path": student, "teacher_model": teacher, "dataset_name": data, "max_steps": 1},
        },
        "evaluate": {
            **{"student": student, "teacher": teacher, "dataset": data, "split": "train"},
            **{"num_problems": 2, "max_new_tokens": 4},
        },
    }[command]
    code = main([command, *flags({**options, "output_dir": tmp_path / "out"})])
    assert not trace.exists()
    if (who, model_type) == ("teacher", "llama"):
        assert code == 0
    else:
        assert code == 2
        error = capfd.readouterr().err
        assert re.search("trust_remote_code[ =]True", error) or "Can't instantiate a processor" in error
