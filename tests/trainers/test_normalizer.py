"""The divergence has the policy loss's own token normaliser, for each of TRL's loss types."""

import math

import pytest
import torch
from helpers import make_rows, make_teacher, make_trainer, micro_batches, random_completions, scripted
from trl import GRPOTrainer


LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]


def factor_in_trl(trainer, batch):
    """
    Factor of each token in TRL's loss, read off its gradient: the loss adds beta·KL to each token's policy loss, and
    with a reference of twice the student's probability, d(KL)/d(reference log-probability) is exactly 1.
    """
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    length = batch["completion_ids"].size(1)
    with torch.no_grad():
        logps = trainer._get_per_token_logps_and_entropies(trainer.model, input_ids, attention_mask, length)[0]
    reference = (logps + math.log(2)).requires_grad_()
    batch = {**batch, "ref_per_token_logps": reference, "advantages": torch.zeros(len(logps))}
    trainer.beta = 1.0
    try:
        loss = GRPOTrainer._compute_loss(trainer, trainer.model, batch)
    finally:
        trainer.beta = 0.0
    return torch.autograd.grad(loss, reference)[0]


@pytest.mark.parametrize(("accumulation", "per_generation"), [(1, 1), (2, 2), (1, 2), (4, 2)])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_policy_token_weight(tmp_path, loss_type, accumulation, per_generation):
    trainer = make_trainer(
        tmp_path,
        trainer_kwargs={
            "teacher_model": make_teacher(),
            "rollout_func": scripted(random_completions(4 * per_generation)),
        },
        loss_type=loss_type,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=per_generation,
    )
    for batch in micro_batches(trainer, make_rows(4 * per_generation)):
        mask = _loss_mask(batch)
        assert len(set(mask.sum(1).tolist())) > 1  # ragged, or the normalisers could not be told apart
        ours = trainer._policy_token_weight(mask, batch["num_items_in_batch"]) * mask
        torch.testing.assert_close(ours, factor_in_trl(trainer, batch), rtol=1e-5, atol=1e-8)

    trainer.model.eval()  # no accumulation, and dapo's count spans this batch alone
    batch = trainer._prepare_inputs(make_rows(4 * per_generation))
    mask = _loss_mask(batch)
    ours = trainer._policy_token_weight(mask, batch["num_items_in_batch"]) * mask
    torch.testing.assert_close(ours, factor_in_trl(trainer, batch), rtol=1e-5, atol=1e-8)


def test_unknown_loss_type(tmp_path):
    trainer = make_trainer(tmp_path, trainer_kwargs={"teacher_model": make_teacher()})
    trainer.loss_type = "new_in_trl"
    trainer.model.eval()
    with pytest.raises(ValueError, match="new_in_trl"):
        trainer._policy_token_weight(torch.ones(2, 3), torch.tensor(6.0))
