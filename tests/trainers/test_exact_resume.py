"""A run that stops anywhere goes on to the same weights and the same log, and cut-off checkpoints are passed over."""

import json
import shutil

import pytest
import transformers.trainer
from helpers import length_reward, make_dataset, make_lora, make_teacher, make_trainer, same_weights
from transformers import TrainerCallback
from trl import GRPOTrainer

from trl_cmdp import (
    ConstrainedDistillTrainer,
    GKDDistillTrainer,
    LagrangianDistillTrainer,
    MiniLLMDistillTrainer,
)
from trl_cmdp.trainers.engine.checkpoints import check_whole, last_whole_checkpoint


class Stop(TrainerCallback):
    """Ends training after a step, as if it had been killed: the schedules are those of the whole run."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def build(folder, trainer_class=ConstrainedDistillTrainer, *, stop=None, lora=False, teacher=True, **kwargs):
    fields = {"max_steps": 4, "learning_rate": 0.02, "save_strategy": "steps", "save_steps": 1, **kwargs}
    if teacher and trainer_class is not GRPOTrainer:
        fields["teacher_model"] = make_teacher()
    if lora:
        fields["peft_config"] = make_lora(lora_dropout=0.1)
    trainer = make_trainer(folder, trainer_class, **fields)
    if stop is not None:
        trainer.add_callback(Stop(stop))
    return trainer


def logged(trainer):
    """
    Everything that was logged but for times, as text, in which NaN is equal to itself. The summary at the end is left
    out: transformers makes it of the steps since the resume.
    """
    return [
        json.dumps({name: value for name, value in entry.items() if "time" not in name}, sort_keys=True)
        for entry in trainer.state.log_history
        if "train_runtime" not in entry
    ]


def assert_same_run(resumed, whole):
    assert resumed.state.global_step == whole.state.max_steps
    assert same_weights(resumed, whole)
    assert logged(resumed) == logged(whole)


def check_resume(folder, stop, *, reward_funcs=length_reward, drop=(), **settings):
    """
    The run that is stopped and resumed, with that reward, ends as the one that was not. `drop` names what transformers
    logs of its window alone.
    """
    whole = build(folder / "whole", **settings)
    whole.train()
    build(folder / "stopped", stop=stop, **settings).train()
    resumed = build(folder / "stopped", reward_funcs=reward_funcs, **settings)
    resumed.train(resume_from_checkpoint=True)
    for entry in [*whole.state.log_history, *resumed.state.log_history]:
        for name in drop:
            entry.pop(name, None)
    assert_same_run(resumed, whole)


@pytest.mark.parametrize(
    ("stop", "settings"),
    [
        (1, {"num_iterations": 2, "cost_limit": 1.7}),
        (2, {"num_iterations": 3, "cost_limit": 1.7, "credit_assignment": "token", "divergence_memory_mb": 1e-6}),
        (1, {"steps_per_generation": 4, "num_iterations": 2, "gradient_accumulation_steps": 2, "lora": True}),
        (3, {"steps_per_generation": 2, "cost_limit": 1.7, "use_adaptive_entropy": True, "entropy_target": 9.0}),
        (1, {"steps_per_generation": 2, "teacher": False, "lora": True, "beta": 0.1}),
        (1, {"num_iterations": 2, "trainer_class": LagrangianDistillTrainer, "multiplier": "pid"}),
        (3, {"steps_per_generation": 2, "trainer_class": GKDDistillTrainer, "lmbda": 0.5, "seq_kd": True}),
        (1, {"steps_per_generation": 2, "trainer_class": MiniLLMDistillTrainer, "teacher_hidden_memory_mb": 1e-6}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_in_the_middle_of_a_generation_cycle(tmp_path, stop, settings):
    """The rollouts left are those that were saved, so no one is asked to score others before the cycle ends."""
    scored = []

    def reward(completions, trainer_state, **kwargs):
        scored.append(trainer_state.global_step)
        return length_reward(completions)

    reward.__name__ = "length_reward"
    check_resume(tmp_path, stop, reward_funcs=reward, **settings)
    assert stop not in scored


AUTO_LIMIT = {"cost_limit": "auto", "auto_limit_steps": 3, "max_steps": 5}
COMPLETIONS = make_dataset().add_column("completion", ["3#3", "7", "1+1,11", "5#15#15"] * 8)


@pytest.mark.parametrize(
    ("stop", "settings"),
    [
        (2, {"gradient_accumulation_steps": 2, "cost_limit": 1.7}),
        (2, {"steps_per_generation": 2, "num_iterations": 1, "credit_assignment": "token", "cost_limit": 1.7}),
        (2, {"lora": True, "cost_limit": 1.7}),
        (2, {"cost_limit": 0.5, "cost_limit_schedule": "linear"}),  # from where the student was at first
        (2, AUTO_LIMIT),  # in the imitation phase, at its end, and after it
        (3, AUTO_LIMIT),
        (4, AUTO_LIMIT),
        (2, {"trainer_class": LagrangianDistillTrainer, "multiplier": "dual", "multiplier_init": 0.1}),
        (4, {"trainer_class": GKDDistillTrainer, "train_dataset": COMPLETIONS, "lmbda": 0.5, "max_steps": 8}),
        (3, {"logging_steps": 2, "save_steps": 3}),  # metrics of step 3 are logged with those of step 4
        (5, {"train_dataset": make_dataset(1), "max_steps": 7}),  # in the second epoch, which has an order of its own
        (4, {"train_dataset": make_dataset(1), "max_steps": 6}),  # between two epochs
        (
            5,
            {
                "train_dataset": make_dataset(1),
                "max_steps": 7,
                "num_iterations": 2,
                "gradient_accumulation_steps": 2,
                "teacher": False,
            },
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_between_generations(tmp_path, stop, settings):
    """The same log, order of the data, limits and draws."""
    check_resume(tmp_path, stop, drop=["loss"] if "logging_steps" in settings else [], **settings)


def test_with_a_completions_table(tmp_path):
    """Rollouts that were logged before are not in the table again; the next ones are."""
    settings = {"num_iterations": 2, "log_completions": True}
    build(tmp_path, stop=1, **settings).train()
    build(tmp_path, **settings).train(resume_from_checkpoint=True)
    assert (tmp_path / "completions" / "completions_00003.parquet").exists()


@pytest.fixture(scope="module")
def run_of_three(tmp_path_factory):
    """Checkpoints 1 to 3 of a run of four steps with two iterations: 1 and 3 are in the middle of a cycle."""
    folder = tmp_path_factory.mktemp("run")
    build(folder, stop=3, num_iterations=2).train()
    return folder


def test_a_cycle_that_has_ended_leaves_no_rollouts(run_of_three):
    found = [path.parent.name for path in run_of_three.glob("*/trl_cmdp_rollouts_*")]
    assert sorted(found) == ["checkpoint-1", "checkpoint-3"]


@pytest.mark.parametrize("damage", ["missing", "cut off"])
def test_each_file_cut_off(run_of_three, tmp_path, caplog, damage):
    """Whichever file is missing or cut short, the checkpoint before is used and the reason is said."""
    shutil.copytree(run_of_three, tmp_path, dirs_exist_ok=True)
    paths = list((tmp_path / "checkpoint-3").iterdir())
    names = {path.name for path in paths}
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "trl_cmdp_rollouts_0.safetensors"} < names
    for path in paths:
        if (path.name, damage) == ("trl_cmdp_progress.json", "missing"):
            continue  # without a list and with a trainer state: another trainer's
        whole = path.read_bytes()
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(whole[: len(whole) // 2])
        caplog.clear()
        assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
        assert f"checkpoint-3 is not whole and is passed over: {path.name} is {damage}" in caplog.text
        with pytest.raises(ValueError, match=f"checkpoint-3 cannot be resumed from: {path.name} is {damage}"):
            check_whole(path.parent)
        path.write_bytes(whole)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")


def test_training_goes_on_from_the_one_before(run_of_three, tmp_path):
    shutil.copytree(run_of_three, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-3" / "trainer_state.json").unlink()
    resumed = build(tmp_path, num_iterations=2)
    with pytest.raises(ValueError, match=r"trainer_state\.json is missing"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    resumed.train(resume_from_checkpoint=True)
    whole = build(tmp_path / "whole", num_iterations=2)
    whole.train()
    assert_same_run(resumed, whole)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


@pytest.mark.parametrize("stop", [1, 2])
def test_from_a_checkpoint_of_grpo_trainer(tmp_path, caplog, stop):
    """TRL's checkpoints go on, exactly from the end of a cycle; that its place is not known is said."""
    settings = {"teacher": False, "num_iterations": 2}
    whole = build(tmp_path / "whole", **settings)
    whole.train()
    build(tmp_path / "stopped", GRPOTrainer, stop=stop, num_iterations=2).train()
    resumed = build(tmp_path / "stopped", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert "has no trl_cmdp_progress.json, so another trainer wrote it" in caplog.text
    assert resumed.state.global_step == 4
    if stop == 2:
        assert_same_run(resumed, whole)


def test_none_is_whole(run_of_three, tmp_path):
    shutil.copytree(run_of_three / "checkpoint-1", tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"There is no whole checkpoint in .* Train without"):
        build(tmp_path).train(resume_from_checkpoint=True)


def test_a_folder_that_is_written_again_is_not_whole_meanwhile(run_of_three, tmp_path):
    """An earlier run's files do not stand in for those that a kill leaves unwritten."""
    shutil.copytree(run_of_three, tmp_path, dirs_exist_ok=True)

    class Killed(ConstrainedDistillTrainer):
        def save_model(self, output_dir=None, _internal_call=False):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, Killed, num_iterations=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_an_older_checkpoint_is_deleted_only_once_the_next_is_whole(tmp_path, monkeypatch):
    kept = []
    rotate = transformers.trainer.rotate_checkpoints

    def rotate_checkpoints(output_dir, **kwargs):
        kept.append(last_whole_checkpoint(output_dir))
        rotate(output_dir, **kwargs)

    monkeypatch.setattr(transformers.trainer, "rotate_checkpoints", rotate_checkpoints)
    build(tmp_path, num_iterations=2, save_total_limit=1, max_steps=3).train()
    assert kept == [str(tmp_path / f"checkpoint-{step}") for step in (1, 2, 3)]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


@pytest.mark.parametrize(("stop", "warns"), [(1, True), (2, False)])
def test_other_batches(run_of_three, tmp_path, caplog, stop, warns):
    """Saved rollouts that cannot be split as they were are left behind, aloud; at the end of a cycle there are none."""
    for step in range(1, stop + 1):
        shutil.copytree(run_of_three / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    resumed = build(tmp_path, num_iterations=2, gradient_accumulation_steps=2, steps_per_generation=2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert ("gradient_accumulation_steps 1, now 2; steps_per_generation 1, now 2" in caplog.text) == warns


def test_a_checkpoint_holds_no_pickle_of_ours(run_of_three):
    """What we add is JSON and safetensors, whose structure is JSON too."""
    ours = sorted(path.name for path in (run_of_three / "checkpoint-3").glob("trl_cmdp_*"))
    assert ours == ["trl_cmdp_progress.json", "trl_cmdp_rollouts_0.safetensors"]
