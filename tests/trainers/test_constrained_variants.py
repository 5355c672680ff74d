"""Sampled costs, the single-step gradient, the limit that sets itself, and limit schedules."""

import json

import pytest
import torch
from helpers import (
    capture_rollouts,
    history,
    loss_and_gradients,
    make_dataset,
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
from trl import TrlParser

from trl_cmdp import ConstrainedDistillConfig
from trl_cmdp.core import constrained_advantages, rollout_cost, violation_weights


def build(folder, **kwargs):
    trainer_kwargs = {"teacher_model": make_teacher(), **kwargs.pop("trainer_kwargs", {})}
    return make_trainer(folder, trainer_kwargs=trainer_kwargs, **kwargs)


def dense_log_probs(model, batch, temperature):
    """Float64 log-probabilities (B, T, V) of every token, differentiable."""
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    length = batch["completion_ids"].size(1)
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, -(length + 1) : -1].double()
    return (logits / temperature).log_softmax(-1)


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
        temperature, floor = 0.8, 0.05
        trainer = build(
            tmp_path,
            cost=cost,
            cost_scope=scope,
            cost_limit=LIMITS[cost][scope],
            temperature=temperature,
            teacher_prob_floor=floor,
            trainer_kwargs={"rollout_func": scripted(random_completions(8))},
            per_device_train_batch_size=8,
        )
        batch = micro_batches(trainer, make_rows(8))[0]
        mask, ids = batch["completion_mask"].bool(), batch["completion_ids"].unsqueeze(-1)
        with torch.no_grad():
            student, teacher = (
                dense_log_probs(model, batch, temperature).gather(-1, ids).squeeze(-1)
                for model in (trainer.model, trainer.teacher_model)
            )
        teacher = torch.log((1 - floor) * teacher.exp() + floor / 16)
        costs = (student - teacher if cost == "log_ratio" else -teacher) * mask
        # The batch is shuffled, groups are not whole any more: sort it back by prompt.
        order = batch["prompt_ids"].sum(1).argsort(stable=True)
        limit = trainer.args.cost_limit
        cost_of_rollouts = rollout_cost(costs, mask, scope)
        assert 0 < (cost_of_rollouts > limit).sum() < 8
        expected = violation_weights(costs, mask, limit, scope)
        torch.testing.assert_close(batch["divergence_weights"].double(), expected, rtol=0, atol=0)
        texts = [
            trainer.processing_class.decode(row[m], skip_special_tokens=True)
            for row, m in zip(batch["completion_ids"], mask, strict=True)
        ]
        rewards = torch.tensor([float(len(text) % 3 == 0) for text in texts], dtype=torch.float64)
        advantages = constrained_advantages(rewards[order], costs[order], mask[order], 4, limit, 20.0, scope)
        torch.testing.assert_close(batch["advantages"][order].double(), advantages, rtol=1e-4, atol=1e-4)
        assert trainer._sums["train"]["constraint/cost"][0] == pytest.approx(cost_of_rollouts.sum().item(), rel=1e-4)
        assert trainer._sums["train"]["constraint/satisfaction_rate"] == [(cost_of_rollouts <= limit).sum().item(), 8]

    def test_the_divergence_is_logged_beside_it(self, tmp_path):
        plain = run(tmp_path / "a", trainer_kwargs={"teacher_model": make_teacher()}, max_steps=1)
        sampled = run(
            tmp_path / "b", trainer_kwargs={"teacher_model": make_teacher()}, max_steps=1, cost="teacher_nll"
        )
        assert history(sampled, "teacher/divergence") == history(plain, "teacher/divergence")
        assert history(sampled, "constraint/cost") != history(plain, "constraint/cost")

    def test_log_ratio_estimates_the_divergence(self, tmp_path, monkeypatch):
        """On the student's own rollouts the mean log-ratio is the mean reverse KL, within its standard error."""
        trainer = build(
            tmp_path, cost="log_ratio", per_device_train_batch_size=1000, num_generations=1000, max_completion_length=4
        )
        captured = capture_rollouts(trainer, monkeypatch)
        micro_batches(trainer, make_rows(1000, group=1000))
        rollouts = captured[0]
        log_ratio = (rollouts.student_logps - rollouts.teacher_logps)[rollouts.mask]
        error = log_ratio.std() / len(log_ratio) ** 0.5
        assert abs(log_ratio.mean() - rollouts.costs[rollouts.mask].mean()) < 4 * error
        assert (log_ratio < 0).any()


@pytest.mark.parametrize("floor", [0.0, 0.05])
def test_single_step_gradient_is_that_of_the_expected_nll(tmp_path, floor):
    """With no advantages, under a limit that nothing meets: autograd of Σ_a π(a)·(−log μ(a)) by the student."""
    trainer = build(
        tmp_path,
        cost="teacher_nll",
        cost_scope="worst_prefix",
        cost_limit=1e-6,
        violation_distill_loss="teacher_nll",
        loss_type="dapo",
        temperature=0.8,
        teacher_prob_floor=floor,
        trainer_kwargs={"rollout_func": scripted(random_completions(4))},
    )
    batch = micro_batches(trainer, make_rows(4))[0]
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    _, gradients = loss_and_gradients(trainer, [batch])
    trainer.model.zero_grad()
    student = dense_log_probs(trainer.model, batch, 0.8)
    teacher = dense_log_probs(trainer.teacher_model, batch, 0.8).detach()
    teacher = torch.log((1 - floor) * teacher.exp() + floor / 16)
    expected = -(student.exp() * teacher).sum(-1)  # (B, T)
    (expected * batch["completion_mask"]).sum().div(batch["completion_mask"].sum()).backward()
    reference = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    assert relative_error(gradients, reference) < 1e-5


class TestAutoLimit:
    FIELDS = {"cost_limit": "auto", "auto_limit_steps": 4, "max_steps": 6, "learning_rate": 0.01}

    def test_imitation_then_the_limit(self, tmp_path, monkeypatch):
        """Four steps of GKD; then a limit that is the quantile of the fourth step's costs, times the margin."""
        from trl_cmdp import GKDDistillTrainer

        settings = {"learning_rate": 0.01, "lr_scheduler_type": "constant"}
        trainer = build(
            tmp_path / "auto", **{**self.FIELDS, **settings}, auto_limit_quantile=0.5, auto_limit_margin=1.5
        )
        captured = capture_rollouts(trainer, monkeypatch)
        trainer.train()
        costs = rollout_cost(captured[3].costs, captured[3].mask, "mean")
        limit = 1.5 * costs.double().quantile(0.5).item()
        assert trainer._cost_limit._auto.limit == pytest.approx(limit, rel=1e-6)
        assert history(trainer, "constraint/limit") == pytest.approx([limit, limit])
        assert len(history(trainer, "constraint/cost")) == 6
        imitation = run(
            tmp_path / "gkd",
            GKDDistillTrainer,
            trainer_kwargs={"teacher_model": make_teacher()},
            max_steps=6,
            **settings,
        )
        assert history(trainer, "constraint/cost")[:5] == history(imitation, "constraint/cost")[:5]
        assert history(trainer, "loss")[:4] == history(imitation, "loss")[:4]

    @pytest.mark.parametrize("stop", [2, 4, 5])
    def test_survives_kill_and_resume(self, tmp_path, stop):
        def resumable(name, max_steps):
            fields = {**self.FIELDS, "lr_scheduler_type": "constant"}
            # The stopped run must not know that it will stop: it is killed by a callback, not by its own end.
            return build(tmp_path / name, **fields, save_strategy="steps", save_steps=1)

        from transformers import TrainerCallback

        class Kill(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = state.global_step == stop

        whole = resumable("whole", 6)
        whole.train()
        killed = resumable("stopped", 6)
        killed.add_callback(Kill())
        killed.train()
        assert killed.state.global_step == stop
        resumed = resumable("stopped", 6)
        resumed.train(resume_from_checkpoint=True)
        assert resumed._cost_limit._auto == whole._cost_limit._auto
        assert history(resumed, "constraint/limit") == history(whole, "constraint/limit")
        expected = weights(whole)
        assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())
        state = json.loads((tmp_path / "stopped" / "checkpoint-6" / "trl_cmdp_state.json").read_text())
        assert state["limit"] == whole._cost_limit._auto.limit

    def test_a_run_of_imitation_alone_is_an_error(self, tmp_path):
        with pytest.raises(ValueError, match=r"would be the whole run of 4 steps"):
            build(tmp_path, **{**self.FIELDS, "max_steps": 4}).train()

    def test_evaluation_before_the_limit_is_known(self, tmp_path):
        trainer = build(
            tmp_path, **self.FIELDS, per_device_eval_batch_size=4, trainer_kwargs={"eval_dataset": make_dataset(1)}
        )
        metrics = trainer.evaluate()
        assert metrics["eval_constraint/cost"] > 0
        assert "eval_constraint/satisfaction_rate" not in metrics


class TestSchedule:
    def test_limits_of_the_steps(self, tmp_path):
        limits = {}
        for schedule in ("linear", "cosine"):
            trainer = run(
                tmp_path / schedule,
                trainer_kwargs={"teacher_model": make_teacher()},
                max_steps=6,
                cost_limit=1.0,
                cost_limit_start=3.0,
                cost_limit_schedule=schedule,
                cost_limit_schedule_steps=4,
            )
            limits[schedule] = history(trainer, "constraint/limit")
        assert limits["linear"] == pytest.approx([3.0, 2.5, 2.0, 1.5, 1.0, 1.0])
        half = 0.5**0.5
        assert limits["cosine"] == pytest.approx([3.0, 2 + half, 2.0, 2 - half, 1.0, 1.0])

    def test_whole_run_by_default_and_evaluation_at_the_end_of_it(self, tmp_path):
        trainer = build(
            tmp_path,
            max_steps=4,
            cost_limit=1.0,
            cost_limit_start=3.0,
            cost_limit_schedule="linear",
            eval_strategy="steps",
            eval_steps=2,
            per_device_eval_batch_size=4,
            trainer_kwargs={"eval_dataset": make_dataset(1)},
        )
        trainer.train()
        assert history(trainer, "constraint/limit") == pytest.approx([3.0, 2.5, 2.0, 1.5])
        assert history(trainer, "eval_constraint/limit") == [1.0, 1.0]

    def test_it_starts_after_the_imitation_phase(self, tmp_path):
        trainer = build(
            tmp_path,
            cost_limit="auto",
            auto_limit_steps=2,
            max_steps=6,
            cost_limit_start=9.0,
            cost_limit_schedule="linear",
        )
        trainer.train()
        limit = trainer._cost_limit._auto.limit
        assert history(trainer, "constraint/limit") == pytest.approx(
            [9 + share * (limit - 9) for share in (0, 0.25, 0.5, 0.75)]
        )


class TestFields:
    @pytest.mark.parametrize(("text", "value"), [("0.25", 0.25), ("auto", "auto"), ("1e-2", 0.01)])
    def test_command_line_and_yaml(self, tmp_path, text, value):
        """TRL's parser reads a number and a word, from the command line and from YAML."""
        (config,) = TrlParser(ConstrainedDistillConfig).parse_args_and_config(
            ["--output_dir", str(tmp_path), "--cost_limit", text, "--use_cpu", "true", "--bf16", "false"]
        )
        assert config.cost_limit == value
        assert type(config.cost_limit) is type(value)
        path = tmp_path / "config.yaml"
        path.write_text(f"output_dir: {tmp_path}\ncost_limit: {text}\nuse_cpu: true\nbf16: false\n")
        (config,) = TrlParser(ConstrainedDistillConfig).parse_args_and_config(["--config", str(path)])
        assert config.cost_limit == value

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"cost_limit": "none"}, "must be a number, 'auto', or a number for each teacher, got 'none'"),
            ({"cost_limit": None}, "must be a number, 'auto', or a number for each teacher, got None"),
            ({"cost_limit": "-1"}, "`cost_limit` must be positive"),
            ({"cost": "kl"}, "`cost` must be one of"),
            ({"auto_limit_steps": 0}, "`auto_limit_steps` must be positive"),
            ({"auto_limit_quantile": 0.0}, r"must lie in \(0, 1\]"),
            ({"cost_limit_start": 1.0}, "belong to a schedule"),
            ({"cost_limit_schedule": "linear"}, "needs `cost_limit_start`"),
            ({"cost_limit_schedule": "linear", "cost_limit_start": 0.0}, "`cost_limit_start` must be positive"),
            ({"cost_limit_schedule": "step"}, "`cost_limit_schedule` must be one of"),
            ({"violation_distill_loss": "kl"}, "`violation_distill_loss` must be one of"),
        ],
    )
    def test_bad_fields_are_errors(self, tmp_path, fields, message):
        with pytest.raises(ValueError, match=message):
            ConstrainedDistillConfig(str(tmp_path), use_cpu=True, bf16=False, **fields)
