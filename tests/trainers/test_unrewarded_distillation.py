"""The reward where it speaks, the teacher where it does not."""

import pytest
import torch
from helpers import (
    MINUTE_RUN,
    assert_gradient_is_dense,
    capture_rollouts,
    history,
    make_rows,
    make_scripted_trainer,
    make_teacher,
    make_trainer,
    micro_batches,
    run,
)

from trl_cmdp import ConstrainedDistillConfig
from trl_cmdp.core import RewardRange, unrewarded_weights, violation_weights


LIMITS = {"every rollout inside": 1e6, "some inside": 3.45}


@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
def test_signal_and_gradient(tmp_path, monkeypatch, limit):
    """Weights of both parts, each with its own coefficient, and the gradient of dense logits with them."""
    trainer = make_scripted_trainer(
        tmp_path, cost_limit=limit, violation_distill_coef=1.0, unrewarded_distill_coef=0.5, temperature=0.8
    )
    captured = capture_rollouts(trainer, monkeypatch)
    batches = micro_batches(trainer, make_rows(8))
    (rollouts,) = captured
    seen = RewardRange()
    seen.update(rollouts.rewards)
    unrewarded = unrewarded_weights(seen.success(rollouts.rewards), rollouts.costs, rollouts.mask, 4, limit)
    expected = violation_weights(rollouts.costs, rollouts.mask, limit) + 0.5 * unrewarded
    weights = torch.cat([batch["divergence_weights"] for batch in batches])
    assert len(unrewarded[rollouts.mask != 0].unique()) > 1
    logged = trainer._distill_metrics.close("train", 0)["constraint/unrewarded_weight"]
    assert logged == pytest.approx(0.5 * float(unrewarded.sum() / rollouts.mask.sum()))
    # The rollouts of a batch are shuffled before they are split.
    assert sorted(weights.sum(1).tolist()) == pytest.approx(sorted(expected.sum(1).tolist()))
    assert_gradient_is_dense(trainer, batches)


def test_advantages_are_grpos_inside_the_limit(tmp_path, monkeypatch):
    """The third place changes what is imitated, never what the reward says."""
    trainer = make_scripted_trainer(tmp_path, cost_limit=1e6, unrewarded_distill_coef=0.5)
    captured = capture_rollouts(trainer, monkeypatch)
    micro_batches(trainer, make_rows(8))
    signal = trainer._signal(captured[0])
    assert torch.equal(signal.advantages, captured[0].grpo_advantages)
    assert signal.advantages.count_nonzero() > 0


def test_the_default_asks_the_teacher_inside_the_limit(tmp_path):
    """As it stands, without a word in the arguments; at 0 nothing but the reward is heard there."""
    default = ConstrainedDistillConfig("unused", **MINUTE_RUN).unrewarded_distill_coef
    losses = {}
    for coefficient in (0.0, default):
        trainer = make_scripted_trainer(tmp_path, cost_limit=1e6, unrewarded_distill_coef=coefficient)
        trainer.train()
        losses[coefficient] = history(trainer, "distill_loss")
    assert default == 1.0
    assert max(losses[0.0], default=0.0) == 0.0 < min(losses[default])


def test_resumed_run_knows_the_rewards_it_has_seen(tmp_path):
    """Rewards that were seen before the checkpoint alone: 1 in its first two steps, 0 and 0.5 after it."""
    calls = []

    def reward(completions, **kwargs):
        calls.append(len(completions))
        values = [1.0, 0.0] if len(calls) <= 2 else [0.5, 0.0]
        return [values[index % 2] for index in range(len(completions))]

    settings = {
        "teacher_model": make_teacher(),
        "reward_funcs": reward,
        "cost_limit": 1e6,
        "unrewarded_distill_coef": 1.0,
        "max_steps": 4,
        "save_steps": 2,
        "save_strategy": "steps",
    }
    whole = run(tmp_path / "run", **settings)
    calls[:] = [0, 0]
    resumed = make_trainer(tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert history(resumed, "distill_loss") == history(whole, "distill_loss")
    assert history(whole, "distill_loss")[-1] > 0
