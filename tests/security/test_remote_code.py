"""No code of a model folder runs unasked, not even if somebody answers "y": student, teacher, judge, commands."""

import io

import pytest
from helpers import make_dataset, make_model, make_teacher, make_tokenizer, make_trainer, save_model
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


def test_a_teacher_is_refused(tmp_path, trace, hostile):
    for load in (lambda: load_teacher(hostile), lambda: build(tmp_path, make_model(), hostile)):
        with pytest.raises(ValueError, match="trust_remote_code"):
            load()
    assert not trace.exists()


def test_the_code_of_a_teachers_tokenizer_does_not_run(tmp_path, trace, caplog):
    folder = with_remote_code(tmp_path / "llama", trace, make_teacher(), "llama")
    assert build(tmp_path, make_model(), folder).teachers
    assert "No tokenizer found for the teacher" in caplog.text
    assert not trace.exists()


def test_a_student_is_refused(tmp_path, trace, hostile):
    with pytest.raises(ValueError, match="trust_remote_code"):
        build(tmp_path, hostile, make_teacher())
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
    data, out = str(tmp_path / "data.jsonl"), str(tmp_path / "out")
    arguments = {
        "constrained": [
            *("--model_name_or_path", folders["student"], "--teacher_model", folders["teacher"]),
            *("--dataset_name", data, "--output_dir", out, "--max_steps", "1", "--num_generations", "4"),
            *("--per_device_train_batch_size", "4", "--max_completion_length", "4", "--report_to", "none"),
            *("--use_cpu", "True", "--bf16", "False", "--gradient_checkpointing", "False", "--save_strategy", "no"),
        ],
        "evaluate": [
            *("--student", folders["student"], "--teacher", folders["teacher"], "--dataset", data),
            *("--split", "train", "--num_problems", "2", "--max_new_tokens", "4", "--output_dir", out),
        ],
    }[command]
    code = main([command, *arguments])
    assert not trace.exists()
    if (who, model_type) == ("teacher", "llama"):
        assert code == 0
    else:
        assert code == 2
        error = capfd.readouterr().err
        assert "trust_remote_code=True" in error or "Can't instantiate a processor" in error
