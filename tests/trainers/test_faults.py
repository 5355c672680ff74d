"""Faults in the middle of training: what the user sees, and that the checkpoints before are whole."""

import math
import os
import resource
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from helpers import length_reward, make_teacher, make_trainer, same_weights, weights
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from trl_cmdp import ConstrainedDistillTrainer
from trl_cmdp.trainers.engine import forward


SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "cost_limit": 1.7}


def build(folder: Path, **kwargs) -> ConstrainedDistillTrainer:
    return make_trainer(folder, teacher_model=make_teacher(), **{**SAVING, **kwargs})


def train(folder: Path, **kwargs) -> ConstrainedDistillTrainer:
    trainer = build(folder, **kwargs)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> ConstrainedDistillTrainer:
    """The run that nothing befell."""
    return train(tmp_path_factory.mktemp("undisturbed"))


def resume(folder: Path, **kwargs) -> ConstrainedDistillTrainer:
    """The run that went on from the last checkpoint."""
    trainer = build(folder, **kwargs)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == trainer.state.max_steps
    return trainer


@pytest.mark.parametrize(
    ("third", "error", "message"),
    [
        (lambda completions: 1 / 0, ZeroDivisionError, "division by zero"),
        (
            lambda completions: [1.0] * (len(completions) - 1),
            ValueError,
            "returned 3 rewards, but 4 were expected",
        ),
        (lambda completions: [math.inf] * len(completions), ValueError, "'reward' returned inf at step 2"),
    ],
    ids=["raises", "wrong-length", "infinite"],
)
def test_failing_reward(tmp_path, undisturbed, third, error, message):
    """At its third call, after two checkpoints, of which the last is whole."""
    calls = []

    def reward(completions, **kwargs):
        calls.append(None)
        return third(completions) if len(calls) == 3 else length_reward(completions)

    with pytest.raises(error, match=message):
        train(tmp_path / "failed", reward_funcs=reward)
    assert get_last_checkpoint(tmp_path / "failed").endswith("checkpoint-2")
    assert same_weights(resume(tmp_path / "failed"), undisturbed)


# The first file that is too large: the weights, and the optimizer's state, which is written after them.
@pytest.mark.parametrize("size", [1000, 10_000])
def test_disk_full_while_saving(tmp_path, monkeypatch, undisturbed, size):
    """
    The error says so; the run goes on from the checkpoint before. While the third one is written no file may grow beyond
    a size, which is how this process sees a disk that is full.
    """
    trainer = build(tmp_path / "full")
    save, before = trainer._save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_a_full_disk(model, trial):
        if trainer.state.global_step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            save(model, trial)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(trainer, "_save_checkpoint", save_on_a_full_disk)
    with pytest.raises(RuntimeError, match=r"checkpoint-3 could not be written \(.*MiB are free .* make room"):
        trainer.train()
    AutoModelForCausalLM.from_pretrained(tmp_path / "full" / "checkpoint-2")
    assert same_weights(resume(tmp_path / "full"), undisturbed)


class TestOutOfMemory:
    """In the divergence: once more in smaller tiles, then one clear error."""

    @pytest.fixture
    def memory(self, monkeypatch):
        """Functions of the head that run out of memory in tiles of more than `memory["mb"]`, as a device does."""
        memory = {"mb": math.inf}
        for name in ("chunked_policy_divergence", "chunked_divergence"):
            real = getattr(forward, name)

            def limited(*args, memory_mb, real=real, **kwargs):
                if (memory_mb or 256) > memory["mb"]:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 256.00 MiB.")
                return real(*args, memory_mb=memory_mb, **kwargs)

            monkeypatch.setattr(forward, name, limited)
        return memory

    def test_goes_on_in_smaller_tiles(self, tmp_path, undisturbed, memory, caplog):
        memory["mb"] = 64  # a quarter of the default
        found = train(tmp_path / "scarce")
        assert caplog.text.count("memory ran out in the divergence") == 1  # and not at each step anew
        torch.testing.assert_close(weights(found), weights(undisturbed), rtol=1e-5, atol=1e-6)

    def test_ends_in_one_error(self, tmp_path, memory):
        memory["mb"] = 8
        with pytest.raises(
            torch.OutOfMemoryError, match=r"also in tiles of 64 MB\. Lower `per_device_train_batch_size`"
        ):
            train(tmp_path)


def test_two_runs_on_one_folder(tmp_path):
    """The second is refused before it trains; once the first has ended the folder is free."""
    with (
        FileLock(tmp_path / "_run.lock"),
        pytest.raises(RuntimeError, match=r"Another run is training into .*give this one another `output_dir`"),
    ):
        train(tmp_path)
    assert get_last_checkpoint(tmp_path) is None
    for _ in range(2):
        train(tmp_path, max_steps=1)


class Send(TrainerCallback):
    """Sends a signal to its own process within the third optimizer step, and again in the one after it."""

    def __init__(self, number=signal.SIGTERM):
        self.number = number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step >= 2:
            os.kill(os.getpid(), self.number)


@pytest.mark.usefixtures("in_foreground")
def test_ctrl_c(tmp_path, undisturbed, caplog):
    """A checkpoint of the step under way, then `KeyboardInterrupt`; the log says how to go on, and from where it did."""
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, callbacks=[Send(signal.SIGINT)], save_steps=100)
    assert "Stopped at step 3." in caplog.text
    assert f"{tmp_path / 'checkpoint-3'} is the newest checkpoint" in caplog.text
    assert "`trainer.train(resume_from_checkpoint=True)`" in caplog.text
    assert same_weights(resume(tmp_path, save_steps=100), undisturbed)
    assert f"continues from step 3 ({tmp_path / 'checkpoint-3'})" in caplog.text


@pytest.mark.usefixtures("in_foreground")
def test_ctrl_c_twice_stops_at_once(tmp_path, caplog):
    """The second one, more than the moment later in which a launcher repeats the first, saves nothing."""
    calls = []

    def reward(completions, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)  # by a launcher
            time.sleep(1.1)
            os.kill(os.getpid(), signal.SIGINT)
            calls.append("not stopped")
        return length_reward(completions)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, reward_funcs=reward)
    assert len(calls) == 2
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert f"{tmp_path / 'checkpoint-1'} is the newest checkpoint" in caplog.text
    train(tmp_path, max_steps=1)  # the folder is free, and nothing of the signal is left


@pytest.mark.parametrize("case", ["notebook", "never resumed", "ignored"])
def test_where_ctrl_c_is_left_alone(tmp_path, monkeypatch, caplog, case):
    """
    A cell of a notebook, and what is never resumed, such as the demo, stop at once and without a checkpoint; a run in the
    background of a shell does not stop.
    """
    ignored = case == "ignored"
    if case == "notebook":
        monkeypatch.setattr("trl_cmdp.trainers.engine.guards.is_in_notebook", lambda: True)
    if case == "never resumed":
        monkeypatch.setattr(ConstrainedDistillTrainer, "how_to_resume", None)
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    try:
        with nullcontext() if ignored else pytest.raises(KeyboardInterrupt):
            train(tmp_path, callbacks=[Send(signal.SIGINT)])
    finally:
        signal.signal(signal.SIGINT, previous)
    assert get_last_checkpoint(tmp_path).endswith("checkpoint-4" if ignored else "checkpoint-2")
    assert "Stopped" not in caplog.text


def test_a_program_that_handles_sigterm_itself_trains_again(tmp_path):
    """It is told once training has ended; the training after that one is not stopped."""
    told = []
    previous = signal.signal(signal.SIGTERM, lambda *_: told.append(True))
    try:
        trainer = build(tmp_path, callbacks=[Send()])
        trainer.train()
        assert (trainer.state.global_step, told) == (3, [True])
        trainer.remove_callback(Send)
        trainer.train()
        assert (trainer.state.global_step, told) == (4, [True])
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_sigterm_is_handled_only_while_training(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append(signal.getsignal(signal.SIGTERM))

    train(tmp_path, callbacks=[Look()], max_steps=1)
    assert before not in seen
    assert signal.getsignal(signal.SIGTERM) == before
