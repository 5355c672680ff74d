"""TRL's correction for rollouts that vLLM sampled, with our divergence beside it. Needs no vLLM: the log-probabilities
that vLLM would have given come with scripted rollouts, and TRL computes its ratios from them."""

import pytest
import torch
from helpers import (
    assert_gradient_is_dense,
    make_lora,
    make_model,
    make_rows,
    make_scripted_trainer,
    make_tokenizer,
    micro_batches,
    random_completions,
)


COMPLETIONS = random_completions(8)


@torch.no_grad()
def noisy_logps(prompts, completions, seed=0):
    """Log-probabilities of a sampler that is near the student."""
    model, generator = make_model(spread=0.4), torch.Generator().manual_seed(seed)
    logps = []
    for prompt_ids, ids in zip(make_tokenizer()(prompts)["input_ids"], completions, strict=True):
        logits = model(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
        own = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
        logps.append((own + 0.3 * torch.randn(own.shape, generator=generator)).tolist())
    return logps


def sampled_elsewhere(prompts, trainer):
    """`rollout_func` with log-probabilities, as vLLM gives them."""
    completions = COMPLETIONS[: len(prompts)]
    return {
        "prompt_ids": trainer.processing_class(prompts)["input_ids"],
        "completion_ids": completions,
        "logprobs": noisy_logps(prompts, completions),
    }


def build(tmp_path, mode, **kwargs):
    """Trainer whose rollouts TRL takes for vLLM's, corrected in a `mode`."""
    clip = {"vllm_importance_sampling_clip_min": 0.75, "vllm_importance_sampling_clip_max": 1.25}
    trainer = make_scripted_trainer(
        tmp_path, rollout_func=sampled_elsewhere, vllm_importance_sampling_mode=mode, **clip, **kwargs
    )
    trainer.use_vllm = True
    trainer._last_loaded_step = trainer.state.global_step  # there is no vLLM to load weights into
    return trainer


def batches_with_ratio(trainer):
    """Micro-batches, in which the correction corrects something and clips some of it."""
    batches = micro_batches(trainer, make_rows(8))
    assert all(batch["divergence_weights"].any() for batch in batches)
    ratio = torch.cat([batch["importance_sampling_ratio"].flatten() for batch in batches])
    assert ratio.std() > 0.05
    assert ((ratio == 0) | (ratio == 0.75) | (ratio == 1.25)).any()
    return batches


@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("token_truncate", {"loss_type": "dapo"}),
        ("token_mask", {"loss_type": "grpo", "credit_assignment": "token"}),
        ("sequence_truncate", {"loss_type": "grpo", "credit_assignment": "token"}),
        ("sequence_mask", {"loss_type": "dapo"}),
        ("token_truncate", {"loss_type": "bnpo"}),
        ("token_mask", {"loss_type": "dr_grpo"}),
        ("sequence_truncate", {"loss_type": "cispo"}),
        ("sequence_mask", {"loss_type": "sapo"}),
        ("sequence_mask", {"loss_type": "luspo"}),
        ("token_truncate", {"loss_type": "vespo"}),
        ("token_mask", {"importance_sampling_level": "sequence"}),
        ("token_mask", {"top_entropy_quantile": 0.5}),
        ("token_mask", {"off_policy_mask_threshold": 0.05}),
        ("token_mask", {"beta": 0.1, "peft_config": make_lora()}),
        ("token_mask", {"num_iterations": 2, "gradient_accumulation_steps": 1, "steps_per_generation": 2}),
    ],
)
def test_gradient(tmp_path, mode, settings):
    """TRL's own corrected loss, plus the divergence, which is not corrected."""
    trainer = build(tmp_path, mode, **settings)
    assert_gradient_is_dense(trainer, batches_with_ratio(trainer))
