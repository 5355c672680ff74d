"""Oracles 3 and 5 of DESIGN section 6, on the trainer: the dense divergence, and what must change nothing."""

import pytest
import torch
from helpers import (
    EOS,
    PAD,
    capture_rollouts,
    dense_costs,
    loss_and_gradients,
    make_rows,
    make_scripted_trainer,
    make_teacher,
    micro_batches,
    random_completions,
    relative_error,
)


class TestDenseDivergence:
    @pytest.mark.parametrize(
        ("beta", "temperature", "memory_mb"),
        [(1.0, 1.0, 1e-6), (1.0, 0.6, 256), (0.0, 1.0, 256), (0.0, 0.6, 1e-6), (0.3, 1.0, 1e-6), (0.3, 0.6, 256)],
    )
    def test_costs(self, tmp_path, monkeypatch, beta, temperature, memory_mb):
        """Costs equal the dense float64 divergence at the trainer's temperature, whatever the memory bound."""
        trainer = make_scripted_trainer(
            tmp_path, temperature=temperature, teacher_beta=beta, divergence_memory_mb=memory_mb
        )
        captured = capture_rollouts(trainer, monkeypatch)
        batch = trainer._generate_and_score_completions(make_rows(8))
        expected = dense_costs(trainer.model, trainer.teacher_model, batch, temperature, beta).detach()
        expected = expected * batch["completion_mask"]
        assert expected.sum() > 1
        assert captured[0].mask.sum(1).tolist() == [len(ids) for ids in random_completions(8)]
        assert (captured[0].costs.double() - expected).norm() / expected.norm() < 1e-5
        assert (captured[0].costs[~captured[0].mask] == 0).all()

    def test_teacher_prob_floor(self, tmp_path, monkeypatch):
        """A floor bounds a cost that would be infinite: the teacher gives a token probability 0."""
        teacher = make_teacher()
        with torch.no_grad():
            teacher.lm_head.weight[5].mul_(1e6)  # a logit of ±1e6
        floored = make_scripted_trainer(tmp_path, teacher_model=teacher, teacher_prob_floor=1e-4)
        captured = capture_rollouts(floored, monkeypatch)
        floored._generate_and_score_completions(make_rows(8))
        assert 1 < captured[0].costs.max() <= torch.tensor(16 / 1e-4).log()

    def test_padding_tokens_are_not_what_is_masked(self, tmp_path, monkeypatch):
        """The mask decides, not the token: a sampled pad token costs like any other."""
        trainer = make_scripted_trainer(
            tmp_path, completions=[[PAD, 3, EOS], [PAD, PAD, 4, 5, 6, 7], [2, 2, EOS], [PAD]]
        )
        captured = capture_rollouts(trainer, monkeypatch)
        trainer._generate_and_score_completions(make_rows(4))
        assert captured[0].mask.sum(1).tolist() == [3, 6, 3, 1]
        assert (captured[0].costs[captured[0].mask] > 0).all()


class TestInvariance:
    """For fixed rollouts the result depends on nothing but the rollouts. bnpo's normaliser is the micro-batch's."""

    def check(self, tmp_path, credit_assignment, changes, *, order=range(8), **settings):
        """Loss and gradients of one micro-batch of eight rollouts are those with `changes`, in another `order`."""
        settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, **settings}
        results = []
        for indices, changed in ((range(8), {}), (order, changes)):
            trainer = make_scripted_trainer(
                tmp_path,
                completions=[random_completions(8)[index] for index in indices],
                reward_funcs=id_reward,
                credit_assignment=credit_assignment,
                **{**settings, **changed},
            )
            batches = micro_batches(trainer, [make_rows(8)[index] for index in indices])
            weights = torch.cat([batch["divergence_weights"].sum(1) for batch in batches])
            assert 0 < (weights > 0).sum() < len(weights)  # some rollouts violate, some do not
            results.append(loss_and_gradients(trainer, batches))
        assert results[1][0] == pytest.approx(results[0][0], rel=1e-4, abs=1e-6)
        assert relative_error(results[1][1], results[0][1]) < 1e-5

    @pytest.mark.parametrize(
        ("loss_type", "credit_assignment", "accumulation"),
        [
            (loss_type, ("trajectory", "token")[i % 2], (2, 4)[i // 2 % 2])
            for i, loss_type in enumerate(["grpo", "dapo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"])
        ],
    )
    def test_micro_batches(self, tmp_path, loss_type, credit_assignment, accumulation):
        changes = {
            "per_device_train_batch_size": 8 // accumulation,
            "gradient_accumulation_steps": accumulation,
        }
        self.check(tmp_path, credit_assignment, changes, loss_type=loss_type)

    @pytest.mark.parametrize("credit_assignment", ["trajectory", "token"])
    def test_padding(self, tmp_path, credit_assignment):
        """More padding on both sides changes nothing."""
        self.check(tmp_path, credit_assignment, {"pad_to_multiple_of": 16})

    @pytest.mark.parametrize(
        ("credit_assignment", "order"),
        [("trajectory", [4, 5, 6, 7, 0, 1, 2, 3]), ("token", [2, 0, 3, 1, 7, 6, 5, 4])],
        ids=["of-groups", "within-groups"],
    )
    def test_row_order(self, tmp_path, credit_assignment, order):
        self.check(tmp_path, credit_assignment, {}, order=order)


def id_reward(completion_ids, **kwargs):
    """Reward that depends on the completion alone."""
    return [float(sum(ids) % 4) for ids in completion_ids]
