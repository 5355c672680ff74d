"""Pickles: none is loaded by this package, and what others load is limited to tensors."""

import pathlib
import pickle
import shutil
import sys

import pytest
import torch
from helpers import make_dataset, make_model, make_teacher, make_trainer
from hostile import Bomb, with_pickled_weights

from trl_cmdp.cli import main
from trl_cmdp.teachers import load_teacher


_seen: list[str] | None = None  # an audit hook cannot be taken away


def _hook(event, arguments):
    if event == "pickle.find_class" and _seen is not None:
        _seen.append(".".join(arguments))


sys.addaudithook(_hook)


@pytest.fixture
def unpickled():
    """Names that any pickle resolves, by the interpreter's own audit. What `weights_only` reads never gets there."""
    global _seen
    _seen = []
    yield _seen
    _seen = None


@pytest.fixture
def loads(monkeypatch):
    """Files that `torch.load` was asked for, and whether for tensors alone."""
    calls = []
    load = torch.load

    def watched(file, *args, **kwargs):
        calls.append((pathlib.Path(str(file)).name, kwargs.get("weights_only")))
        return load(file, *args, **kwargs)

    monkeypatch.setattr(torch, "load", watched)
    return calls


def test_the_audit_sees_a_pickle(unpickled, tmp_path):
    (tmp_path / "trace").touch()
    pickle.loads(pickle.dumps(Bomb(tmp_path / "trace")))
    assert "pathlib.Path.touch" in unpickled


def build(folder, **kwargs):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, **kwargs}
    return make_trainer(folder, reward_funcs=None, teacher_model=make_teacher(), **settings)


def test_a_run_that_is_saved_resumed_and_evaluated_unpickles_nothing(tmp_path, unpickled, loads):
    """
    The Trainer of transformers reads optimizer.pt, scheduler.pt and rng_state.pth as tensors alone; training_args.bin,
    which is a whole pickle, is read by nobody.
    """
    build(tmp_path).train()
    checkpoint = tmp_path / "checkpoint-1"
    trace = tmp_path / "it ran"
    plant(trace, checkpoint / "training_args.bin")
    resumed = build(tmp_path)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 2
    resumed.save_model(str(tmp_path / "student"))
    make_dataset(1).to_json(tmp_path / "data.jsonl")
    arguments = ["--student", str(tmp_path / "student"), "--dataset", str(tmp_path / "data.jsonl")]
    sizes = ["--split", "train", "--num_problems", "2", "--max_new_tokens", "4", "--output_dir", str(tmp_path / "out")]
    assert main(["evaluate", *arguments, *sizes]) == 0
    assert unpickled == []
    assert not trace.exists()
    assert {name for name, _ in loads} == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert {weights_only for _, weights_only in loads} == {True}


def plant(trace, path):
    """In place of a file of a checkpoint, a pickle that runs code; not smaller, as a cut file would be."""
    torch.save([Bomb(trace), torch.zeros(path.stat().st_size)], path)


def test_a_checkpoint_with_a_pickle_in_place_of_tensors_is_refused(tmp_path, unpickled):
    build(tmp_path, max_steps=1).train()
    trace, trainer = tmp_path / "it ran", build(tmp_path)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        checkpoint = tmp_path / name / "checkpoint-1"
        shutil.copytree(tmp_path / "checkpoint-1", checkpoint)
        plant(trace, checkpoint / name)
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            trainer.train(resume_from_checkpoint=str(checkpoint))
    assert unpickled == []
    assert not trace.exists()


def test_a_teacher_is_read_from_safetensors_unless_asked_otherwise(tmp_path, unpickled, loads):
    folder, trace = with_pickled_weights(tmp_path / "plain"), tmp_path / "it ran"
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        load_teacher(folder)
    assert loads == []
    asked = load_teacher(folder, init_kwargs={"use_safetensors": False})
    assert torch.equal(asked.lm_head.weight, make_model().lm_head.weight)
    with pytest.raises(pickle.UnpicklingError):
        load_teacher(with_pickled_weights(tmp_path / "bomb", trace), init_kwargs={"use_safetensors": False})
    assert {weights_only for _, weights_only in loads} == {True}
    assert unpickled == []
    assert not trace.exists()


def test_a_student_by_path_is_tensors_alone(tmp_path, unpickled, loads):
    """A trainer loads it as TRL does: a pickle of tensors is read, and nothing else in one."""
    trace = tmp_path / "it ran"
    build(tmp_path / "out", model=with_pickled_weights(tmp_path / "plain"))
    with pytest.raises(pickle.UnpicklingError):
        build(tmp_path / "out", model=with_pickled_weights(tmp_path / "bomb", trace))
    assert {weights_only for _, weights_only in loads} == {True}
    assert unpickled == []
    assert not trace.exists()


def test_commands_read_students_from_safetensors(tmp_path, loads, capfd):
    student = with_pickled_weights(tmp_path / "student")
    make_dataset(1).to_json(tmp_path / "data.jsonl")
    data, out = str(tmp_path / "data.jsonl"), str(tmp_path / "out")
    models = ["--model_name_or_path", student, "--teacher_model", student]
    for command in (
        ["constrained", *models, "--dataset_name", data, "--use_cpu", "True", "--bf16", "False"],
        ["evaluate", "--student", student, "--dataset", data, "--split", "train", "--num_problems", "2"],
    ):
        assert main([*command, "--output_dir", out]) == 2
        assert "no file named model.safetensors" in capfd.readouterr().err
    assert loads == []
