"""TRL's correction for rollouts that vLLM sampled, with our divergence beside it. Needs no vLLM: the log-probabilities
that vLLM would have given come with scripted rollouts, and TRL computes its ratios from them."""

import pytest
import torch
from helpers import (
    loss_and_gradients,
    make_model,
    make_rows,
    make_teacher,
    make_tokenizer,
    make_trainer,
    micro_batches,
    random_completions,
    relative_error,
)
from peft import LoraConfig

import trl_cmdp.core._fused


MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo"]
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


def build(tmp_path, mode=None, *, fused=True, trainer_kwargs=None, **kwargs):
    """Trainer whose rollouts TRL takes for vLLM's, corrected in a `mode`."""
    trainer = make_trainer(
        tmp_path,
        model=make_model(spread=0.4),
        trainer_kwargs={
            "teacher_model": make_teacher(),
            "rollout_func": sampled_elsewhere,
            **(trainer_kwargs or {}),
        },
        **{
            "cost_limit": 2.4,  # about half of the rollouts violate it
            "gradient_accumulation_steps": 2,
            "vllm_importance_sampling_mode": mode or "sequence_mask",
            "vllm_importance_sampling_clip_min": 0.75,
            "vllm_importance_sampling_clip_max": 1.25,
            "shuffle_dataset": False,
            **kwargs,
        },
    )
    trainer.use_vllm = mode is not None
    trainer._last_loaded_step = trainer.state.global_step  # there is no vLLM to load weights into
    trainer._student_forward._fused = fused
    return trainer


def batches_with_ratio(trainer):
    """Micro-batches, and the correction's ratios."""
    batches = micro_batches(trainer, make_rows(8))
    assert all(batch["divergence_weights"].any() for batch in batches)
    ratio = torch.cat([batch["importance_sampling_ratio"].flatten() for batch in batches])
    assert ratio.std() > 0.05  # there is something to correct, and some of it is clipped
    assert ((ratio == 0) | (ratio == 0.75) | (ratio == 1.25)).any()
    return batches


@pytest.fixture
def projected_again(monkeypatch):
    """Numbers of positions that backward passes projected a second time."""
    counts = []
    correct = trl_cmdp.core._fused._policy_gradient

    def count(head, workspace, hidden, *args):
        counts.append(len(hidden))
        return correct(head, workspace, hidden, *args)

    monkeypatch.setattr(trl_cmdp.core._fused, "_policy_gradient", count)
    return counts


@pytest.mark.parametrize(
    ("mode", "loss_type", "credit_assignment"),
    [
        *((mode, "dapo", "trajectory") for mode in MODES),
        *((mode, "grpo", "token") for mode in MODES),
        *(("sequence_mask", loss_type, "trajectory") for loss_type in LOSS_TYPES),
    ],
)
def test_one_projection_gives_what_two_do(tmp_path, projected_again, mode, loss_type, credit_assignment):
    """The same loss and gradients as with TRL's head and the divergence beside it, and nothing is projected twice."""
    settings = {"loss_type": loss_type, "credit_assignment": credit_assignment}
    results = []
    for fused in (False, True):
        trainer = build(tmp_path, mode, fused=fused, **settings)
        results.append(loss_and_gradients(trainer, batches_with_ratio(trainer)))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5, abs=1e-6)
    assert relative_error(results[1][1], results[0][1]) < 2e-5
    assert not projected_again


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "vespo", "vllm_importance_sampling_mode": "token_truncate"},
        {"importance_sampling_level": "sequence"},
        {"top_entropy_quantile": 0.5},
        {"off_policy_mask_threshold": 0.05},
        {"beta": 0.1, "trainer_kwargs": {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"])}},
        {"num_iterations": 2, "gradient_accumulation_steps": 1, "steps_per_generation": 2},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_exact_also_where_the_gradient_is_not_foreseen(tmp_path, settings):
    mode = settings.get("vllm_importance_sampling_mode", "token_mask")
    results = []
    for fused in (False, True):
        trainer = build(tmp_path, mode, fused=fused, **settings)
        results.append(loss_and_gradients(trainer, batches_with_ratio(trainer)))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5, abs=1e-6)
    assert relative_error(results[1][1], results[0][1]) < 2e-5


@pytest.mark.parametrize("mode", MODES)
def test_the_policy_part_is_corrected_and_the_divergence_is_not(tmp_path, mode):
    """The corrected gradient is Σ ratio·(policy gradient of a token), plus the divergence's as it is without vLLM."""
    trainer = build(tmp_path, mode, loss_type="dr_grpo")
    batches = batches_with_ratio(trainer)
    _, corrected = loss_and_gradients(trainer, batches)

    plain = build(tmp_path / "plain", loss_type="dr_grpo")
    expected = micro_batches(plain, make_rows(8))
    for batch, other in zip(expected, batches, strict=True):
        assert torch.equal(batch["completion_ids"], other["completion_ids"])
        assert torch.equal(batch["divergence_weights"], other["divergence_weights"])
        assert torch.equal(batch["costs"], other["costs"])
        # The policy loss is linear in the advantages.
        batch["advantages"] = batch["advantages"].unsqueeze(1) * other["importance_sampling_ratio"]
    _, reference = loss_and_gradients(plain, expected)
    assert relative_error(corrected, reference) < 1e-5

    uncorrected = micro_batches(plain, make_rows(8))
    assert relative_error(corrected, loss_and_gradients(plain, uncorrected)[1]) > 0.01


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize(("steps_per_generation", "num_iterations"), [(1, 1), (2, 1), (2, 2)])
def test_old_log_probs_are_left_out_where_trl_leaves_them_out(
    tmp_path, accumulation, steps_per_generation, num_iterations
):
    """With vLLM's correction as without vLLM."""
    present = []
    for mode in (None, "token_truncate"):
        trainer = build(
            tmp_path,
            mode,
            gradient_accumulation_steps=accumulation,
            steps_per_generation=steps_per_generation,
            num_iterations=num_iterations,
        )
        present.append({"old_per_token_logps" in batch for batch in micro_batches(trainer, make_rows(8))})
    assert present[0] == present[1]
    assert present[0] == {accumulation % (steps_per_generation * num_iterations) != 0}
