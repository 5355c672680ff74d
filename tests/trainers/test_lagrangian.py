"""LagrangianDistillTrainer: λ = 0 is GRPO, λ weighs the divergence's gradient, λ moves once per step and is restored."""

import json

import pytest
import torch
from helpers import (
    dense_costs,
    history,
    loss_and_gradients,
    make_model,
    make_rows,
    make_teacher,
    make_trainer,
    micro_batches,
    random_completions,
    relative_error,
    run,
    scripted,
    weights,
)
from trl import GRPOTrainer

from trl_cmdp import LagrangianDistillConfig, LagrangianDistillTrainer


def build(folder, teacher=None, **kwargs):
    teacher = make_teacher() if teacher is None else teacher
    trainer_kwargs = {"teacher_model": teacher, **kwargs.pop("trainer_kwargs", {})}
    return make_trainer(folder, LagrangianDistillTrainer, trainer_kwargs=trainer_kwargs, **kwargs)


def test_multiplier_zero_is_grpo_bit_for_bit(tmp_path):
    trainer = build(tmp_path / "ours", multiplier_init=0.0)
    trainer.train()
    plain = run(tmp_path / "trl", GRPOTrainer)
    assert history(trainer, "loss") == history(plain, "loss")
    expected = weights(plain)
    assert all(torch.equal(value, expected[name]) for name, value in weights(trainer).items())


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_a_fixed_multiplier_adds_its_share_of_the_divergences_gradient(tmp_path, loss_type):
    """∇(policy loss) + λ·∇D over the policy loss's own normaliser, by hand from dense logits."""
    gradients, coefficient = {}, 0.7
    teacher = make_teacher()
    for multiplier in (0.0, coefficient):
        model = make_model(spread=0.4)
        trainer = build(
            tmp_path / str(multiplier),
            teacher,
            model=model,
            multiplier_init=multiplier,
            loss_type=loss_type,
            gradient_accumulation_steps=2,
            temperature=0.8,
            trainer_kwargs={"rollout_func": scripted(random_completions(8))},
        )
        _, gradients[multiplier] = loss_and_gradients(trainer, micro_batches(trainer, make_rows(8)))
    batch = trainer._generate_and_score_completions(make_rows(8))
    mask = batch["completion_mask"]
    costs = dense_costs(model, teacher, batch, 0.8) * mask
    divergence = costs.sum() / mask.sum() if loss_type == "dapo" else (costs.sum(1) / mask.sum(1)).mean()
    model.zero_grad()
    (coefficient * divergence).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    difference = {name: gradients[coefficient][name] - gradients[0.0][name] for name in expected}
    assert relative_error(difference, expected) < 1e-5


def test_dual_ascent_moves_once_per_step_by_the_cost_of_its_rollouts(tmp_path):
    settings = {"multiplier": "dual", "multiplier_init": 0.1, "multiplier_lr": 0.5, "cost_limit": 0.4}
    trainer = build(tmp_path, max_steps=3, gradient_accumulation_steps=2, **settings)
    trainer.train()
    value = 0.1
    for logged, cost in zip(history(trainer, "lagrange_multiplier"), history(trainer, "constraint/cost"), strict=True):
        assert logged == pytest.approx(value, rel=1e-5)
        value = min(max(value + 0.5 * (cost - 0.4), 0.0), 10.0)
    assert trainer._multiplier.value == pytest.approx(value, rel=1e-5)


def test_the_violation_rate_can_move_it(tmp_path):
    settings = {"multiplier": "dual", "multiplier_init": 0.1, "multiplier_lr": 0.5, "cost_limit": 1e-6}
    trainer = build(
        tmp_path, max_steps=1, multiplier_signal="violation_rate", tolerated_violation_rate=0.25, **settings
    )
    trainer.train()
    assert trainer._multiplier.value == pytest.approx(0.1 + 0.5 * 0.75)


def test_evaluation_leaves_it_alone(tmp_path):
    trainer = build(
        tmp_path,
        multiplier="dual",
        multiplier_init=0.1,
        per_device_eval_batch_size=4,
        trainer_kwargs={"eval_dataset": make_trainer(tmp_path / "data", GRPOTrainer).train_dataset},
    )
    metrics = trainer.evaluate()
    assert metrics["eval_constraint/cost"] > 0
    assert trainer._multiplier.value == 0.1
    assert trainer._window.sum() == 0


@pytest.mark.parametrize("multiplier", ["dual", "pid"])
def test_resume_restores_it_exactly(tmp_path, multiplier):
    def resumable(name, max_steps):
        return build(
            tmp_path / name,
            multiplier=multiplier,
            multiplier_init=0.1,
            max_steps=max_steps,
            lr_scheduler_type="constant",
            save_strategy="steps",
            save_steps=2,
        )

    whole = resumable("whole", 4)
    whole.train()
    resumable("stopped", 2).train()
    resumed = resumable("stopped", 4)
    resumed.train(resume_from_checkpoint=True)
    assert resumed._multiplier == whole._multiplier
    assert history(resumed, "lagrange_multiplier") == history(whole, "lagrange_multiplier")
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())


def test_a_checkpoint_of_another_method_is_refused(tmp_path):
    run(tmp_path, trainer_kwargs={"teacher_model": make_teacher()}, save_strategy="steps", save_steps=2)
    with pytest.raises(ValueError, match="was not written by LagrangianDistillTrainer"):
        build(tmp_path, multiplier="dual", max_steps=4).train(resume_from_checkpoint=True)


def test_checkpoint_state_is_readable(tmp_path):
    build(tmp_path, multiplier="dual", multiplier_init=0.1, save_strategy="steps", save_steps=2).train()
    state = json.loads((tmp_path / "checkpoint-2" / "trl_cmdp_state.json").read_text())
    assert set(state) == {"value", "lr", "maximum"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"multiplier": "adam"}, "must be one of 'fixed', 'dual', 'pid'"),
        ({"cost_limit": 0.0}, "`cost_limit` must be positive"),
        ({"multiplier_init": -1.0}, "must not be negative"),
        ({"multiplier_init": 11.0}, "above `multiplier_max`"),
        ({"pid_cost_ema": 1.0}, r"must lie in \[0, 1\)"),
    ],
)
def test_bad_fields_are_errors(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        LagrangianDistillConfig(str(tmp_path), use_cpu=True, bf16=False, **fields)
