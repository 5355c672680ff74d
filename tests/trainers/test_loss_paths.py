"""The paths through scoring and loss: forwards and memory they take, and every setting of TRL's that they meet."""

import math

import pytest
import torch
from helpers import (
    EOS,
    CreatedShapes,
    capture_rollouts,
    history,
    loss_and_gradients,
    make_lora,
    make_model,
    make_rows,
    make_scripted_trainer,
    make_teacher,
    make_trainer,
    metrics,
    micro_batches,
    random_completions,
    relative_error,
    run,
    same_weights,
)


class TestTeacherStates:
    @pytest.mark.parametrize("credit_assignment", ["trajectory", "token"])
    def test_reused_or_recomputed(self, tmp_path, credit_assignment):
        """Kept (also in host memory) while they fit the bound, recomputed otherwise: the same loss and gradients."""
        results = []
        for memory_mb, offload in ((256, False), (256, True), (1e-6, False)):
            trainer = make_scripted_trainer(
                tmp_path,
                teacher_hidden_memory_mb=memory_mb,
                teacher_hidden_offload=offload,
                credit_assignment=credit_assignment,
            )
            results.append(loss_and_gradients(trainer, micro_batches(trainer, make_rows(8))))
        for loss, gradients in results[1:]:
            assert loss == pytest.approx(results[0][0], rel=1e-6)
            assert relative_error(gradients, results[0][1]) < 1e-6

    def test_kept_in_the_teachers_dtype(self, tmp_path):
        trainer = make_scripted_trainer(tmp_path, teacher_model=make_teacher(dtype=torch.bfloat16), cost_limit=1e-9)
        for batch in micro_batches(trainer, make_rows(8)):
            assert {hidden.dtype for hidden in batch["teacher_hidden"]} == {torch.bfloat16}

    @pytest.mark.parametrize(
        ("cost_limit", "memory_mb", "lora", "teacher_forwards"),
        [
            (1e-9, 256, False, 0),
            (1e-9, 256, True, 0),
            (1e-9, 1e-6, False, 1),
            (1e-9, 1e-6, True, 1),
            (1e3, 1e-6, False, 0),  # no rollout violates the limit: the step costs what GRPO's costs
        ],
    )
    def test_number_of_forwards(self, tmp_path, cost_limit, memory_mb, lora, teacher_forwards):
        """Per micro-step: one student forward, and at most one teacher forward; scoring is one of each per batch."""
        teacher = make_teacher()
        trainer = make_scripted_trainer(
            tmp_path,
            teacher_model=teacher,
            cost_limit=cost_limit,
            teacher_hidden_memory_mb=memory_mb,
            peft_config=make_lora() if lora else None,
        )
        student = trainer.model.get_base_model() if lora else trainer.model
        calls = []
        student.base_model.register_forward_hook(lambda *_: calls.append("student"))
        teacher.base_model.register_forward_hook(lambda *_: calls.append("teacher"))
        batches = micro_batches(trainer, make_rows(8))
        assert sorted(calls) == ["student"] * 2 + ["teacher"] * 2  # rollouts are scripted: this is scoring alone
        for batch in batches:
            calls.clear()
            trainer.compute_loss(trainer.model, batch).backward()
            assert sorted(calls) == ["student"] + ["teacher"] * teacher_forwards

    def test_teacher_is_frozen_and_in_eval_mode(self, tmp_path):
        teacher = make_teacher().train()
        before = {name: parameter.clone() for name, parameter in teacher.named_parameters()}
        trainer = run(tmp_path, teacher_model=teacher, cost_limit=0.01)
        assert not trainer.teacher_model.training
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        assert all(torch.equal(parameter, before[name]) for name, parameter in teacher.named_parameters())


class TestMemory:
    VOCAB = 4096

    def most_rows(self, created: CreatedShapes) -> int:
        return max(math.prod(shape) for shape in created.shapes if self.VOCAB in shape) // self.VOCAB

    def test_no_tensor_of_batch_times_vocabulary(self, tmp_path):
        """In scoring, loss and backward no tensor holds the logits of all tokens: tiles of the stated bound."""
        completions = random_completions(8, longest=32)
        trainer = make_scripted_trainer(
            tmp_path,
            completions=completions,
            model=make_model(vocab_size=self.VOCAB, hidden_size=4),
            teacher_model=make_teacher(vocab_size=self.VOCAB, hidden_size=4),
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            max_completion_length=32,
            divergence_memory_mb=0.25,
            cost_limit=1e-9,
        )
        bound = int(0.25 * 2**20 // (2 * self.VOCAB * 4))  # rows of a tile: both models' in float32 share the memory
        assert sum(map(len, completions)) > 10 * bound
        rows = make_rows(8)
        with CreatedShapes() as created:
            (batch,) = micro_batches(trainer, rows)
            trainer.compute_loss(trainer.model, batch).backward()
        assert "divergence_weights" in batch
        # The heads' gradients, (V, hidden) with hidden 4 here, are below the tile.
        assert self.most_rows(created) <= bound
        with CreatedShapes() as created:  # it finds what it looks for
            trainer.teacher_model(input_ids=torch.full((2, 9), 3))
        assert self.most_rows(created) == 18


class TestPrecision:
    def test_bf16_scores_as_the_loss_does(self, tmp_path):
        """Under autocast, the costs that judge a rollout equal the costs in the loss's forward, before any step."""
        scored = []
        for bf16 in (True, False):
            trainer = make_scripted_trainer(tmp_path, bf16=bf16, cost_limit=1e-9, max_steps=1)
            trainer.train()
            scored += history(trainer, "teacher/divergence")
            assert history(trainer, "distill_loss") == pytest.approx(scored[-1:], rel=1e-5)  # dapo's mean over tokens
            assert all(0 < norm < math.inf for norm in history(trainer, "grad_norm"))
        assert scored[0] != scored[1]  # autocast was on
        assert scored[0] == pytest.approx(scored[1], rel=0.1)

    @pytest.mark.parametrize(
        ("bf16", "dtype"), [(True, torch.float32), (False, torch.float32), (False, torch.bfloat16)]
    )
    def test_half_precision_weights(self, tmp_path, bf16, dtype):
        """A bf16 teacher (its own dtype) with a float32 student, and a bf16 student, train with finite losses."""
        teacher = make_teacher(dtype=torch.bfloat16)
        trainer = run(tmp_path, model=make_model(dtype=dtype), teacher_model=teacher, bf16=bf16, cost_limit=0.01)
        assert teacher.dtype == torch.bfloat16
        assert all(0 < loss < math.inf for loss in history(trainer, "distill_loss"))
        assert all(0 < norm < math.inf for norm in history(trainer, "grad_norm"))


class TestMasks:
    COMPLETIONS = ([2, 3, 4, 5, 6, EOS], [7, 8, 9, EOS], [2, 4, EOS], [5, 5, 5, 5, 5, 5])

    @pytest.mark.parametrize("credit_assignment", ["trajectory", "token"])
    @pytest.mark.parametrize("aggregation", ["lexicographic", "sum_then_normalize"])
    def test_truncated_completions(self, tmp_path, credit_assignment, aggregation):
        """A truncated completion that TRL masks would cost 0 and look feasible: it is left out and counted."""
        trainer = make_scripted_trainer(
            tmp_path,
            completions=self.COMPLETIONS,
            mask_truncated_completions=True,
            cost_limit=1e3,
            credit_assignment=credit_assignment,
            constraint_aggregation=aggregation,
            reward_funcs=lambda completions, **kwargs: [3.0, 1.0, 2.0, 9.0],
        )
        batch = trainer._generate_and_score_completions(make_rows(4))
        logged = metrics(trainer)
        assert (logged["constraint/satisfaction_rate"], logged["constraint/unjudged_frac"]) == (1.0, 0.25)
        advantages = batch["advantages"].view(4, -1)[:, 0]
        # Standardised over the three that are judged: their mean is 2 and their deviation 1. The reward 9 is not seen.
        torch.testing.assert_close(advantages, torch.tensor([1.0, -1.0, 0.0, 0.0]), rtol=1e-3, atol=1e-3)


class TestRewards:
    def capture(self, tmp_path, monkeypatch, reward_funcs, **kwargs):
        trainer = make_scripted_trainer(
            tmp_path, completions=random_completions(4), reward_funcs=reward_funcs, cost_limit=1e3, **kwargs
        )
        captured = capture_rollouts(trainer, monkeypatch)
        batch = trainer._generate_and_score_completions(make_rows(4))
        return captured[0].rewards, batch["advantages"], metrics(trainer)

    def test_several_weighted_functions(self, tmp_path, monkeypatch):
        """The task reward is the weighted sum; a function that returns None for a rollout adds nothing; one may be async."""

        async def reward(**kwargs):
            return [1.0, 2.0, 3.0, 4.0]

        functions = [reward, lambda **kwargs: [1.0, None, 0.0, 1.0]]
        rewards, _, _ = self.capture(tmp_path, monkeypatch, functions, reward_weights=[0.5, 2.0])
        assert rewards.tolist() == [2.5, 1.0, 1.5, 4.0]

    @pytest.mark.parametrize("unscored", [None, math.nan])
    def test_unscored_by_every_function(self, tmp_path, monkeypatch, unscored):
        """A rollout that no function scored is unjudged: NaN, advantage 0, and no part of any mean."""
        rewards, advantages, logged = self.capture(tmp_path, monkeypatch, lambda **kwargs: [1.0, unscored, 2.0, 3.0])
        assert rewards.isnan().tolist() == [False, True, False, False]
        torch.testing.assert_close(advantages, torch.tensor([-1.0, 0.0, 0.0, 1.0]), rtol=1e-3, atol=1e-3)
        assert (logged["constraint/satisfaction_rate"], logged["constraint/unjudged_frac"]) == (1.0, 0.25)

    @pytest.mark.parametrize("credit_assignment", ["trajectory", "token"])
    def test_none_for_every_rollout(self, tmp_path, credit_assignment):
        """No reward at all in a step is no error: nothing is learnt from it, and nothing becomes NaN."""
        trainer = run(
            tmp_path,
            reward_funcs=lambda completions, **kwargs: [None] * len(completions),
            teacher_model=make_teacher(),
            cost_limit=1e3,
            credit_assignment=credit_assignment,
        )
        assert history(trainer, "grad_norm") == [0.0, 0.0]
        assert history(trainer, "constraint/unjudged_frac") == [1.0, 1.0]


class TestBatching:
    @pytest.mark.parametrize(
        "settings",
        [
            {"num_iterations": 2, "gradient_accumulation_steps": 2},
            {"steps_per_generation": 2, "gradient_accumulation_steps": 1},
            {"steps_per_generation": 2, "gradient_accumulation_steps": 4},
            {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "num_iterations": 2},
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "loss_type": "vespo"},
            {"max_grad_norm": 0.0, "teacher_beta": 0.5, "scale_rewards": False},
        ],
        ids=lambda settings: "-".join(settings),
    )
    def test_trains(self, tmp_path, settings):
        """A few steps: finite, the divergence takes part in each, and something is learnt."""
        trainer = run(tmp_path, teacher_model=make_teacher(), cost_limit=0.1, max_steps=4, **settings)
        assert all(math.isfinite(loss) for loss in history(trainer, "loss"))
        assert all(math.isfinite(norm) for norm in history(trainer, "grad_norm"))
        assert len(history(trainer, "distill_loss")) == 4
        assert all(0 < value < math.inf for value in history(trainer, "distill_loss"))
        assert not same_weights(trainer, make_trainer(tmp_path))

    def test_second_iteration_uses_the_new_student(self, tmp_path):
        """On reused rollouts the divergence in the loss is the current student's, not the one that was scored."""
        trainer = run(
            tmp_path,
            reward_funcs=None,
            teacher_model=make_teacher(),
            cost_limit=1e-9,
            violation_distill_coef=1.0,
            num_iterations=3,
            max_steps=3,
            learning_rate=0.02,
            loss_type="dapo",
        )
        scored, in_loss = history(trainer, "teacher/divergence"), history(trainer, "distill_loss")
        assert len(scored) == 1  # one generation, three steps
        assert in_loss[0] == pytest.approx(scored[0], rel=1e-4)
        assert in_loss[2] < in_loss[1] < in_loss[0]
