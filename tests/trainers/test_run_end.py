"""The end of a run: a complete one moves no weight however often it is resumed, and its model is saved whole or not."""

import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from helpers import make_dataset, make_lora, make_model, make_teacher, make_trainer, run_python, same_weights, weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from trl_cmdp import ConstrainedDistillTrainer, GKDDistillTrainer, LagrangianDistillTrainer, MiniLLMDistillTrainer


SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "cost_limit": 1.7, "learning_rate": 0.02}


def build(folder, trainer_class=ConstrainedDistillTrainer, **kwargs):
    return make_trainer(folder, trainer_class, **{"teacher_model": make_teacher(), **SAVING, **kwargs})


class At(TrainerCallback):
    """Does something at an event of a step."""

    def __init__(self, event, step, action):
        def act(args, state, control, **kwargs):
            if state.global_step == step:
                action()

        setattr(self, f"on_{event}", act)


def logged(trainer):
    """What was logged of steps: the summary at the end is of the steps since the resume."""
    entries = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    kept = [{key: value for key, value in entry.items() if "time" not in key} for entry in entries]
    return json.dumps(kept, sort_keys=True)


@pytest.mark.parametrize(
    ("trainer_class", "settings"),
    [
        (ConstrainedDistillTrainer, {}),
        (ConstrainedDistillTrainer, {"teacher_model": None}),
        (ConstrainedDistillTrainer, {"num_iterations": 2, "gradient_accumulation_steps": 2}),  # in a cycle's middle
        (ConstrainedDistillTrainer, {"peft_config": make_lora(), "save_total_limit": 1}),
        (ConstrainedDistillTrainer, {"train_dataset": make_dataset(1), "max_steps": 4}),  # at an epoch's end
        (ConstrainedDistillTrainer, {"train_dataset": make_dataset(1), "max_steps": -1, "num_train_epochs": 1}),
        (LagrangianDistillTrainer, {"multiplier": "dual"}),
        (GKDDistillTrainer, {}),
        (MiniLLMDistillTrainer, {}),
    ],
)
def test_a_complete_run_stays_as_it_is(tmp_path, trainer_class, settings):
    """Twice: weights, log, step and checkpoints. What is due is saved."""
    whole = build(tmp_path, trainer_class, **settings)
    whole.train()
    before = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    for _ in range(2):
        resumed = build(tmp_path, trainer_class, **settings)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == whole.state.max_steps
        assert same_weights(resumed, whole)
        assert logged(resumed) == logged(whole)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == before
    resumed.save_model()
    names = "adapter_model.safetensors" if "peft_config" in settings else "model.safetensors"
    assert (tmp_path / names).read_bytes() == (tmp_path / before[-1] / names).read_bytes()


def test_a_checkpoint_beyond_the_last_step(tmp_path):
    """The run was made shorter: nothing is left of it."""
    whole = build(tmp_path)
    whole.train()
    resumed = build(tmp_path, max_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert (resumed.state.global_step, same_weights(resumed, whole)) == (3, True)


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    """Of a complete run too: what is saved is what the run would have saved."""
    settings = {
        "eval_dataset": make_dataset(1),
        "eval_strategy": "steps",
        "eval_steps": 1,
        "per_device_eval_batch_size": 4,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_constraint/cost",
        "greater_is_better": True,
    }
    whole = build(tmp_path, **settings)
    whole.train()
    resumed = build(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert same_weights(resumed, whole)


# Runs that are told to end in their third step: in one of four, and in the last.
TOLD = {"third": {"max_steps": 4, "save_steps": 100}, "last": {"save_strategy": "no"}}


@pytest.fixture(scope="module")
def ended_by_signals(tmp_path_factory):
    """Folder of the runs that a signal has ended, and what was printed."""
    path = tmp_path_factory.mktemp("signals")
    done = run_python(Path(__file__).parent / "scripts" / "ended_by_signals.py", path)
    assert done.returncode == 0, done.stderr
    return path, done.stdout


@pytest.mark.parametrize("which", TOLD)
def test_sigterm(ended_by_signals, tmp_path, which):
    """A checkpoint of the step under way, then the process ends by the signal; resumed, it is as if nothing was."""
    path, _ = ended_by_signals
    assert json.loads((path / "codes.json").read_text())[which] == -signal.SIGTERM
    assert [checkpoint.name for checkpoint in (path / which).glob("checkpoint-*")] == ["checkpoint-3"]
    whole = build(tmp_path, **TOLD[which])
    whole.train()
    resumed = build(path / which, **TOLD[which])
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.max_steps
    assert same_weights(resumed, whole)


def test_kills_at_the_end(ended_by_signals):
    """SIGKILL in the last step, after the last checkpoint, inside the final save: the same model, log and weights."""
    _, printed = ended_by_signals
    assert printed.splitlines()[-1].startswith("kills survived 3 of 3 "), printed


def save(folder, seed, **kwargs):
    trainer = make_trainer(folder, model=make_model(seed, spread=0.4), save_strategy="no", **kwargs)
    trainer.save_model()
    return trainer


def test_a_full_disk_leaves_the_model_before(tmp_path):
    """A file that may not grow is how this process sees it. The error is one line, and what was written is gone."""
    before = save(tmp_path, 0)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (1, 700, 3000):  # in the config, the tokenizer, the weights
        other = make_trainer(tmp_path, model=make_model(1, hidden_size=12), save_strategy="no")
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(
                RuntimeError, match=r"The model .* could not be written \(.*MiB are free .* whole"
            ) as error:
                other.save_model()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "\n" not in str(error.value)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == files
    found = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(value, weights(before)[name]) for name, value in found.named_parameters())


@pytest.mark.parametrize("moved", range(1, 5))
def test_parts_of_two_models_never_load(tmp_path, monkeypatch, moved):
    """Killed while the files are moved: nothing loads, until the next save."""
    save(tmp_path, 0)
    replace, count = os.replace, []

    def killed(source, target):
        count.append(target)
        if len(count) > moved:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 1)
    with pytest.raises(ValueError, match="Unrecognized model"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    monkeypatch.undo()
    again = save(tmp_path, 1)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight, again.model.lm_head.weight)


def test_no_part_of_an_earlier_model_stays(tmp_path):
    """Shards and their index, which would be read in place of what is new or beside it."""
    make_model(0).save_pretrained(tmp_path, max_shard_size="2KB")
    shards = {path.name for path in tmp_path.glob("model-*.safetensors")}
    assert shards
    trainer = save(tmp_path, 1)
    assert {path.name for path in tmp_path.glob("*model*")} == {"model.safetensors"}
    assert torch.equal(load_file(tmp_path / "model.safetensors")["lm_head.weight"], trainer.model.lm_head.weight)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    trainer = save(tmp_path, 0)
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        trainer.model.lm_head.weight[3, 1] = torch.nan
    with pytest.raises(RuntimeError, match=r"not finite \(lm_head\.weight\): nothing is saved"):
        trainer.save_model()
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("save_strategy", ["no", "steps"])
def test_a_learning_rate_beyond_all_bounds_is_an_error(tmp_path, save_strategy):
    """At the last step too, after which nothing else would be looked at. No checkpoint holds what is not finite."""
    with pytest.raises(RuntimeError, match="weights are not finite after step 1"):
        build(tmp_path, learning_rate=1e39, save_strategy=save_strategy, max_steps=1).train()
    assert list(tmp_path.rglob("*.safetensors")) == []
