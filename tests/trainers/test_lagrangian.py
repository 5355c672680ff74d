"""LagrangianDistillTrainer: λ weighs the divergence's gradient, and moves once per step by the cost of its rollouts."""

import pytest
from helpers import (
    assert_gradient_is_dense,
    history,
    make_dataset,
    make_rows,
    make_scripted_trainer,
    make_teacher,
    make_trainer,
    micro_batches,
    run,
)

from trl_cmdp import LagrangianDistillTrainer


def build(folder, **kwargs):
    return make_trainer(folder, LagrangianDistillTrainer, teacher_model=make_teacher(), **kwargs)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_a_fixed_multiplier_adds_its_share_of_the_divergences_gradient(tmp_path, loss_type):
    """∇(policy loss) + λ·∇D over the policy loss's own normaliser."""
    trainer = make_scripted_trainer(
        tmp_path, LagrangianDistillTrainer, multiplier_init=0.7, loss_type=loss_type, temperature=0.8
    )
    assert_gradient_is_dense(trainer, micro_batches(trainer, make_rows(8)), coefficient=0.7)


def test_dual_ascent_moves_once_per_step_by_the_cost_of_its_rollouts(tmp_path):
    """Evaluations in between leave it alone."""
    trainer = build(
        tmp_path,
        max_steps=4,
        gradient_accumulation_steps=2,
        multiplier="dual",
        multiplier_init=0.1,
        multiplier_lr=0.5,
        cost_limit=0.4,
        eval_dataset=make_dataset(1),
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
    )
    trainer.train()
    assert all(cost > 0 for cost in history(trainer, "eval_constraint/cost"))
    value = 0.1
    for logged, cost in zip(history(trainer, "lagrange_multiplier"), history(trainer, "constraint/cost"), strict=True):
        assert logged == pytest.approx(value, rel=1e-5)
        value = min(max(value + 0.5 * (cost - 0.4), 0.0), 10.0)


def test_a_checkpoint_of_another_method_is_refused(tmp_path):
    run(tmp_path, teacher_model=make_teacher(), save_strategy="steps", save_steps=2)
    with pytest.raises(ValueError, match="was not written by LagrangianDistillTrainer"):
        build(tmp_path, multiplier="dual", max_steps=4).train(resume_from_checkpoint=True)
