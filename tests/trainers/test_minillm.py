"""MiniLLMDistillTrainer: advantages against a slow reference, teacher-mixed sampling, and the whole gradient."""

import pytest
import torch
from helpers import (
    capture_rollouts,
    dense_costs,
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

from trl_cmdp import MiniLLMDistillConfig, MiniLLMDistillTrainer


SWITCHES = [
    {},
    {"single_step_decomposition": False},
    {"length_normalization": False},
    {"single_step_decomposition": False, "length_normalization": False},
]


def build(folder, **kwargs):
    trainer_kwargs = {"teacher_model": make_teacher(), **kwargs.pop("trainer_kwargs", {})}
    return make_trainer(folder, MiniLLMDistillTrainer, trainer_kwargs=trainer_kwargs, **kwargs)


def dense_logps(model, batch, temperature=1.0):
    """Float64 log-probabilities (B, T) of the completion's tokens, differentiable."""
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    length = batch["completion_ids"].size(1)
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, -(length + 1) : -1].double()
    logps = (logits / temperature).log_softmax(-1)
    return logps.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)


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
        type(trainer).__mro__[2],
        "_generate_single_turn",
        lambda self, prompt_ids, *args, **kwargs: (
            rollout(["1+2="] * len(prompt_ids), self)["completion_ids"],
            None,
        ),
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
    trainer.model.zero_grad()
    loss = -(expected * student_logps * mask).sum()
    if single_step:
        costs = dense_costs(trainer.model, trainer.teacher_model, batch, temperature=0.8)
        loss = loss + (importance * costs * mask).sum()
    (loss / mask.sum()).backward()
    reference = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    assert relative_error(gradients, reference) < 1e-4


def test_padding_does_not_matter(tmp_path, monkeypatch):
    trainer = build(
        tmp_path, teacher_mixed_alpha=0.0, trainer_kwargs={"rollout_func": scripted(random_completions(4))}
    )
    captured = capture_rollouts(trainer, monkeypatch)
    batch = micro_batches(trainer, make_rows(4))[0]
    masked = ~captured[0].mask
    assert masked.any()
    assert (captured[0].student_logps[masked] == 0).all()
    assert (captured[0].teacher_logps[masked] == 0).all()
    assert (batch["advantages"][batch["completion_mask"] == 0] == 0).all()
    assert (batch["divergence_weights"][batch["completion_mask"] == 0] == 0).all()


def test_the_last_token_has_nothing_to_come(tmp_path):
    trainer = build(
        tmp_path, teacher_mixed_alpha=0.0, trainer_kwargs={"rollout_func": scripted(random_completions(4))}
    )
    batch = micro_batches(trainer, make_rows(4))[0]
    last = batch["completion_mask"].sum(1) - 1
    assert (batch["advantages"].gather(1, last.unsqueeze(1)) == 0).all()


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
            trainer_kwargs={"eval_dataset": make_dataset(1)},
        )
        costs.append(trainer.evaluate()["eval_constraint/cost"])
    assert costs[0] == costs[1]


def test_training_lowers_the_divergence(tmp_path):
    trainer = run(
        tmp_path,
        MiniLLMDistillTrainer,
        reward_funcs=None,
        trainer_kwargs={"teacher_model": make_teacher()},
        max_steps=60,
        learning_rate=0.03,
        lr_scheduler_type="constant",
        per_device_train_batch_size=16,
    )
    divergence = history(trainer, "teacher/divergence")
    assert sum(divergence[-5:]) < 0.75 * sum(divergence[:5])
    assert all(0 < weight < 1.25 + 1e-6 for weight in history(trainer, "importance_weight"))  # bounded by 1/(1 − α)


def test_rewards_do_not_enter(tmp_path):
    trainers = [
        run(
            tmp_path / str(index),
            MiniLLMDistillTrainer,
            reward_funcs=reward,
            trainer_kwargs={"teacher_model": make_teacher()},
        )
        for index, reward in enumerate(
            [None, lambda completions, **kwargs: [float(len(text)) for text in completions]]
        )
    ]
    expected = weights(trainers[0])
    assert all(torch.equal(value, expected[name]) for name, value in weights(trainers[1]).items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher_mixed_alpha": 1.0}, r"`teacher_mixed_alpha` must lie in \[0, 1\)"),
        ({"teacher_beta": 0.5}, "`teacher_beta` must be 1"),
        ({"use_vllm": True}, "`teacher_mixed_alpha=0`"),
    ],
)
def test_bad_fields_are_errors(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        MiniLLMDistillConfig(str(tmp_path), use_cpu=True, bf16=False, **fields)


def test_rollout_func_cannot_be_mixed(tmp_path):
    with pytest.raises(ValueError, match="`teacher_mixed_alpha=0`"):
        build(tmp_path, trainer_kwargs={"rollout_func": scripted(random_completions(4))})
