"""Several teachers by name, one for each prompt."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from helpers import (
    assert_gradient_is_dense,
    capture_rollouts,
    dense_costs,
    history,
    loss_and_gradients,
    make_dataset,
    make_scripted_trainer,
    make_teacher,
    micro_batches,
    random_completions,
    relative_error,
    run,
)

from trl_cmdp import LagrangianDistillTrainer
from trl_cmdp.core import rollout_cost


TEACHERS = {"near": (1, {}), "far": (2, {"hidden_size": 20, "spread": 0.9})}


def teachers():
    return {name: make_teacher(seed, **kwargs) for name, (seed, kwargs) in TEACHERS.items()}


def dataset(names=("near", "far")):
    data = make_dataset()
    return data.add_column("teacher", [names[index % len(names)] for index in range(len(data))])


def rows():
    """Two groups of four, one of each teacher."""
    data = dataset()
    return [data[index // 4] for index in range(8)]


def build(tmp_path, *args, **kwargs):
    settings = {"teacher_model": teachers(), "train_dataset": dataset(), "cost_limit": 1.0, **kwargs}
    return make_scripted_trainer(tmp_path, *args, **settings)


@pytest.mark.parametrize(("recomputed", "batch_size"), [(False, 8), (True, 4), (True, 8)])
def test_each_rollout_has_its_own_teacher(tmp_path, monkeypatch, recomputed, batch_size):
    """Costs, and the divergence's gradient, against the dense divergence from the teacher that the prompt names."""
    trainer = build(
        tmp_path,
        LagrangianDistillTrainer,
        multiplier="fixed",
        multiplier_init=1.0,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=8 // batch_size,
        teacher_hidden_memory_mb=1e-6 if recomputed else 256,
    )
    captured = capture_rollouts(trainer, monkeypatch)
    batches = micro_batches(trainer, rows())
    (rollouts,) = captured
    assert rollouts.teacher_index.tolist() == [0] * 4 + [1] * 4

    def own_costs(student, _, batch, temperature, beta):
        first, second = (dense_costs(student, teacher, batch, temperature, beta) for teacher in teachers().values())
        return torch.where(batch["teacher_index"].unsqueeze(1) == 0, first, second)

    for batch in batches:
        mask, expected = batch["completion_mask"], own_costs(trainer.model, None, batch, 1.0, 1.0).detach()
        torch.testing.assert_close(batch["costs"].double() * mask, expected * mask, rtol=1e-4, atol=1e-6)
    assert_gradient_is_dense(trainer, batches, costs=own_costs)


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_a_rollout_without_tokens_that_count(tmp_path, recomputed):
    """One of each teacher, beside others in one micro-batch: nothing to score, nothing to distil, no gradient lost."""
    completions = random_completions(8)
    env_mask = [[index not in (1, 6)] * len(completion) for index, completion in enumerate(completions)]
    results = []
    for batch_size in (8, 4):
        trainer = build(
            tmp_path,
            env_mask=env_mask,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=8 // batch_size,
            cost_limit=1e-9,
            teacher_hidden_memory_mb=1e-6 if recomputed else 256,
        )
        results.append(loss_and_gradients(trainer, micro_batches(trainer, rows())))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    assert relative_error(results[1][1], results[0][1]) < 1e-5


def test_a_limit_for_each(tmp_path):
    """With limits on either side of the teachers' costs, all rollouts of one violate it and none of the other's do."""
    trainer = run(
        tmp_path,
        train_dataset=dataset(),
        teacher_model=teachers(),
        cost_limit={"far": 1e-6, "near": 1e3},
        gradient_accumulation_steps=4,
        max_steps=3,
    )
    assert set(history(trainer, "constraint/satisfaction_rate/near")) <= {1.0}
    assert set(history(trainer, "constraint/satisfaction_rate/far")) <= {0.0}
    assert history(trainer, "constraint/satisfaction_rate/near")


@pytest.mark.parametrize("credit_assignment", ["trajectory", "token"])
def test_limits_apart_are_limits_of_separate_batches(tmp_path, monkeypatch, credit_assignment):
    """Advantages and weights of a mixed batch are those of each teacher's rollouts under its own limit alone."""
    trainer = build(tmp_path)
    captured = capture_rollouts(trainer, monkeypatch)
    micro_batches(trainer, rows())
    (rollouts,) = captured
    cost = rollout_cost(rollouts.costs, rollouts.mask)
    limits = {name: cost[4 * index : 4 * index + 4].median().item() for index, name in enumerate(TEACHERS)}
    trainer = build(tmp_path, cost_limit=limits, credit_assignment=credit_assignment)
    trainer.model.train()
    mixed = trainer._signal(rollouts)
    for index, limit in enumerate(limits.values()):
        alone = build(tmp_path, cost_limit=limit, credit_assignment=credit_assignment)
        alone.model.train()
        signal = alone._signal(rollouts)
        own = rollouts.teacher_index == index
        assert torch.equal(mixed.advantages[own], signal.advantages[own])
        assert torch.equal(mixed.divergence_weights[own], signal.divergence_weights[own])
    assert 0 < mixed.divergence_weights.sum() < rollouts.mask.sum()


def test_evaluation(tmp_path):
    trainer = build(tmp_path, per_device_eval_batch_size=4, rollout_func=None)
    metrics = trainer.evaluate(dataset().select(range(4)))
    assert {"eval_constraint/satisfaction_rate/near", "eval_constraint/satisfaction_rate/far"} <= metrics.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_dataset": make_dataset()}, r"column `teacher` chooses one .* found no such column"),
        ({"train_dataset": dataset(("near", "wrong"))}, "of 'near', 'far'; found 'wrong'"),
        ({"teacher_model": {}}, "empty dict"),
        ({"cost_limit": {"near": 1.0}}, r"limits for \['near'\], and the teachers are \['far', 'near'\]"),
    ],
)
def test_bad_input(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **changes)


def test_unknown_name_in_a_stream(tmp_path):
    trainer = build(tmp_path, train_dataset=IterableDataset.from_generator(lambda: iter(dataset(("wrong",)))))
    with pytest.raises(ValueError, match="found 'wrong'"):
        micro_batches(trainer, [{"prompt": "1+2=", "teacher": "wrong"}] * 8)


def test_one_dataset_for_one_teacher(tmp_path):
    """A column `teacher` means nothing with a single teacher."""
    data = Dataset.from_dict({"prompt": ["1+2="] * 8, "teacher": ["any"] * 8})
    trainer = run(tmp_path, train_dataset=data, teacher_model=make_teacher(), max_steps=1)
    assert history(trainer, "constraint/cost")
