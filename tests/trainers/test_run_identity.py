"""Whose run a checkpoint is of: what it is compared with on resuming, row by row, and what a folder may hold."""

import os
import shutil

import pytest
from helpers import (
    length_reward,
    make_args,
    make_dataset,
    make_lora,
    make_model,
    make_teacher,
    make_tokenizer,
    make_trainer,
    run,
    same_weights,
)
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_cmdp import ConstrainedDistillTrainer, GKDDistillTrainer, LagrangianDistillTrainer


SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "cost_limit": 1.7}


def build(folder, trainer_class=ConstrainedDistillTrainer, **kwargs):
    return make_trainer(folder, trainer_class, **{"teacher_model": make_teacher(), **SAVING, **kwargs})


class Stop(TrainerCallback):
    """Ends training after a step, as if it had been killed."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """The folder of a run of two steps out of three, and nothing of it is to be changed."""
    folder = tmp_path_factory.mktemp("held")
    build(folder, callbacks=[Stop(2)]).train()
    return folder


def other_answers():
    return make_dataset().map(lambda row, index: {"answer": "0"} if index == 21 else row, with_indices=True)


OTHER_RUNS = {
    "method": {"trainer_class": LagrangianDistillTrainer},
    "teacher": {"teacher_model": make_teacher(seed=5)},
    "student": {"model": make_model(seed=5)},
    "data": {"train_dataset": other_answers()},
    "learning_rate": {"learning_rate": 0.5},
    "cost_limit": {"cost_limit": 1.6},
    "cost_scope": {"cost_scope": "sum"},
    "teacher_beta": {"teacher_beta": 0.5},
    "violation_penalty": {"violation_penalty": 30.0},
    "violation_distill_coef": {"violation_distill_coef": 0.7},
    "unrewarded_distill_coef": {"unrewarded_distill_coef": 0.7},
    "credit_assignment": {"credit_assignment": "token"},
    "seed": {"seed": 7},
    "temperature": {"temperature": 0.7},
    "top_p": {"top_p": 0.9},
    "loss_type": {"loss_type": "grpo"},
    "epsilon": {"epsilon": 0.3},
    "weight_decay": {"weight_decay": 0.1},
    "lr_scheduler_type": {"lr_scheduler_type": "constant"},
    "warmup_steps": {"warmup_steps": 1},
    "max_grad_norm": {"max_grad_norm": 0.5},
    "adam_beta2": {"adam_beta2": 0.9},
    "optim": {"optim": "sgd"},
    "max_completion_length": {"max_completion_length": 5},
    "scale_rewards": {"scale_rewards": "batch"},
    "reward_weights": {"reward_weights": [2.0]},
    "shuffle_dataset": {"shuffle_dataset": False},
}


@pytest.mark.parametrize(("part", "changes"), OTHER_RUNS.items(), ids=OTHER_RUNS)
def test_another_run_is_refused_by_what_differs(held, part, changes):
    """The newest checkpoint, one by its path, and as a folder to begin in."""
    other = build(held, **changes)
    for resume in (True, str(held / "checkpoint-1")):
        with pytest.raises(ValueError, match=rf"was not written by \w+ with these arguments.*`{part}` "):
            other.train(resume_from_checkpoint=resume)
    with pytest.raises(ValueError, match=rf"holds another run.*`{part}` .*overwrite_output_dir=True"):
        other.train()
    assert sorted(path.name for path in held.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize(
    ("before", "after", "part"),
    [
        (
            {"cost_limit": "auto", "auto_limit_steps": 1},
            {"trainer_class": LagrangianDistillTrainer, "multiplier": "dual"},
            "method",
        ),
        (
            {"trainer_class": LagrangianDistillTrainer, "multiplier": "dual"},
            {"cost_limit": "auto", "auto_limit_steps": 1},
            "method",
        ),
        (
            {"trainer_class": LagrangianDistillTrainer, "multiplier": "dual"},
            {"trainer_class": LagrangianDistillTrainer, "multiplier": "pid"},
            "multiplier",
        ),
        ({"trainer_class": GKDDistillTrainer}, {"trainer_class": GKDDistillTrainer, "lmbda": 0.5}, "lmbda"),
        ({"teacher_model": None}, {}, "method"),
        ({"peft_config": make_lora()}, {"peft_config": make_lora(lora_alpha=32)}, "student"),
        ({"peft_config": make_lora()}, {"peft_config": make_lora(), "model": make_model(seed=5)}, "student"),
    ],
    ids=["auto-as-dual", "dual-as-auto", "dual-as-pid", "gkd", "no-teacher", "lora-alpha", "lora-base"],
)
def test_another_method_or_adapter_is_refused(tmp_path, before, after, part):
    completions = {"train_dataset": make_dataset().add_column("completion", ["3"] * 32)}
    build(tmp_path, **{**completions, **before, "max_steps": 2}).train()
    with pytest.raises(ValueError, match=f"`{part}` "):
        build(tmp_path, **completions, **after).train(resume_from_checkpoint=True)


MAY_DIFFER = {
    "paths": {},  # the folder is another one in each of these
    "names": {"run_name": "another"},
    "length of the run": {"max_steps": 5},
    "logging": {"logging_steps": 2},
    "saving": {"save_steps": 2, "save_total_limit": 1},
    "evaluation": {"eval_dataset": make_dataset(1), "eval_strategy": "steps", "per_device_eval_batch_size": 4},
    "memory": {"divergence_memory_mb": 64, "teacher_hidden_memory_mb": 1e-6},
    "batches": {"gradient_accumulation_steps": 2, "steps_per_generation": 2},
}


@pytest.mark.parametrize("changes", MAY_DIFFER.values(), ids=MAY_DIFFER)
def test_what_may_differ_does(held, tmp_path, changes):
    shutil.copytree(held, tmp_path, dirs_exist_ok=True)
    resumed = build(tmp_path, **changes)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == resumed.args.max_steps


def test_another_reward_is_said(held, tmp_path, caplog):
    """An error in a reward is a reason to resume with another one."""

    def other_reward(completions, **kwargs):
        return length_reward(completions)

    shutil.copytree(held, tmp_path, dirs_exist_ok=True)
    build(tmp_path, reward_funcs=other_reward).train(resume_from_checkpoint=True)
    assert "for the rewards length_reward, and from here on the reward is other_reward" in caplog.text


def test_a_change_that_is_meant_is_named(held, tmp_path):
    """It alone, and the checkpoints from there on are the changed run's."""
    shutil.copytree(held, tmp_path, dirs_exist_ok=True)
    changes = {"learning_rate": 0.5, "seed": 7}
    with pytest.raises(ValueError, match=r"another run: `seed` 42, now 7\."):
        build(tmp_path, **changes, resume_with_changes=["learning_rate"]).train(resume_from_checkpoint=True)
    changed = build(tmp_path, **changes, resume_with_changes=["learning_rate", "seed"])
    changed.train(resume_from_checkpoint=True)
    assert changed.state.global_step == 3
    build(tmp_path, **changes).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    with pytest.raises(ValueError, match=r"names 'lerning_rate', .* may name .*learning_rate"):
        build(tmp_path, resume_with_changes=["lerning_rate"]).train(resume_from_checkpoint=True)


def test_another_runs_newer_checkpoint_is_passed_over(held, tmp_path, caplog):
    shutil.copytree(held / "checkpoint-1", tmp_path / "checkpoint-1")
    build(tmp_path / "other", learning_rate=0.5).train()
    shutil.copytree(tmp_path / "other" / "checkpoint-3", tmp_path / "checkpoint-3")
    resumed = build(tmp_path, max_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-3 is passed over: it was not written by ConstrainedDistillTrainer" in caplog.text
    assert resumed.state.global_step == 2


def test_a_folder_is_overwritten_if_told_to(held, tmp_path):
    """Nothing of the other run is left to be resumed from, reported, or counted among the checkpoints."""
    shutil.copytree(held, tmp_path, dirs_exist_ok=True)
    build(tmp_path, learning_rate=0.5, max_steps=1, overwrite_output_dir=True).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_another_trainers_folder_is_refused(tmp_path):
    run(tmp_path, GRPOTrainer, save_strategy="steps", save_steps=1, max_steps=1)
    with pytest.raises(ValueError, match="another trainer wrote it"):
        build(tmp_path, teacher_model=None).train()


def test_a_plain_grpo_config_has_an_identity_too(tmp_path):
    """Without a teacher, and without our fields."""

    def trainer(**kwargs):
        args = make_args(tmp_path, GRPOConfig, **{"save_strategy": "steps", "save_steps": 1, "max_steps": 1, **kwargs})
        return ConstrainedDistillTrainer(
            make_model(), length_reward, args, make_dataset(), processing_class=make_tokenizer()
        )

    trainer().train()
    trainer(max_steps=2).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="`learning_rate` "):
        trainer(learning_rate=0.5).train(resume_from_checkpoint=True)


def test_the_newest_is_the_last_written(held, tmp_path, caplog):
    """Not the one of the largest number: a run that was begun anew, of fewer steps, is resumed where it was."""
    shutil.copytree(held, tmp_path, dirs_exist_ok=True)
    settings = {"max_steps": 2, "lr_scheduler_type": "linear"}
    again = build(tmp_path, callbacks=[Stop(1)], **settings)
    again.train()
    assert "begins anew although" in caplog.text
    resumed = build(tmp_path, **settings)
    steps = []

    class Note(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    resumed.add_callback(Note())
    resumed.train(resume_from_checkpoint=True)
    assert steps == [1]


def test_a_branch_from_an_earlier_step_is_the_newest(held, tmp_path):
    shutil.copytree(held, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-2").rename(tmp_path / "checkpoint-9")
    branch = build(tmp_path, callbacks=[Stop(2)])
    branch.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    resumed = build(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    whole = build(tmp_path / "whole")
    whole.train()
    assert same_weights(resumed, whole)


@pytest.mark.parametrize("limit", [1, 2])
def test_old_checkpoints_go_by_their_steps(tmp_path, limit):
    """Whatever the folders' times say: those of the first two lie a day ahead of the clock. What is no checkpoint stays."""
    build(tmp_path, callbacks=[Stop(2)], max_steps=4).train()
    for name in ("checkpoint-²", "checkpoint-best"):
        (tmp_path / name).mkdir()
    ahead = os.stat(tmp_path).st_mtime + 86_400
    for step in (1, 2):
        os.utime(tmp_path / f"checkpoint-{step}", (ahead + step, ahead + step))
    resumed = build(tmp_path, max_steps=4, save_total_limit=limit)
    resumed.train(resume_from_checkpoint=True)
    left = [path.name for path in tmp_path.glob("checkpoint-*")]
    kept = [f"checkpoint-{step}" for step in (3, 4)[-limit:]]
    assert sorted(left) == sorted([*kept, "checkpoint-²", "checkpoint-best"])
    assert resumed.args.save_total_limit == limit


def test_what_was_cut_off_goes_first(held, tmp_path):
    """A folder without its list keeps no whole checkpoint from its place."""
    shutil.copytree(held, tmp_path, dirs_exist_ok=True)
    shutil.copytree(held / "checkpoint-2", tmp_path / "checkpoint-8")
    (tmp_path / "checkpoint-8" / "trl_cmdp_progress.json").unlink()
    (tmp_path / "checkpoint-8" / "trainer_state.json").unlink()
    build(tmp_path, save_total_limit=2).train(resume_from_checkpoint=True)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


def test_no_secret_is_part_of_an_identity(tmp_path):
    secret = "hf_PLANTED"
    settings = {"hub_token": secret, "teacher_model_init_kwargs": None, "model_init_kwargs": None}
    build(tmp_path, max_steps=1, **settings).train()
    assert secret not in (tmp_path / "checkpoint-1" / "trl_cmdp_progress.json").read_text()
