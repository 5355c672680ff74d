"""What is not sound is passed over with its reason: JSON of another shape, other bytes, weights that are not finite."""

import json
import shutil

import pytest
import torch
from helpers import make_teacher, make_trainer, run
from safetensors.torch import load_file, save_file
from trl import GRPOTrainer

from trl_cmdp import LagrangianDistillTrainer
from trl_cmdp.trainers.engine.checkpoints import check_whole, last_whole_checkpoint


SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "cost_limit": 1.7}
STATES = ["trl_cmdp_progress.json", "trl_cmdp_state.json", "trainer_state.json", "entropy_ctrl_state.json"]
SHAPES = {
    "null": "null",
    "object": "{}",
    "list": "[]",
    "number": "3",
    "text": '"text"',
    "deep": "[" * 100_000 + "]" * 100_000,
    "deep-object": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "digits": "9" * 5000,
    "not-utf8": b"\xff\xfe{}",
    "zeros": b"\0" * 700,
    "empty": "",
}


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """Checkpoints 1 and 2 of a run that has every kind of state, the second in the middle of a cycle."""
    folder = tmp_path_factory.mktemp("held")
    settings = {"multiplier": "dual", "use_adaptive_entropy": True, "num_iterations": 3}
    run(folder, LagrangianDistillTrainer, teacher_model=make_teacher(), **settings, **SAVING)
    assert {*STATES, "trl_cmdp_rollouts_0.safetensors"} <= {path.name for path in (folder / "checkpoint-2").iterdir()}
    return folder


@pytest.fixture
def folder(held, tmp_path):
    shutil.copytree(held, tmp_path, dirs_exist_ok=True)
    return tmp_path


def assert_passed_over(folder, caplog, name):
    """The second checkpoint, because of a file."""
    caplog.clear()
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-1")
    assert f"checkpoint-2 is not whole and is passed over: {name}" in caplog.text
    with pytest.raises(ValueError, match=rf"checkpoint-2 cannot be resumed from: {name}"):
        check_whole(folder / "checkpoint-2")


@pytest.mark.parametrize("content", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", STATES)
def test_json_of_another_shape(folder, caplog, name, content):
    (folder / "checkpoint-2" / name).write_bytes(content.encode() if isinstance(content, str) else content)
    assert_passed_over(folder, caplog, name)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {}},
        {"files": {"model.safetensors": "4832"}},
        {"files": None},
        {"session": "1"},
        {"step": "2"},
        {"batches": []},
        {"run": None},
        {"logging_window": {}},
    ],
    ids=lambda changes: "-".join(map(str, *changes.items())),
)
def test_a_list_that_was_changed(folder, caplog, changes):
    path = folder / "checkpoint-2" / "trl_cmdp_progress.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert_passed_over(folder, caplog, path.name)


@pytest.mark.parametrize(
    "changes",
    [
        {"global_step": "2"},
        {"global_step": 2.5},
        {"global_step": None},
        {"global_step": -1},
        {"global_step": 1},
        {"epoch": None},
        {"epoch": "0.1"},
        {"epoch": float("nan")},
        {"log_history": {}},
        {"log_history": None},
        {"log_history": [3]},
        {"stateful_callbacks": [1]},
        {"max_steps": []},
        {"total_flos": "many"},
        {"best_metric": "high"},
        {"best_model_checkpoint": 5},
        {"something_else": 1},
    ],
    ids=lambda changes: "-".join(map(str, *changes.items())),
)
def test_a_trainer_state_of_other_values(folder, caplog, changes):
    path = folder / "checkpoint-2" / "trainer_state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert_passed_over(folder, caplog, path.name)


def test_other_bytes_of_the_same_length(folder, caplog):
    """What a machine leaves that went down: files of the right length, of zeros from some place on."""
    for path in sorted((folder / "checkpoint-2").iterdir()):
        if path.name in STATES:
            continue  # above
        whole = path.read_bytes()
        for kept in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:kept] + b"\0" * (len(whole) - kept))
            if path.read_bytes() != whole:
                assert_passed_over(folder, caplog, path.name)
        path.write_bytes(whole)
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-2")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(tmp_path, caplog, value):
    """Also in the checkpoint of a trainer that lists no files."""
    run(tmp_path, GRPOTrainer, save_strategy="steps", save_steps=1, max_steps=2)
    path = tmp_path / "checkpoint-2" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"][2, 1] = value
    save_file(tensors, path, metadata={"format": "pt"})
    assert_passed_over(tmp_path, caplog, path.name)


@pytest.mark.parametrize("name", ["checkpoint-²", "checkpoint-٣", "checkpoint-", "checkpoint-2-old", "checkpoint--1"])
def test_a_folder_that_is_no_checkpoint(folder, name):
    shutil.copytree(folder / "checkpoint-1", folder / name)
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-2")


def test_the_one_before_is_continued(folder):
    """Through the trainer, after each kind of damage."""
    (folder / "checkpoint-2" / "trl_cmdp_progress.json").write_text("null")
    settings = {"multiplier": "dual", "use_adaptive_entropy": True, "num_iterations": 3}
    resumed = make_trainer(folder, LagrangianDistillTrainer, teacher_model=make_teacher(), **settings, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-2")
