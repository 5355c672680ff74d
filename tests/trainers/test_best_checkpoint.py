"""`metric_for_best_model="constraint/feasible_reward"`: feasibility first, reward second, from the eval set."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import history, make_dataset, make_scripted_trainer, make_teacher, make_trainer, random_completions
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import TrainerState

from trl_cmdp import ConstrainedDistillTrainer, GKDDistillTrainer, LagrangianDistillTrainer, MiniLLMDistillTrainer
from trl_cmdp.trainers.telemetry.selection import FEASIBLE_REWARD, Verdicts


rewards = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def evaluations(draw):
    """Verdicts on rollouts that all had one reward, so that their mean is known exactly."""
    judged = draw(st.integers(0, 10**6))
    return Verdicts(judged, draw(st.integers(0, judged)), 0.0), draw(rewards)


def preferred(verdicts: Verdicts, reward: float, tolerated: float) -> tuple:
    """The order that is meant, as a tuple: judged, feasible, then violations or reward."""
    if verdicts.judged == 0:
        return (0, 0, 0)
    rate = verdicts.violations / verdicts.judged
    return (1, 0, -rate) if rate > tolerated else (1, 1, reward)


class TestOrder:
    @given(evaluations(), evaluations(), st.floats(0, 1, exclude_max=True))
    def test_is_lexicographic(self, first, second, tolerated):
        """Strictly monotone and finite, for all rewards that float32 holds and all tolerated rates."""
        numbers, keys = [], []
        for verdicts, reward in (first, second):
            exact = Verdicts(verdicts.judged, verdicts.violations, verdicts.judged * reward)
            numbers.append(exact.feasible_reward(tolerated))
            # The mean of equal float32 rewards can be off by a rounding of float64: compare what it became.
            mean = exact.reward_sum / exact.judged if exact.judged else 0.0
            keys.append(preferred(verdicts, mean, tolerated))
            assert math.isfinite(numbers[-1])
        assert (numbers[0] < numbers[1]) == (keys[0] < keys[1])
        assert (numbers[0] == numbers[1]) == (keys[0] == keys[1])

    def test_the_tolerated_rate_itself_is_feasible(self):
        """1 of 20 at 0.05, which 1 − 0.95 would not be in floating point."""
        assert Verdicts(20, 1, 10.0).feasible_reward(0.05) == 0.5
        assert Verdicts(20, 2, 10.0).feasible_reward(0.05) < 0

    def test_counts(self):
        verdicts = Verdicts()
        for _ in range(2):
            verdicts.add(
                torch.tensor([1.0, 3.0, torch.nan, 5.0]),
                torch.tensor([True, False, True, True]),
                torch.tensor([True, True, False, True]),
            )
        assert verdicts == Verdicts(judged=6, violations=2, reward_sum=18.0)


# Of every evaluated rollout, by optimizer step.
COSTS = {1: 0.5, 2: 0.1, 3: 0.2, 4: 0.9}  # the limit is 0.35
REWARDS = {1: 9.0, 2: -2.0, 3: -1.0, 4: 10.0}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}


class Staged(ConstrainedDistillTrainer):
    """With those costs in place of the ones that it measures in an evaluation."""

    def _signal(self, rollouts):
        if not self.model.training:
            rollouts = replace(rollouts, costs=COSTS[self.state.global_step] * rollouts.mask.float())
        return super()._signal(rollouts)


def staged_reward(completions, trainer_state, **kwargs):
    return [REWARDS.get(trainer_state.global_step, 0.0)] * len(completions)


def select(folder, max_steps=4, **kwargs):
    defaults = {
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": FEASIBLE_REWARD,
        "lr_scheduler_type": "constant",
        **EVALUATED,
    }
    return make_trainer(
        folder,
        Staged,
        reward_funcs=staged_reward,
        max_steps=max_steps,
        teacher_model=make_teacher(),
        eval_dataset=make_dataset(1),
        **{**defaults, **kwargs},
    )


def test_the_feasible_checkpoint_is_loaded(tmp_path):
    """Steps 1 and 4 have the highest rewards and are infeasible; of the feasible ones step 3 has the higher reward."""
    trainer = select(tmp_path, save_total_limit=1)
    trainer.train()
    logged = history(trainer, f"eval_{FEASIBLE_REWARD}")
    assert logged[1:3] == [-2.0, -1.0]
    assert max(logged[0], logged[3]) < -1e38
    assert trainer.state.best_metric == -1.0
    assert trainer.state.best_global_step == 3
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in trainer.model.state_dict().items())
    assert FEASIBLE_REWARD not in "".join(trainer.state.log_history[-1]), "logged after the evaluation"


def test_save_strategy_best(tmp_path):
    """
    A checkpoint is written where the metric improves: the infeasible first, then two feasible ones, in which nothing
    violates the limit and no tolerance is needed.
    """
    trainer = select(
        tmp_path,
        save_strategy="best",
        metric_for_best_model=f"eval_{FEASIBLE_REWARD}",
        tolerated_violation_rate=0.0,
    )
    trainer.train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (1, 2, 3)}
    assert trainer.state.best_metric == -1.0


def test_resume_keeps_the_best(tmp_path):
    select(tmp_path, max_steps=3).train()
    resumed = select(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert (resumed.state.best_metric, resumed.state.best_global_step) == (-1.0, 3)
    state = TrainerState.load_from_json(str(tmp_path / "checkpoint-4" / "trainer_state.json"))
    assert state.best_metric == -1.0
    assert state.best_model_checkpoint.endswith("checkpoint-3")


def test_before_an_automatic_limit_is_set(tmp_path):
    """Evaluations without a limit sort below all others, and do not stop the run."""
    trainer = select(tmp_path, cost_limit="auto", auto_limit_steps=2, auto_limit_margin=1000.0)
    trainer.train()
    logged = history(trainer, f"eval_{FEASIBLE_REWARD}")
    assert logged[0] == logged[1] < -1e39 or logged[0] == Verdicts().feasible_reward(0.0)
    assert trainer.state.best_global_step > 2


@pytest.mark.parametrize("trainer_class", [GKDDistillTrainer, LagrangianDistillTrainer, MiniLLMDistillTrainer])
def test_siblings(tmp_path, trainer_class):
    """Measured by every method that has a limit, equal to the mean reward of its judged rollouts where feasible."""
    trainer = make_scripted_trainer(
        tmp_path,
        trainer_class,
        completions=random_completions(4),
        max_steps=1,
        cost_limit=100.0,
        save_strategy="best",
        metric_for_best_model=FEASIBLE_REWARD,
        eval_dataset=make_dataset(1),
        **EVALUATED,
        **({"teacher_mixed_alpha": 0.0} if trainer_class is MiniLLMDistillTrainer else {}),
    )
    trainer.train()
    assert history(trainer, f"eval_{FEASIBLE_REWARD}") == pytest.approx(history(trainer, "eval_reward"))
    assert trainer.state.best_global_step == 1


def test_not_logged_unless_asked_for(tmp_path):
    trainer = make_trainer(tmp_path, teacher_model=make_teacher(), eval_dataset=make_dataset(1), **EVALUATED)
    assert FEASIBLE_REWARD not in "".join(trainer.evaluate())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_model": None}, "needs a teacher"),
        ({"eval_strategy": "no"}, "eval_strategy"),
        ({"eval_dataset": {"one": make_dataset(1), "two": make_dataset(1)}}, "single dataset"),
        ({"greater_is_better": False}, "greater"),
    ],
)
def test_refused(tmp_path, changes, message):
    asked = {"metric_for_best_model": FEASIBLE_REWARD, "eval_dataset": make_dataset(1), **EVALUATED}
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **{"teacher_model": make_teacher(), **asked, **changes})
