"""
The gradient is that of TRL's own loss plus that of the weighted divergence over the same token normaliser, for each of
TRL's loss types, from one projection of the student's hidden states.
"""

import pytest
import torch
from helpers import (
    LIMIT,
    assert_gradient_is_dense,
    make_lora,
    make_rows,
    make_scripted_trainer,
    micro_batches,
    random_completions,
)


LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]


def build(tmp_path, *, lora=False, **settings):
    trainer = make_scripted_trainer(tmp_path, **settings, **({"peft_config": make_lora()} if lora else {}))
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # an adapter of zeros has no gradient but these
            torch.nn.init.normal_(parameter, std=0.3)
    return trainer


WINDOWS = [(2, 2), (1, 2), (4, 2), (1, 1)]  # micro-batches of an optimizer step and of a generation


# Each loss type with each form of credit; each window on whole models and on adapters.
@pytest.mark.parametrize(
    ("loss_type", "credit_assignment", "accumulation", "per_generation", "lora"),
    [
        (loss_type, credit_assignment, *WINDOWS[(i + j) % 4], (i + j + i // 4) % 2 == 1)
        for i, loss_type in enumerate(LOSS_TYPES)
        for j, credit_assignment in enumerate(["trajectory", "token"])
    ],
)
def test_loss_types(tmp_path, loss_type, credit_assignment, accumulation, per_generation, lora):
    trainer = build(
        tmp_path,
        completions=random_completions(4 * per_generation),
        loss_type=loss_type,
        credit_assignment=credit_assignment,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=per_generation,
        lora=lora,
        cost_limit=2.1 if lora else LIMIT,  # about half of the rollouts violate it
    )
    batches = micro_batches(trainer, make_rows(4 * per_generation))
    # Ragged, or the normalisers could not be told apart.
    assert len({int(length) for batch in batches for length in batch["completion_mask"].sum(1)}) > 1
    assert_gradient_is_dense(trainer, batches)
    trainer.model.eval()  # nothing is accumulated, and dapo's count spans the batch alone
    assert_gradient_is_dense(trainer, [trainer._prepare_inputs(make_rows(4 * per_generation))])


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7, "teacher_beta": 0.3},
        {"entropy_coef": 0.1, "teacher_beta": 0.5},
        {"top_entropy_quantile": 0.5, "teacher_beta": 0.0, "lora": True},
        {"importance_sampling_level": "sequence"},
        {"beta": 0.1, "lora": True},
        {"cast_lm_head_to_fp32": True},
        {"gradient_checkpointing": True},
        {"scale_rewards": "batch", "constraint_aggregation": "sum_then_normalize", "cost_scope": "sum"},
        {"scale_rewards": "none", "constraint_aggregation": "lexicographic", "cost_scope": "worst_prefix"},
        {"env_mask": [[index % 3 != 1 for index, _ in enumerate(ids)] for ids in random_completions(8)]},
        {"divergence_memory_mb": 1e-6},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_settings(tmp_path, settings):
    trainer = build(tmp_path, **settings, cost_limit=1e-9)
    assert_gradient_is_dense(trainer, micro_batches(trainer, make_rows(8)))
