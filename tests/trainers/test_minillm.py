"""MiniLLMDistillTrainer: advantages against a slow reference, teacher-mixed sampling, and the whole gradient."""

import pytest
import torch
from helpers import (
    VOCAB,
    dense_costs,
    dense_logps,
    gradients_of,
    loss_and_gradients,
    make_dataset,
    make_rows,
    make_teacher,
    make_trainer,
    micro_batches,
    random_completions,
    relative_error,
    scripted,
)
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel
from trl import GRPOTrainer

from trl_cmdp import MiniLLMDistillTrainer


SWITCHES = [
    {},
    {"single_step_decomposition": False},
    {"length_normalization": False},
    {"single_step_decomposition": False, "length_normalization": False},
]


def build(folder, **kwargs):
    return make_trainer(folder, MiniLLMDistillTrainer, teacher_model=make_teacher(), **kwargs)


def slow_advantages(student_logps, teacher_logps, mask, single_step, length_norm, alpha):
    """The paper's formulas, token by token, in plain Python."""
    advantages, importance = torch.zeros(mask.shape).double(), torch.zeros(mask.shape).double()
    for row in range(mask.size(0)):
        tokens = [t for t in range(mask.size(1)) if mask[row, t]]
        for position, t in enumerate(tokens):
            to_come = tokens[position + 1 :] if single_step else tokens[position:]
            total = sum((teacher_logps[row, k] - student_logps[row, k]).item() for k in to_come)
            if length_norm and to_come:
                total /= len(to_come)
            student, teacher = student_logps[row, t].exp().item(), teacher_logps[row, t].exp().item()
            weight = student / (alpha * teacher + (1 - alpha) * student)
            importance[row, t], advantages[row, t] = weight, weight * total
    return advantages, importance


@pytest.mark.parametrize("alpha", [0.0, 0.2])
@pytest.mark.parametrize("switches", SWITCHES, ids=lambda switches: "-".join(switches) or "all")
def test_loss_is_the_papers(tmp_path, monkeypatch, switches, alpha):
    """Advantages, importance weights and the gradient of the whole loss, at a temperature, against a slow reference."""
    trainer = build(
        tmp_path, loss_type="dapo", temperature=0.8, teacher_mixed_alpha=alpha, max_completion_length=8, **switches
    )
    # Completions made by hand, as if they had been sampled.
    rollout = scripted(random_completions(4, longest=8))
    monkeypatch.setattr(
        GRPOTrainer,
        "_generate_single_turn",
        lambda self, prompt_ids, *_, **__: (rollout(["1+2="] * len(prompt_ids), self)["completion_ids"], None),
    )
    batch = micro_batches(trainer, make_rows(4))[0]
    mask = batch["completion_mask"]
    student_logps = dense_logps(trainer.model, batch, 0.8)
    teacher_logps = dense_logps(trainer.teacher_model, batch, 0.8)
    single_step = switches.get("single_step_decomposition", True)
    expected, importance = slow_advantages(
        student_logps, teacher_logps, mask, single_step, switches.get("length_normalization", True), alpha
    )
    torch.testing.assert_close(batch["advantages"].double(), expected, rtol=1e-4, atol=1e-5)
    assert not batch["advantages"].requires_grad
    assert ("divergence_weights" in batch) == single_step

    _, gradients = loss_and_gradients(trainer, [batch])
    loss = -(expected * student_logps * mask).sum()
    if single_step:
        costs = dense_costs(trainer.model, trainer.teacher_model, batch, temperature=0.8)
        loss = loss + (importance * costs * mask).sum()
    assert relative_error(gradients, gradients_of(loss / mask.sum(), trainer.model)) < 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rollouts_are_sampled_from_the_mixture(tmp_path, temperature):
    """
    First and second tokens of many rollouts against α·μ + (1 − α)·π, both models at the temperature: a chi-square test
    at a level that the fixed seed passes, and which the student's or the teacher's own distribution fails.
    """
    alpha, count = 0.4, 2000
    trainer = build(
        tmp_path,
        teacher_mixed_alpha=alpha,
        temperature=temperature,
        max_completion_length=2,
        per_device_train_batch_size=count,
        num_generations=count,
    )
    batch = micro_batches(trainer, make_rows(count, group=count))[0]
    prompt = trainer.processing_class("1+2=", return_tensors="pt")["input_ids"]
    first = batch["completion_ids"][:, 0]
    frequent = first.mode().values

    def mixture(prefix, share):
        student, teacher = (
            (model(input_ids=prefix).logits[0, -1].double() / temperature).softmax(-1)
            for model in (trainer.model, trainer.teacher_model)
        )
        return share * teacher + (1 - share) * student

    with torch.no_grad():
        second = batch["completion_ids"][first == frequent, 1]
        cases = [(prompt, first), (torch.cat([prompt, frequent.view(1, 1)], dim=1), second)]
        for prefix, tokens in cases:
            statistics = []
            for share in (alpha, 0.0, 1.0):
                expected = mixture(prefix, share) * len(tokens)
                observed = torch.bincount(tokens, minlength=len(expected)).double()
                statistics.append(((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum().item())
            degrees = len(expected) - 1
            assert statistics[0] < degrees + 4 * (2 * degrees) ** 0.5
            assert min(statistics[1:]) > 10 * statistics[0]


def test_evaluation_is_not_mixed(tmp_path):
    """The same rollouts in evaluation, whatever the share of the teacher in training."""
    costs = []
    for alpha in (0.0, 0.9):
        trainer = build(
            tmp_path / str(alpha),
            teacher_mixed_alpha=alpha,
            per_device_eval_batch_size=4,
            eval_dataset=make_dataset(1),
        )
        costs.append(trainer.evaluate()["eval_constraint/cost"])
    assert costs[0] == costs[1]


def test_rollout_func_cannot_be_mixed(tmp_path):
    with pytest.raises(ValueError, match="`teacher_mixed_alpha=0`"):
        build(tmp_path, rollout_func=scripted(random_completions(4)))


def test_a_teacher_that_cannot_be_mixed_in_is_refused_before_training(tmp_path):
    teacher = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=VOCAB, n_embd=12, n_layer=1, n_head=2, n_positions=64))
    with pytest.raises(ValueError, match="no cache of what it has read"):
        make_trainer(tmp_path, MiniLLMDistillTrainer, teacher_model=teacher)
    make_trainer(tmp_path, MiniLLMDistillTrainer, teacher_model=teacher, teacher_mixed_alpha=0.0)
