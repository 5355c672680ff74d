"""Oracles 3, 4 and 5 of DESIGN section 6, on the trainer: dense divergence, GKD's gradient, invariances."""

import pytest
import torch
from helpers import (
    EOS,
    PAD,
    capture_rollouts,
    dense_costs,
    loss_and_gradients,
    make_model,
    make_rows,
    make_teacher,
    make_trainer,
    micro_batches,
    random_completions,
    relative_error,
    scripted,
)

import trl_cmdp.trainers.constrained_trainer as constrained_trainer


UNBOUNDED = 1e-9  # a limit that no rollout meets


def build(tmp_path, completions, *, teacher=None, model=None, **kwargs):
    trainer_kwargs = {
        "teacher_model": make_teacher() if teacher is None else teacher,
        "rollout_func": scripted(completions),
    }
    return make_trainer(
        tmp_path, model=make_model(spread=0.4) if model is None else model, trainer_kwargs=trainer_kwargs, **kwargs
    )


class TestDenseDivergence:
    @pytest.mark.parametrize("temperature", [1.0, 0.6])
    @pytest.mark.parametrize("beta", [1.0, 0.0, 0.3])
    def test_costs(self, tmp_path, monkeypatch, beta, temperature):
        """Costs equal the dense float64 divergence at the trainer's temperature, whatever the memory bound."""
        teacher, model = make_teacher(), make_model(spread=0.4)
        completions = random_completions(8)
        rows = make_rows(8)
        for memory_mb in (256, 1e-6):
            trainer = build(
                tmp_path,
                completions,
                teacher=teacher,
                model=make_model(spread=0.4),
                temperature=temperature,
                teacher_beta=beta,
                divergence_memory_mb=memory_mb,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
            )
            captured = capture_rollouts(trainer, monkeypatch)
            batch = trainer._generate_and_score_completions(rows)
            expected = dense_costs(model, teacher, batch, temperature, beta).detach() * batch["completion_mask"]
            assert expected.sum() > 1
            assert captured[0].mask.sum(1).tolist() == [len(ids) for ids in completions]
            error = (captured[0].costs.double() - expected).norm() / expected.norm()
            assert error < 1e-5
            assert (captured[0].costs[~captured[0].mask] == 0).all()

    def test_teacher_prob_floor(self, tmp_path, monkeypatch):
        """A floor bounds a cost that would be infinite: the teacher gives a token probability 0."""
        teacher = make_teacher()
        with torch.no_grad():
            teacher.lm_head.weight[5].mul_(1e6)  # a logit of ±1e6
        floored = build(tmp_path, random_completions(4), teacher=teacher, teacher_prob_floor=1e-4)
        captured = capture_rollouts(floored, monkeypatch)
        floored._generate_and_score_completions(make_rows(4))
        assert 1 < captured[0].costs.max() <= torch.tensor(16 / 1e-4).log()


class TestGKDGradient:
    @pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
    @pytest.mark.parametrize("beta", [1.0, 0.0, 0.5])
    def test_divergence_part(self, tmp_path, monkeypatch, beta, loss_type):
        """Under a limit that no rollout meets, advantages removed, the gradient is that of the divergence, GKD's."""
        monkeypatch.setattr(
            constrained_trainer, "constrained_advantages", lambda rewards, *args: torch.zeros_like(rewards)
        )
        teacher, model = make_teacher(), make_model(spread=0.4)
        completions = random_completions(8)
        trainer = build(
            tmp_path,
            completions,
            teacher=teacher,
            model=model,
            cost_limit=UNBOUNDED,
            teacher_beta=beta,
            temperature=0.8,
            loss_type=loss_type,
            gradient_accumulation_steps=2,
        )
        loss, gradients = loss_and_gradients(trainer, micro_batches(trainer, make_rows(8)))

        batch = trainer._generate_and_score_completions(make_rows(8))
        mask = batch["completion_mask"]
        costs = dense_costs(model, teacher, batch, 0.8, beta) * mask
        expected = {
            "dapo": costs.sum() / mask.sum(),  # the mean over tokens, as in GKD
            "grpo": (costs.sum(1) / mask.sum(1)).mean(),
            "dr_grpo": costs.sum() / (8 * 6),
        }[loss_type]
        model.zero_grad()
        expected.backward()
        reference = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        assert relative_error(gradients, reference) < 1e-5

    def test_token_form_weights_only_infeasible_steps(self, tmp_path, monkeypatch):
        """In the token form the divergence acts on the steps whose prefix (or whole, at the end) is over the limit."""
        monkeypatch.setattr(
            constrained_trainer, "constrained_advantages", lambda rewards, *args: torch.zeros_like(rewards)
        )
        teacher, model = make_teacher(), make_model(spread=0.4)
        trainer = build(
            tmp_path,
            random_completions(8),
            teacher=teacher,
            model=model,
            cost_limit=2.4,
            credit_assignment="token",
            gradient_accumulation_steps=2,
        )
        _, gradients = loss_and_gradients(trainer, micro_batches(trainer, make_rows(8)))
        batch = trainer._generate_and_score_completions(make_rows(8))
        mask = batch["completion_mask"]
        costs = dense_costs(model, teacher, batch) * mask
        weights = torch.zeros_like(costs)
        for row in range(8):
            length = int(mask[row].sum())
            for t in range(length):
                prefix = costs[row, : length if t == length - 1 else t]
                weights[row, t] = float(len(prefix) > 0 and prefix.mean().item() > 2.4)
        assert 0 < weights.sum() < mask.sum()
        assert ((weights.sum(1) > 0) & (weights.sum(1) < mask.sum(1))).any()
        model.zero_grad()
        ((costs * weights).sum() / mask.sum()).backward()
        reference = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert relative_error(gradients, reference) < 1e-5


class TestInvariance:
    """For fixed rollouts the result depends on nothing but the rollouts. bnpo's normaliser is the micro-batch's."""

    LOSS_TYPES = ("grpo", "dapo", "dr_grpo", "cispo", "sapo", "luspo", "vespo")

    def gradients(self, tmp_path, completions, rows=None, **kwargs):
        kwargs = {"cost_limit": 2.4, "per_device_train_batch_size": 8, **kwargs}
        trainer = build(tmp_path, completions, reward_funcs=id_reward, **kwargs)
        rows = make_rows(len(completions)) if rows is None else rows
        batches = micro_batches(trainer, rows)
        weights = torch.cat([batch["divergence_weights"].sum(1) for batch in batches])
        assert 0 < (weights > 0).sum() < len(weights)  # some rollouts violate, some do not
        return loss_and_gradients(trainer, batches)

    @pytest.mark.parametrize("credit_assignment", ["trajectory", "token"])
    @pytest.mark.parametrize("loss_type", LOSS_TYPES)
    def test_micro_batches(self, tmp_path, loss_type, credit_assignment):
        """One micro-batch of 8 rollouts, 2 of 4, or 4 of 2."""
        settings = {"loss_type": loss_type, "credit_assignment": credit_assignment}
        completions = random_completions(8)
        loss, reference = self.gradients(tmp_path, completions, **settings)
        for accumulation in (2, 4):
            split_loss, split = self.gradients(
                tmp_path,
                completions,
                per_device_train_batch_size=8 // accumulation,
                gradient_accumulation_steps=accumulation,
                **settings,
            )
            assert split_loss == pytest.approx(loss, rel=1e-4, abs=1e-6)
            assert relative_error(split, reference) < 1e-5

    @pytest.mark.parametrize("credit_assignment", ["trajectory", "token"])
    def test_padding(self, tmp_path, credit_assignment):
        """More padding on both sides changes nothing."""
        completions = random_completions(8)
        loss, reference = self.gradients(tmp_path, completions, credit_assignment=credit_assignment)
        padded_loss, padded = self.gradients(
            tmp_path, completions, credit_assignment=credit_assignment, pad_to_multiple_of=16
        )
        assert padded_loss == pytest.approx(loss, rel=1e-4, abs=1e-6)
        assert relative_error(padded, reference) < 1e-5

    def test_padding_tokens_are_not_what_is_masked(self, tmp_path, monkeypatch):
        """The mask decides, not the token: a sampled pad token costs like any other."""
        trainer = build(tmp_path, [[PAD, 3, EOS], [PAD, PAD, 4, 5, 6, 7], [2, 2, EOS], [PAD]])
        captured = capture_rollouts(trainer, monkeypatch)
        trainer._generate_and_score_completions(make_rows(4))
        assert captured[0].mask.sum(1).tolist() == [3, 6, 3, 1]
        assert (captured[0].costs[captured[0].mask] > 0).all()

    @pytest.mark.parametrize("credit_assignment", ["trajectory", "token"])
    def test_row_order(self, tmp_path, credit_assignment):
        """Groups in another order, and rollouts in another order within their group."""
        completions, rows = random_completions(8), make_rows(8)
        loss, reference = self.gradients(tmp_path, completions, rows, credit_assignment=credit_assignment)
        for order in ([4, 5, 6, 7, 0, 1, 2, 3], [2, 0, 3, 1, 7, 6, 5, 4]):
            permuted_loss, permuted = self.gradients(
                tmp_path,
                [completions[index] for index in order],
                [rows[index] for index in order],
                credit_assignment=credit_assignment,
            )
            assert permuted_loss == pytest.approx(loss, rel=1e-4, abs=1e-6)
            assert relative_error(permuted, reference) < 1e-5


def id_reward(completion_ids, **kwargs):
    """Reward that depends on the completion alone."""
    return [float(sum(ids) % 4) for ids in completion_ids]
