"""GKDDistillTrainer: the divergence alone, on the student's rollouts, the dataset's completions or the teacher's."""

import pytest
import torch
from datasets import Dataset
from helpers import (
    EOS,
    capture_rollouts,
    dense_costs,
    dense_logps,
    gradients_of,
    history,
    loss_and_gradients,
    make_dataset,
    make_rows,
    make_scripted_trainer,
    make_teacher,
    make_tokenizer,
    make_trainer,
    micro_batches,
    relative_error,
    run,
    same_weights,
    weights,
)
from trl import GRPOTrainer

from trl_cmdp import ConstrainedDistillTrainer, GKDDistillTrainer, MiniLLMDistillTrainer


COMPLETIONS = ["3#3", "7", "1+1,11", "5#15#15"]  # the last one is longer than a completion may be


def completion_dataset() -> Dataset:
    return make_dataset().add_column("completion", COMPLETIONS * 8)


def build(folder, **kwargs):
    return make_trainer(folder, GKDDistillTrainer, **{"teacher_model": make_teacher(), **kwargs})


@pytest.mark.parametrize(
    ("trainer_class", "beta"),
    [
        (GKDDistillTrainer, 1.0),
        (GKDDistillTrainer, 0.5),
        (GKDDistillTrainer, 0.0),
        (ConstrainedDistillTrainer, 1.0),
        (ConstrainedDistillTrainer, 0.5),
    ],
)
def test_gradient_is_the_divergence_alone(tmp_path, trainer_class, beta):
    """
    Mean over tokens of the batch (dapo's normaliser) of the dense generalised JSD, whatever the rewards. Of the
    constrained trainer too, without its advantages, under a limit that no rollout meets (oracle 4).
    """
    trainer = make_scripted_trainer(
        tmp_path,
        trainer_class,
        teacher_beta=beta,
        cost_limit=1e-9,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
    )
    (batch,) = micro_batches(trainer, make_rows(8))
    if trainer_class is ConstrainedDistillTrainer:
        batch["advantages"] = torch.zeros(8)
    loss, gradients = loss_and_gradients(trainer, [batch])
    costs = dense_costs(trainer.model, trainer.teacher_model, batch, beta=beta)
    expected = (costs * batch["completion_mask"]).sum() / batch["completion_mask"].sum()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert relative_error(gradients, gradients_of(expected, trainer.model)) < 1e-5


@pytest.mark.parametrize("trainer_class", [GKDDistillTrainer, MiniLLMDistillTrainer])
def test_rewards_do_not_enter(tmp_path, trainer_class):
    plain = run(tmp_path / "a", trainer_class, reward_funcs=None, teacher_model=make_teacher())
    rewarded = run(tmp_path / "b", trainer_class, teacher_model=make_teacher())
    assert history(rewarded, "reward") != history(plain, "reward")
    assert same_weights(rewarded, plain)


def test_lmbda_zero_trains_on_dataset_completions_only(tmp_path, monkeypatch):
    """No token is sampled; every batch holds the dataset's completions, cut at the longest length, with their EOS."""
    trainer = build(tmp_path, train_dataset=completion_dataset(), lmbda=0.0, max_steps=3)
    monkeypatch.setattr(
        GRPOTrainer, "_generate_single_turn", lambda *args, **kwargs: pytest.fail("the student was asked to generate")
    )
    before = weights(trainer)
    trainer.train()
    for index, completion in enumerate(COMPLETIONS):
        (batch,) = micro_batches(trainer, [completion_dataset()[index]] * 4)
        for ids, mask in zip(batch["completion_ids"], batch["completion_mask"].bool(), strict=True):
            assert trainer.processing_class.decode(ids[mask], skip_special_tokens=True) == completion[:6]
            assert (EOS in ids[mask]) == (len(completion) < 6)
    assert history(trainer, "on_policy_frac") == [0.0, 0.0, 0.0]
    assert not history(trainer, "constraint/cost")  # these are not the student's rollouts
    assert any(not torch.equal(value, before[name]) for name, value in weights(trainer).items())


def test_lmbda_between_mixes_batches(tmp_path):
    trainer = run(
        tmp_path,
        GKDDistillTrainer,
        train_dataset=completion_dataset(),
        lmbda=0.5,
        max_steps=12,
        log_completions=True,
        teacher_model=make_teacher(),
    )
    fractions = history(trainer, "on_policy_frac")
    assert set(fractions) == {0.0, 1.0}
    assert len(history(trainer, "constraint/cost")) == sum(fractions)


def test_conversational_completions_continue_the_prompt(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '#' + message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '#' }}{% endif %}"
    )
    dataset = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": "1+2="}]] * 8,
            "completion": [[{"role": "assistant", "content": "3"}]] * 8,
        }
    )
    trainer = build(tmp_path, reward_funcs=None, train_dataset=dataset, tokenizer=tokenizer, lmbda=0.0)
    batch = micro_batches(trainer, [dataset[0]] * 4)[0]
    assert tokenizer.decode(batch["prompt_ids"][0]) == "#1+2=#"
    assert tokenizer.decode(batch["completion_ids"][0]) == "3<eos>"


def test_seq_kd_samples_from_the_teacher(tmp_path, monkeypatch):
    """The completions are the teacher's own; the student generates nothing."""
    teacher = make_teacher(spread=1.0)
    trainer = build(tmp_path, lmbda=0.0, seq_kd=True, teacher_model=teacher)
    captured = capture_rollouts(trainer, monkeypatch)
    generators = []
    generate = type(teacher).generate

    def spy(model, *args, **kwargs):
        generators.append(model)
        return generate(model, *args, **kwargs)

    monkeypatch.setattr(type(teacher), "generate", spy)
    torch.manual_seed(0)
    batch = micro_batches(trainer, make_rows(4))[0]
    assert generators == [teacher]
    assert trainer.model_wrapped is trainer.model
    assert not teacher.training
    assert len(captured) == 1
    # Its own completions are likely under the teacher, and unlikely under a fresh student.
    logps = [(dense_logps(model, batch) * batch["completion_mask"]).sum() for model in (teacher, trainer.model)]
    assert logps[0] > logps[1] + 10


def test_evaluation_is_on_policy(tmp_path):
    trainer = build(
        tmp_path,
        train_dataset=completion_dataset(),
        lmbda=0.0,
        per_device_eval_batch_size=4,
        eval_dataset=make_dataset(1),  # which needs no completions
    )
    metrics = trainer.evaluate()
    assert metrics["eval_constraint/cost"] > 0


def test_a_missing_completion_column_is_an_error_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"`completion` column.*`seq_kd=True`"):
        build(tmp_path, lmbda=0.5)


def test_a_stream_without_completions_is_an_error_at_the_first_batch(tmp_path):
    trainer = build(tmp_path, train_dataset=make_dataset().to_iterable_dataset(), lmbda=0.0)
    with pytest.raises(ValueError, match="`completion` column"):
        trainer.train()
