"""Sampled costs, the single-step gradient, the limit that sets itself, and limit schedules."""

import pytest
import torch
from helpers import (
    MINUTE_RUN,
    VOCAB,
    assert_gradient_is_dense,
    capture_rollouts,
    dense_logits,
    dense_logps,
    history,
    length_reward,
    make_dataset,
    make_model,
    make_rows,
    make_scripted_trainer,
    make_teacher,
    make_tokenizer,
    make_trainer,
    metrics,
    micro_batches,
    random_completions,
    run,
)

from trl_cmdp import ConstrainedDistillConfig, ConstrainedDistillTrainer, GKDDistillTrainer
from trl_cmdp.core import constrained_advantages, rollout_cost, violation_weights
from trl_cmdp.core.signal import Rollouts
from trl_cmdp.trainers.engine.limit import CostLimit


def floored(log_probs: torch.Tensor, floor: float) -> torch.Tensor:
    return torch.log((1 - floor) * log_probs.exp() + floor / VOCAB)


# Between the cheapest and the dearest of the scripted rollouts.
LIMITS = {
    "log_ratio": {"mean": 1.6, "sum": 5.0, "worst_prefix": 2.0},
    "teacher_nll": {"mean": 4.4, "sum": 15.0, "worst_prefix": 5.0},
}


class TestSampledCosts:
    @pytest.mark.parametrize("scope", ["mean", "sum", "worst_prefix"])
    @pytest.mark.parametrize("cost", ["log_ratio", "teacher_nll"])
    def test_limit_is_on_the_sampled_cost(self, tmp_path, cost, scope):
        """Costs, advantages and weights from the sampled tokens' dense log-probabilities; metrics of the same costs."""
        temperature, floor, limit = 0.8, 0.05, LIMITS[cost][scope]
        trainer = make_scripted_trainer(
            tmp_path,
            cost=cost,
            cost_scope=scope,
            cost_limit=limit,
            temperature=temperature,
            teacher_prob_floor=floor,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
        )
        batch = trainer._generate_and_score_completions(make_rows(8))
        mask = batch["completion_mask"].bool()
        student, teacher = (
            dense_logps(model, batch, temperature).detach() for model in (trainer.model, trainer.teacher_model)
        )
        teacher = floored(teacher, floor)
        costs = (student - teacher if cost == "log_ratio" else -teacher) * mask
        cost_of_rollouts = rollout_cost(costs, mask, scope)
        assert 0 < (cost_of_rollouts > limit).sum() < 8
        expected = violation_weights(costs, mask, limit, scope)
        torch.testing.assert_close(batch["divergence_weights"].double(), expected, rtol=0, atol=0)
        texts = trainer.processing_class.batch_decode(random_completions(8), skip_special_tokens=True)
        rewards = torch.tensor(length_reward(texts), dtype=torch.float64)
        advantages = constrained_advantages(rewards, costs, mask, 4, limit, 20.0, scope)
        torch.testing.assert_close(batch["advantages"].double(), advantages, rtol=1e-4, atol=1e-4)
        logged = metrics(trainer)
        assert logged["constraint/cost"] == pytest.approx(cost_of_rollouts.mean().item(), rel=1e-4)
        assert logged["constraint/satisfaction_rate"] == (cost_of_rollouts <= limit).double().mean()

    def test_the_divergence_is_logged_beside_it(self, tmp_path):
        plain = run(tmp_path / "a", teacher_model=make_teacher(), max_steps=1)
        sampled = run(tmp_path / "b", teacher_model=make_teacher(), max_steps=1, cost="teacher_nll")
        assert history(sampled, "teacher/divergence") == history(plain, "teacher/divergence")
        assert history(sampled, "constraint/cost") != history(plain, "constraint/cost")


@pytest.mark.parametrize("floor", [0.0, 0.05])
def test_single_step_gradient_is_that_of_the_expected_nll(tmp_path, floor):
    """Of violating rollouts, autograd of Σ_a π(a)·(−log μ(a)) by the student."""
    trainer = make_scripted_trainer(
        tmp_path,
        cost="teacher_nll",
        cost_scope="worst_prefix",
        cost_limit=1e-6,
        violation_distill_loss="teacher_nll",
        temperature=0.8,
        teacher_prob_floor=floor,
    )

    def expected_nll(student, teacher, batch, temperature, beta):
        log_probs = ((dense_logits(model, batch) / temperature).log_softmax(-1) for model in (student, teacher))
        student, teacher = log_probs
        return -(student.exp() * floored(teacher.detach(), floor)).sum(-1)

    assert_gradient_is_dense(trainer, micro_batches(trainer, make_rows(8)), costs=expected_nll)


class TestAutoLimit:
    FIELDS = {"cost_limit": "auto", "auto_limit_steps": 4, "max_steps": 6, "learning_rate": 0.01}

    def test_imitation_then_the_limit(self, tmp_path, monkeypatch):
        """Four steps of GKD; then a limit that is the quantile of the fourth step's costs, times the margin."""
        constant = {"lr_scheduler_type": "constant"}
        trainer = make_trainer(
            tmp_path / "auto",
            teacher_model=make_teacher(),
            **self.FIELDS,
            **constant,
            auto_limit_quantile=0.5,
            auto_limit_margin=1.5,
        )
        captured = capture_rollouts(trainer, monkeypatch)
        trainer.train()
        costs = rollout_cost(captured[3].costs, captured[3].mask, "mean")
        limit = 1.5 * costs.double().quantile(0.5).item()
        assert history(trainer, "constraint/limit") == pytest.approx([limit, limit], rel=1e-6)
        assert len(history(trainer, "constraint/cost")) == 6
        imitation = run(
            tmp_path / "gkd",
            GKDDistillTrainer,
            teacher_model=make_teacher(),
            max_steps=6,
            learning_rate=0.01,
            **constant,
        )
        assert history(trainer, "constraint/cost")[:5] == history(imitation, "constraint/cost")[:5]
        assert history(trainer, "loss")[:4] == history(imitation, "loss")[:4]

    @pytest.mark.parametrize("length", [{"max_steps": 4}, {"max_steps": -1, "num_train_epochs": 0.1}])
    def test_a_run_of_imitation_alone_is_an_error(self, tmp_path, length):
        with pytest.raises(ValueError, match=r"would be the whole run of 4 steps"):
            run(tmp_path, teacher_model=make_teacher(), **{**self.FIELDS, **length})

    def test_evaluation_before_the_limit_is_known(self, tmp_path):
        trainer = make_trainer(
            tmp_path,
            teacher_model=make_teacher(),
            eval_dataset=make_dataset(1),
            per_device_eval_batch_size=4,
            **self.FIELDS,
        )
        evaluated = trainer.evaluate()
        assert evaluated["eval_constraint/cost"] > 0
        assert "eval_constraint/satisfaction_rate" not in evaluated


class TestSchedule:
    @pytest.mark.parametrize("schedule", ["linear", "cosine"])
    @pytest.mark.parametrize("steps", [4, 0.5])
    def test_limits_of_the_steps(self, tmp_path, schedule, steps):
        """Below 1 they are a share of the run. What is logged as the limit is the one that is meant."""
        trainer = run(
            tmp_path,
            teacher_model=make_teacher(),
            max_steps=6 if steps == 4 else 8,
            cost_limit=1.0,
            cost_limit_start=3.0,
            cost_limit_schedule=schedule,
            cost_limit_schedule_steps=steps,
        )
        half = 0.5 if schedule == "linear" else 0.5**0.5
        expected = [3.0, 2 + half, 2.0, 2 - half]
        scheduled = history(trainer, "constraint/scheduled_limit")
        assert scheduled == pytest.approx(expected + [1.0] * (len(scheduled) - 4))
        assert set(history(trainer, "constraint/limit")) == {1.0}

    def test_whole_run_and_evaluation_at_the_end_of_it(self, tmp_path):
        trainer = run(
            tmp_path,
            teacher_model=make_teacher(),
            eval_dataset=make_dataset(1),
            max_steps=4,
            cost_limit=1.0,
            cost_limit_start=3.0,
            cost_limit_schedule="linear",
            cost_limit_schedule_steps=None,
            eval_strategy="steps",
            eval_steps=2,
            per_device_eval_batch_size=4,
        )
        assert history(trainer, "constraint/scheduled_limit") == pytest.approx([3.0, 2.5, 2.0, 1.5])
        assert history(trainer, "eval_constraint/limit") == [1.0, 1.0]
        assert history(trainer, "eval_constraint/scheduled_limit") == []

    def test_the_default_comes_down_in_the_first_steps(self, tmp_path):
        """As it stands, without a word in the arguments: in three tenths of the run, on a line."""
        args = ConstrainedDistillConfig(tmp_path, cost_limit=0.5, **{**MINUTE_RUN, "max_steps": 10})
        trainer = ConstrainedDistillTrainer(
            make_model(),
            length_reward,
            args,
            make_dataset(),
            processing_class=make_tokenizer(),
            teacher_model=make_teacher(),
        )
        trainer.train()
        start, second, third, *rest = history(trainer, "constraint/scheduled_limit")
        assert start > 0.5
        assert [second, third] == pytest.approx([start + share * (0.5 - start) for share in (1 / 3, 2 / 3)])
        assert set(rest) == {0.5}

    def test_it_starts_where_the_student_is(self, tmp_path, monkeypatch):
        """At the 0.9-quantile of what the first rollouts cost, and never below the limit."""
        settings = {"max_steps": 4, "cost_limit_schedule": "linear", "cost_limit_schedule_steps": 0.5}
        trainer = make_trainer(tmp_path / "far", teacher_model=make_teacher(), cost_limit=0.01, **settings)
        captured = capture_rollouts(trainer, monkeypatch)
        trainer.train()
        start = rollout_cost(captured[0].costs, captured[0].mask).quantile(0.9).item()
        assert start > 0.01
        limits = history(trainer, "constraint/scheduled_limit")
        assert limits == pytest.approx([start, (start + 0.01) / 2, 0.01, 0.01])
        near = run(tmp_path / "near", teacher_model=make_teacher(), cost_limit=1e3, **settings)
        assert set(history(near, "constraint/scheduled_limit")) == {1e3}

    def test_it_waits_for_the_first_rollouts_that_have_tokens(self):
        """Until then it has no place to start from, and the limit is the one that is meant."""
        limit = CostLimit(ConstrainedDistillConfig("unused", cost_limit=0.5, **MINUTE_RUN).limit_plan, [""])
        costs, mask = torch.full((4, 2), 3.0), torch.ones(4, 2)
        full, empty = (Rollouts(torch.zeros(4), costs * m, mask * m, 4, 2, torch.zeros(4).long()) for m in (1, 0))
        assert limit.scheduled(empty, "mean", 0, 10) == 0.5
        assert limit.state() == {"schedule_start": None}
        assert limit.scheduled(full, "mean", 1, 10) == pytest.approx(3.0 + (0.5 - 3.0) / 3)
        assert limit.state() == {"schedule_start": 3.0}

    def test_the_third_place_goes_by_the_limit_that_is_meant(self, tmp_path):
        """Under a limit that is still wide its weights are those of the run without a schedule."""
        weights = []
        for schedule in ({"cost_limit_schedule": "constant"}, {"cost_limit_schedule": "linear"}):
            trainer = make_scripted_trainer(
                tmp_path, unrewarded_distill_coef=1.0, violation_distill_coef=0.0, **schedule
            )
            trainer._generate_and_score_completions(make_rows(8))
            weights.append(metrics(trainer)["constraint/unrewarded_weight"])
        assert 0 < weights[0] == weights[1]

    def test_it_starts_after_the_imitation_phase(self, tmp_path):
        """And ends at the automatic limit, with which the run without a schedule goes on."""
        settings = {"cost_limit": "auto", "auto_limit_steps": 2, "max_steps": 6}
        limit = history(run(tmp_path / "auto", teacher_model=make_teacher(), **settings), "constraint/limit")[0]
        trainer = run(
            tmp_path / "both",
            teacher_model=make_teacher(),
            cost_limit_start=9.0,
            cost_limit_schedule="linear",
            cost_limit_schedule_steps=None,
            **settings,
        )
        assert history(trainer, "constraint/scheduled_limit") == pytest.approx(
            [9 + share * (limit - 9) for share in (0, 0.25, 0.5, 0.75)]
        )
